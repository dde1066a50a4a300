"""The pods (engine replicas): whether they answer, what they serve and how loaded they are."""
