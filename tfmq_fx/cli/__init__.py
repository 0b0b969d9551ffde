"""The command line, ``tfmq-fx``.

Nothing here imports torch before a command runs, so that ``--help`` is quick.
"""

from tfmq_fx.cli.app import main

__all__ = ["main"]
