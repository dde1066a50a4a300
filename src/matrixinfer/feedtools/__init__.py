"""Captures, mutations and plain-word views of event feeds, for the `events` commands and the doctor."""
