"""The graph cut into reconstruction units, and put together again; equal to the bit."""
