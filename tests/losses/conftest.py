"""Fixtures of the loss tests: every kernel that is installed, or a skip that says why it is not usable."""

import importlib

import pytest


def _require(name):
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as e:
        pytest.skip(f"{name} is not usable in this environment: {e}")


@pytest.fixture(params=["torch", "k2", "fast_rnnt"])
def backend(request):
    """Name of a kernel."""
    if request.param != "torch":
        _require(request.param)
    return request.param


@pytest.fixture(params=["k2", "fast_rnnt"])
def library(request):
    """A package whose own Python losses ours are compared with."""
    return _require(request.param)
