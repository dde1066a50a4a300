"""From a request's body to the token ids that the engine caches."""
