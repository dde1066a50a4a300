"""Replays of recorded and generated traffic in virtual time: what would a routing policy gain?"""
