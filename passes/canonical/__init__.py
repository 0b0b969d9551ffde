"""Exact rewrites that bring a captured graph into one form."""
