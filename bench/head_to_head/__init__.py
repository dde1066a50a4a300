"""Routers in front of two real vLLM engines: `python -m bench.head_to_head`."""
