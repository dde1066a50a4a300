"""Engines' KV events in, index operations out. Only connections, replays and subscriptions do I/O."""
