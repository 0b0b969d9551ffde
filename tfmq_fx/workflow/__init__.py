"""Whole ways through the stages, in one call."""
