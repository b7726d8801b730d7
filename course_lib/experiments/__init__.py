"""What lessons run besides one pretraining."""
