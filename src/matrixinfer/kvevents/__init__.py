"""Engine KV events in, index operations out. All but `subscriber` is free of I/O."""
