"""The way in: what a captured program is called with, and how a model becomes one."""
