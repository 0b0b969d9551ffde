"""The stages from a captured graph to a quantized program: prepare, calibrate, convert."""
