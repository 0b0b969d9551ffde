"""Settings that all tests share."""

import os

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

# Generated graphs differ a lot in size, so a time limit per example says nothing about the code.
# The phase that explains a failure runs it some hundred times more; shrinking shows enough.
SHARED = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
    "phases": [phase for phase in Phase if phase is not Phase.explain],
}
settings.register_profile("dev", max_examples=25, **SHARED)
settings.register_profile("ci", max_examples=20, derandomize=True, **SHARED)
settings.register_profile("nightly", max_examples=1000, **SHARED)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(PROFILE)

# Hypothesis also draws constants that it reads in whatever modules are loaded; ``derandomize`` does not cover them. So
# a run of one file, or any edit of any file, drew other cases than the whole run. There is no public switch for this.
if PROFILE == "ci":
    providers._get_local_constants = lambda: Constants()

# Several workers that each start a thread per core would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
