"""A tiny corpus in LibriSpeech layout, prepared once, and a way to run the programs of `local/` in this
process.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Callable, List, NamedTuple

import numpy as np
import pytest
import soundfile

from transducer_kd.log import run_main

LOCAL = Path(__file__).resolve().parents[2] / "local"
WORDS = "TURN ON THE LIGHTS IN KITCHEN PLAY MUSIC SET A TIMER FOR TEN MINUTES CALL ANNA".split()


def noise(seconds: float, seed: int = 0, rate: int = 16000) -> np.ndarray:
    """Soft noise (S,) that swells and fades."""
    samples = int(seconds * rate)
    swell = 0.55 + 0.45 * np.sin(np.arange(samples) / 900.0)
    return (0.05 * swell * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def write_part(folder: Path, speakers: int, utterances: int, seed: int) -> None:
    """<folder>/<speaker>/1/<speaker>-1-<n>.flac with transcripts."""
    rng = np.random.default_rng(seed)
    for speaker in range(seed * 100, seed * 100 + speakers):
        chapter = folder / str(speaker) / "1"
        chapter.mkdir(parents=True)
        lines = []
        for n in range(utterances):
            name = f"{speaker}-1-{n:04d}"
            audio = noise(rng.uniform(0.9, 3.0), seed=speaker * 1000 + n)
            soundfile.write(chapter / f"{name}.flac", audio, 16000)
            lines.append(f"{name} {' '.join(rng.choice(WORDS, rng.integers(1, 5)))}\n")
        (chapter / f"{speaker}-1.trans.txt").write_text("".join(lines))


class Outcome(NamedTuple):
    """status: exit status.  lines: what the program wrote to stderr."""

    status: int
    lines: List[str]

    @property
    def errors(self) -> List[str]:
        return [line for line in self.lines if " ERROR " in line]


def load_program(name: str):
    spec = importlib.util.spec_from_file_location(f"local_{name}", LOCAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def local_program() -> Callable:
    """local_program("prepare_manifests"): the module."""
    return load_program


def call_program(name: str, *arguments: object) -> int:
    program = load_program(name)
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: program.main([str(a) for a in arguments]))
    return stopped.value.code


@pytest.fixture
def run_program(capfd) -> Callable[..., Outcome]:
    """run_program("compute_fbank", "--fbank-dir", ...) -> Outcome, as a shell would see it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(name: str, *arguments: object) -> Outcome:
        capfd.readouterr()
        status = call_program(name, *arguments)
        return Outcome(status, capfd.readouterr().err.splitlines())

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


class Prepared(NamedTuple):
    corpus: Path
    manifests: Path
    fbank: Path
    lang: Path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Prepared:
    """48 training utterances, 10 for validation and test each, with features and a BPE model. Read only."""
    base = tmp_path_factory.mktemp("prepared")
    made = Prepared(base / "LibriSpeech", base / "manifests", base / "fbank", base / "lang")
    write_part(made.corpus / "train", speakers=4, utterances=12, seed=1)
    write_part(made.corpus / "dev", speakers=2, utterances=5, seed=2)
    write_part(made.corpus / "test", speakers=2, utterances=5, seed=3)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    programs = [
        ("prepare_manifests", "--corpus-dir", made.corpus, "--output-dir", made.manifests),
        ("compute_fbank", "--manifests-dir", made.manifests, "--fbank-dir", made.fbank, "--num-jobs", 1),
        ("prepare_lang", "--manifests-dir", made.manifests, "--parts", "train", "--lang-dir", made.lang)
        + ("--vocab-size", 40),
    ]
    for program in programs:
        assert call_program(*program) == 0
    root.handlers[:] = handlers
    root.setLevel(level)
    return made
