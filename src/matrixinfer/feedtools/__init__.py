"""Captures of event feeds, checks of them, and readable views, for the `events` commands and the doctor."""
