"""From quantize/dequantize pairs to integer kernels."""
