"""Public tools to test graph rewrites property by property."""
