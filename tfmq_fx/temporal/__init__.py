"""Everything about time: the finite domain that a time path is a function over, its calibration, its tables."""
