"""Who may use the gateway, how much of it, and in which order: the only place where that is decided."""
