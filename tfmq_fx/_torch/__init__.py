"""Every private name of torch, torchao and Inductor that the package uses: one module per subject, nowhere else.

Where such a name moves in a newer release, its module here is the one place to change.
"""
