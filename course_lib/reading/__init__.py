"""After a run: what its numbers say."""
