"""A tiny corpus in LibriSpeech layout, prepared once, what makes batches of it, and a way to run the programs
of `local/` in this process.
"""

import dataclasses
import importlib.util
import logging
import sys
from pathlib import Path
from typing import Callable, List, NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet

from transducer_kd.config import DataConfig
from transducer_kd.data.datamodule import DataModule
from transducer_kd.data.pseudo_labels import pack_soft, set_sha256
from transducer_kd.data.tokenizer import Tokenizer
from transducer_kd.data.validate import save_manifest
from transducer_kd.log import run_main

sys.path.insert(0, str(Path(__file__).parent))
from batches import encoder_lens  # noqa: E402

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


@pytest.fixture
def build(prepared):
    """Function: a DataModule of `prepared`, with other settings of DataConfig where they are given."""

    def make(world_size=1, rank=0, lens=encoder_lens, soft_targets=False, needs_text=True, **settings):
        config = DataConfig(fbank_dir=str(prepared.fbank), lang_dir=str(prepared.lang), max_duration_s=12.0)
        config = dataclasses.replace(config, **settings)
        tokenizer = Tokenizer(prepared.lang)
        return DataModule(config, tokenizer, lens, world_size, rank, soft_targets, needs_text)

    return make


@pytest.fixture
def one_thread():
    """As a loader's workers have: features that several threads compute may differ in their last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def label(prepared, tmp_path):
    """Function: pseudo-labels of part test, with stored teachers of 6 channels, all of cut n being n."""

    def make(text="TURN ON THE MUSIC"):
        cuts = list(CutSet.from_file(prepared.fbank / "cuts_test.jsonl.gz"))
        (tmp_path / "units").mkdir()
        with open(tmp_path / "units" / "00000.soft", "wb") as f:
            for n, cut in enumerate(cuts):
                cut.supervisions[0].text = text
                soft = {"path": "units/00000.soft", "offset": f.tell(), "dim": 6, "dtype": "float16"}
                soft["frames"] = encoder_lens(cut.num_frames)
                cut.custom = {"score": -1.0, "confidence": 0.9, "teacher_sha256": "a" * 64, "soft": soft}
                f.write(pack_soft(np.full((soft["frames"], 6), n, np.float32), "float16"))
        save_manifest(cuts, tmp_path / "cuts.jsonl.gz")
        (tmp_path / "summary.json").write_text(f'{{"sha256": "{set_sha256(cuts)}"}}')
        return str(tmp_path), {cut.id: n for n, cut in enumerate(cuts)}

    return make
