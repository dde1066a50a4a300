"""The HTTP front: accepts requests, asks the router, forwards and streams."""
