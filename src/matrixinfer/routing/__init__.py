"""The decision path: a request body in, a dispatched request out."""
