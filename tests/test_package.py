"""The package without its environment."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_python_without_torch_is_told_what_to_do():
    # -S leaves out site-packages, so this interpreter has the standard library only.
    command = [sys.executable, "-S", "-c", "import transducer_kd"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "has no torch: activate the project's environment with 'source .venv/bin/activate'" in done.stderr
