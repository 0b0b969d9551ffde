"""What was lowered to what, and whether it is right."""
