"""The block index in Redis or Valkey, where several gateways and agents share what they know."""
