"""Mixed precision by sensitivity: which layers get how many bits, under a budget."""
