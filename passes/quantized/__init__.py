"""Rewrites of quantize/dequantize pairs that stay pairs; equal to the bit."""
