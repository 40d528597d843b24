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

# Small tensors gain nothing from threads, and workers that wait for each other's cost minutes. For child processes too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
