"""Fixtures of several tests of reports."""

import pytest

from transducer_kd.report import plots


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take most of a page's time and have tests of their own."""
    monkeypatch.setattr(plots, "figures", lambda report: [])
