"""A simulated engine: cache and timing of one replica as a pure model, with its HTTP API and KV events around it."""
