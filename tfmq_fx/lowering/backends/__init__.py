"""What a quantized program can be lowered to: every module and folder here that has a ``BACKEND`` is one.

``backend`` says what a backend is; ``registry`` finds backends: those here, those that installed packages declare as
entry points, and those that were registered by a call. Importing this imports none of them.
"""
