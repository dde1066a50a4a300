"""Checks every engine for what would make KV-aware routing blind or wrong, and says how to fix it.

`gather` collects facts over HTTP, ZMQ and from Redis. `checks` is a pure function from facts to findings.
"""
