"""Rewrites that bring layers into the form that is quantized; equal up to the order of float sums."""
