"""Lowering: a quantized program becomes a denoiser on real kernels."""
