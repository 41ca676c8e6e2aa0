"""What all tests share: nothing is left behind, and Hypothesis is the same on every machine."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Machines that run tests are shared and slow at times: a deadline would make failures of their load, not of the code.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
