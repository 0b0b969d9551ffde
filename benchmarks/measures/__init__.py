"""Instruments that measure generated images: Fréchet distances, a classifier's view, and cached sampling."""
