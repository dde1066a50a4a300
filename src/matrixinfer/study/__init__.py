"""Replays of recorded and generated traffic in virtual time, to compare routing policies."""
