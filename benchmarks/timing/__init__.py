"""The parts of ``latency.py``, ``roofline.py`` and ``scale.py``: UNets, worker processes, rounds, statistics."""
