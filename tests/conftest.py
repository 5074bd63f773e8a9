"""One compute thread per worker, no network, and seeds that do not depend on the order of the tests."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import hypothesis
import pytest
import torch

# The same examples in every run: what fails here fails everywhere.
hypothesis.settings.register_profile("tunesmith", derandomize=True, deadline=None)
hypothesis.settings.load_profile("tunesmith")


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> None:
    """What earlier modules left behind is not looked through again: a Trainer collects garbage at every start, which
    takes seconds in a worker that has run thousands of tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
