"""What holds for every test: one thread in each process, as many processes as is reasonable, the same examples."""

import os

# Before torch is imported, here or in a process that is started from here: so many workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton's kernels run all the same, on the CPU; it asks for this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

MOST_WORKERS = 4  # each needs about a gigabyte

settings.register_profile("same-examples", derandomize=True, deadline=None, database=None)
settings.load_profile("same-examples")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)
