"""The gateway beside other routers, under the same load: `python -m bench.peers`."""
