"""What to quantize and how: configurations, their checks, presets of published methods."""
