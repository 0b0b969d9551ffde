"""Reconstruction: weight rounding is learned, the temporal block from its own output, the rest unit by unit."""
