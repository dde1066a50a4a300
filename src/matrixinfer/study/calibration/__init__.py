"""Fits the model of an engine to a live one."""
