"""A simulated engine: cache and timing of one vLLM replica as a pure model, with its HTTP API and KV events around it."""
