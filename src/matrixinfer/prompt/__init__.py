"""Turns a request's body into the token ids that the engine caches."""
