"""Floor 0: what every other room may use, from the standard library and yaml alone."""
