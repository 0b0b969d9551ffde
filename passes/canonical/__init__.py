"""Rewrites that bring a captured graph into one form; equal to the bit."""
