"""What the tests of kdcore and of every plugin share: no network, and CUDA tests only where there is a device."""

from __future__ import annotations

import os
import warnings

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _cuda_is_available() -> bool:
    import torch

    with warnings.catch_warnings():  # an outdated driver warns, which would turn a skip into an error
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not _cuda_is_available():
        pytest.skip("needs a CUDA device")
