"""Which engine replicas there are, whether they answer, what they serve and how loaded they are."""
