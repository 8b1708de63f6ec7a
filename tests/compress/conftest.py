import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import small_supernet  # noqa: E402


@pytest.fixture
def make_supernet():
    return small_supernet.make_supernet


@pytest.fixture
def features():
    return small_supernet.make_features()
