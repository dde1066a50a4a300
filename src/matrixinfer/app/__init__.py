"""Composition roots: the gateway, the agent, the index as configured, and the collectors of their metrics."""
