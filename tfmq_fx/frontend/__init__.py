"""What stands between a user's model and the canonical graph."""
