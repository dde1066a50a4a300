"""Why prompt tokens were not found in a cache: what was seen before, kept, matched, chosen and reused, step by step."""
