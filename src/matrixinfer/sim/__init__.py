"""A simulated engine: one vLLM replica's cache and timing as a pure model, and its HTTP API and KV events around it."""
