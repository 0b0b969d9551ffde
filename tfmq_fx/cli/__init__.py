"""The command line ``tfmq-fx``."""
