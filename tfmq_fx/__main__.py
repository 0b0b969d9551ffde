"""``python -m tfmq_fx``: the command line, as ``tfmq-fx`` runs it."""

from tfmq_fx.cli.app import main

if __name__ == "__main__":
    main()
