"""Prompts that engines get as token ids: which of them, and which engines make the same answers from them."""
