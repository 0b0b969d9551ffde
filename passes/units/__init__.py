"""The graph cut into reconstruction units."""
