import os

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "abyssal",
    deadline=None,
    print_blob=True,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("abyssal")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
