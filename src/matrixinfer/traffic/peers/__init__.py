"""What gateways tell each other, best effort: how much they have in flight where, and what they have sent there."""
