"""The check of one GPU, and the bundle that carries it to a node without a network."""
