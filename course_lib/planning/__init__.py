"""Before a run: what it needs, what it sends, how fast it can be."""
