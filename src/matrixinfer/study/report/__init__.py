"""A replay as one page for people who decide: what to do, and the figures behind it."""
