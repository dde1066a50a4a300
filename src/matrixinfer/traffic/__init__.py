"""What was sent where, by this gateway and by others: load, routing history, peers."""
