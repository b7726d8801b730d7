"""What a cell calls to teach."""
