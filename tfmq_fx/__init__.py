"""tfmq_fx."""
