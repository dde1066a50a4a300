"""How far the index is believed, per endpoint and per model."""
