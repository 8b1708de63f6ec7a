"""Transducer speech recognisers made small enough for a device, and what it cost in accuracy."""

import importlib.util
import sys

if importlib.util.find_spec("torch") is None:
    raise ModuleNotFoundError(
        f"{sys.executable} has no torch: activate the project's environment with 'source .venv/bin/activate' "
        "(tools/setup.sh makes it)"
    )
