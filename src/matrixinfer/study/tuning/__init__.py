"""Looks for the scheduler settings that are best for a trace, and says how sure that is."""
