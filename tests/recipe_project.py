"""run.sh in a copy of the project, for the tests of recipes.

The copy borrows this environment, so that neither data nor models of the project itself are touched.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = {".venv": "k2", ".venv-modern": "modern"}
DATA = "egs/librispeech/data/synthetic-smoke"


def copy_project(target: Path) -> Path:
    """The project without data, models and environments."""
    target.mkdir()
    shutil.copy(ROOT / "run.sh", target)
    ignored = shutil.ignore_patterns("__pycache__", "data", "exp", "RESULTS.md")
    for name in ("egs", "tools"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for name in ("local", "transducer_kd"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


class Project:
    """One recipe's run.sh, at scale smoke, in a copy of the project."""

    def __init__(self, root: Path, recipe: str):
        self.root, self.recipe = root, recipe
        self.exp = root / "egs/librispeech" / recipe / "exp/synthetic-smoke"
        self.environment = ENVIRONMENTS.get(Path(sys.prefix).name, "")
        link = root / Path(sys.prefix).name
        if self.environment and not link.exists():
            link.symlink_to(sys.prefix)

    def needs_environment(self) -> None:
        """Skips the test where run.sh cannot work."""
        if not self.environment:
            pytest.skip("run.sh needs an environment made by tools/setup.sh; these tests run in another one")

    def command(self, *options: str) -> list:
        words = ["--recipe", self.recipe, "--env", self.environment, "--scale", "smoke"]
        return ["bash", str(self.root / "run.sh"), *words, *options]

    def run(self, *options: str, status: int = 0) -> str:
        """Output of run.sh; fails unless it ends with `status`."""
        done = subprocess.run(
            self.command(*options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def stop_in(self, log: str, words: tuple, *options: str) -> str:
        """Output of a run.sh that gets a SIGTERM as soon as all `words` are in its log file `log`."""
        process = subprocess.Popen(
            self.command(*options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        path = self.exp / "log" / log
        deadline = time.monotonic() + 60
        while not (path.exists() and all(word in path.read_text() for word in words)):
            assert time.monotonic() < deadline and process.poll() is None, path.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 143
        return output

    def stages(self) -> list:
        """Names of the stages that ran so far."""
        path = self.exp / "stages.jsonl"
        return [json.loads(line)["name"] for line in path.read_text().splitlines()] if path.exists() else []

    def check_order(self, phases: list) -> None:
        """`phases` were last trained, some side by side, each after what it began with and learnt from."""
        ended = {name: number for number, name in enumerate(self.stages())}
        for phase in phases:
            for parent in set(self.origins(phase).values()) - {phase}:
                assert ended[parent] < ended[phase], f"{phase} before {parent}"

    def origins(self, phase: str) -> dict:
        """What the phase began with and learnt from: {"init": folder, "teacher": folder}, names only."""
        found = json.loads((self.exp / phase / "meta.json").read_text())["origins"]
        return {name: Path(origin["path"]).name for name, origin in found.items()}

    def check_exports(self, modes: dict) -> None:
        """Stage 7 has just run, and all that it makes is there; modes: phase -> its modes.

        Models that have learnt next to nothing say the same in int8 as in float: their gates are passed, too.
        """
        assert self.stages()[-2:] == ["bench", "report"]
        for phase, own in modes.items():
            folder = self.exp / phase / "export"
            gate, bench = (json.loads((folder / f"{name}.json").read_text()) for name in ("gate", "bench"))
            assert gate["passed"] and gate["tensors"] and gate["odd"] and (folder / "README.md").exists()
            assert {row["mode"] for row in gate["words"]} == set(own)
            assert {row["phase"] for row in bench["rows"]} == {phase}
