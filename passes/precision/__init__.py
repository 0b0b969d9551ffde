"""Passes that change numerics, each by a precision that it names: no other room has one."""
