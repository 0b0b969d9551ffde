"""Exact rewrites that bring layers into the form that is quantized."""
