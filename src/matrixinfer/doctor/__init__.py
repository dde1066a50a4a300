"""Looks at every engine for what would make KV-aware routing blind or wrong, and says so with the remedy.

`examine` gathers facts over HTTP and ZMQ; `diagnose` is a pure function from facts to findings.
"""
