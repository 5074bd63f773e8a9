"""One compute thread per worker, no network, and seeds that do not depend on the order of the tests."""

from __future__ import annotations

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


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
