"""What a lowered program is called through."""
