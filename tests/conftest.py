"""Settings that all tests share."""

import os

import torch
from hypothesis import HealthCheck, settings

# Generated graphs differ a lot in size, so a time limit per example says nothing about the code.
SHARED = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=25, **SHARED)
settings.register_profile("ci", max_examples=20, derandomize=True, **SHARED)
settings.register_profile("nightly", max_examples=1000, **SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Several workers that each start a thread per core would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
