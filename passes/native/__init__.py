"""From quantize/dequantize pairs to integer kernels; equal up to float rounding."""
