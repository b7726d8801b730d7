"""What a rank executes."""
