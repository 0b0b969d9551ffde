"""Ahead of time: an AOTInductor package that needs neither the model's source nor a compiler."""
