"""Models of two modes on tiny untrained phases: local/decode.py, emission_delay.py and measure_speed.py."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from transducer_kd import build
from transducer_kd.compress import size
from transducer_kd.config import EncoderConfig, PhaseConfig, to_dict
from transducer_kd.data.tokenizer import train_bpe
from transducer_kd.decode import evaluate, speed
from transducer_kd.decode.streaming import chunks
from transducer_kd.log import UserError
from transducer_kd.models.conformer import Conformer
from transducer_kd.models.transducer import Transducer
from transducer_kd.train.checkpoint import save_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from test_decode_program import TEXTS, write_part  # noqa: E402

LOCAL = Path(__file__).resolve().parents[2] / "local"
LAYERS, DIM, UNITS, HEADS, CHUNK = 2, 8, 16, 2, 4
GREEDY, BY_CHUNK = "greedy_search", "streaming_greedy_search"


def save(exp_dir, config, tokenizer, model):
    content = {"model": model.state_dict(), "config": to_dict(config), "bpe_sha256": tokenizer.sha256}
    save_checkpoint(exp_dir / "epoch-1.pt", content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """fbank/, lang/ and the phases unit/, block8x1/ (supernets whose masks leave half of everything out),
    dense/ (unit's weights, two modes without masks) and alone/ (unit's streaming mode, with zeros)."""
    folder = tmp_path_factory.mktemp("modes")
    (folder / "fbank").mkdir()
    tokenizer = train_bpe(TEXTS, folder / "lang", 40)
    write_part(folder / "fbank", "test-clean", 5)
    config = PhaseConfig(objective="dual_mode")
    config.data.fbank_dir, config.data.lang_dir = str(folder / "fbank"), str(folder / "lang")
    encoder = config.model.encoder
    encoder.num_layers, encoder.encoder_dim, encoder.feedforward_dim, encoder.num_heads = (
        LAYERS, DIM, UNITS, HEADS,
    )  # fmt: skip
    encoder.subsampling_channels, encoder.chunk_size, encoder.left_context = 2, CHUNK, 8
    config.model.decoder.decoder_dim = config.model.joiner_dim = 8
    for kind in ("block8x1", "unit"):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, pruned_groups=kind))
        supernet = build.build_model(config, tokenizer.vocab_size).eval()
        with torch.no_grad():
            supernet.joiner.output_linear.weight.mul_(4.0)
        kept = {name: torch.zeros_like(mask) for name, mask in supernet.masks.kept().items()}
        for mask in kept.values():
            mask[..., ::2] = True
        supernet.masks.assign(kept)
        save(folder / kind, config, tokenizer, supernet)
    alone, dense = supernet.plain(CHUNK), Transducer(supernet.plain(CHUNK).config, tokenizer.vocab_size)
    dense.load_state_dict({k: v for k, v in supernet.state_dict().items() if k[:6] != "masks."})
    for name, model in (("alone", alone), ("dense", dense)):
        save(folder / name, dataclasses.replace(config, model=model.config), tokenizer, model)
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """Function: runs a program of local/ on phases."""

    def call(name, phases, *arguments):
        spec = importlib.util.spec_from_file_location(f"{name}_program", LOCAL / f"{name}.py")
        program = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
        monkeypatch.setattr(program, "setup_logging", lambda: None)
        given = ["--exp-dir", *(str(folder / phase) for phase in phases.split()), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
        assert program.main() == 0

    return call


def read(folder, phase, name):
    return json.loads((folder / phase / f"{name}.json").read_text())


def half_of_the_units():
    """What a streaming unit model does without: 8 of 16 units of two feed-forward modules, 1 of 2 heads."""
    unit = 2 * DIM + 1
    head = 4 * (DIM // HEADS) * DIM + 3 * (DIM // HEADS)
    return LAYERS * (2 * UNITS // 2 * unit + HEADS // 2 * head)


@pytest.mark.parametrize("phase", ["unit", "block8x1", "dense"])
def test_both_modes_are_decoded_recorded_and_kept(run, folder, phase, monkeypatch):
    heard = {}

    def spy(name):
        real = getattr(evaluate, name)
        monkeypatch.setattr(
            evaluate, name, lambda model, *args: heard.update({name: model}) or real(model, *args)
        )

    spy("streaming_greedy_search")
    run("decode", phase, "--test-parts", "test-clean", "--decoding-method", f"{GREEDY},{BY_CHUNK}")
    loaded = build.load_model(folder / phase)
    model, masks = loaded.model, getattr(loaded.model, "masks", None)
    streamed = heard["streaming_greedy_search"].state_dict()
    for name, weight in (masks.masked_weights(model.encoder) if masks else {}).items():
        assert torch.equal(streamed[f"encoder.{name}"], weight) and 0.4 < (weight == 0).float().mean() < 0.6
    kept = read(folder, phase, "metrics")
    run("decode", phase, "--test-parts", "test-clean", "--decoding-method", GREEDY, "--chunk-size", 0)
    records = {(r["mode"], r["method"]): r for r in read(folder, phase, "metrics")}
    streaming, offline = records["streaming", GREEDY], records["offline", GREEDY]
    assert len(records) == 3 and [streaming, records["streaming", BY_CHUNK]] == kept
    assert streaming["wer"] == records["streaming", BY_CHUNK]["wer"]
    texts = [(folder / phase / r["recogs"]).read_text() for r in records.values()]
    assert len(texts) == len({r["recogs"] for r in records.values()}) == 3

    whole = model.first_pass_parameters()
    layers = sum(p.numel() for p in model.encoder.layers.parameters())
    for r in records.values():
        assert (r["params_dense"], r["params_layers"]) == (whole, layers)
        assert r["bytes"] == 4 * r["params_deployed"] + r["index_bytes"]
    assert (offline["params_deployed"], offline["index_bytes"]) == (whole, 0)
    left_out = {"unit": half_of_the_units(), "dense": 0}.get(phase)
    expected = size.count(model, CHUNK)
    if left_out is None:
        left_out, index = whole - expected.value_bytes // 4, expected.index_bytes
        assert left_out > 0.3 * layers and index > 0
    assert whole - streaming["params_deployed"] == left_out
    assert streaming["index_bytes"] == expected.index_bytes


def test_a_phase_in_one_mode(folder):
    for phase in ("unit", "dense"):
        loaded = build.load_model(folder / phase)
        x, x_lens = torch.randn(2, 70, 80) * 4 - 8, torch.tensor([70, 51])
        for chunk_size in (0, CHUNK, 2 * CHUNK):
            own = loaded.in_mode(chunk_size)
            assert type(own.model) is Transducer and not own.model.training
            assert own.config.model.encoder.chunk_size == own.model.encoder.cfg.chunk_size == chunk_size
            with torch.no_grad():
                found, expected = (
                    own.model.encode(x, x_lens)[0],
                    loaded.model.encode(x, x_lens, chunk_size)[0],
                )
            torch.testing.assert_close(found, expected)
        assert loaded.config.model.encoder.chunk_size == loaded.model.encoder.cfg.chunk_size == CHUNK
        assert (own.tokenizer, own.checkpoint) == (loaded.tokenizer, loaded.checkpoint)


def test_the_delay_is_that_of_the_streaming_mode_with_masks(run, folder):
    parts = ["--test-parts", "test-clean"]
    run("emission_delay", "unit", "--reference-exp-dir", folder / "alone", *parts)
    found = read(folder, "unit", "delay")
    assert found["mode"] == "streaming"
    assert [found["parts"]["test-clean"][name] for name in ("mean_frames", "low", "high")] == [0, 0, 0]
    run("emission_delay", "unit", "--reference-exp-dir", folder / "dense", *parts)
    assert read(folder, "unit", "delay")["parts"]["test-clean"]["mean_frames"] != 0


# Speed


class Encoder:
    """Takes so many seconds for a chunk, and for an utterance, as `clock` says."""

    def __init__(self, name, clock, chunk_s, whole_s):
        self.name, self.clock, self.chunk_s, self.whole_s = name, clock, chunk_s, whole_s
        self.cfg = PhaseConfig().model.encoder
        self.cfg.chunk_size = 50  # 2 s
        self.turns = 0

    def streaming_init(self, num_streams, device):
        self.clock.heard.append((self.name, "streaming"))
        self.turns += 1
        return 0

    def streaming_forward(self, x, x_lens, number):
        assert x.shape == (1, 203, 80)
        # Chunk 1 takes four times as long as the others, turn 0 a hundred times as long as the others.
        slow = (4 if number == 1 else 1) * (100 if self.turns == 1 else 1)
        self.clock.now += slow * self.chunk_s * (3 if self.turns == 3 else 1)
        return None, None, number + 1

    def __call__(self, x, x_lens, chunk_size):
        assert x.shape == (1, 1000, 80) and x_lens.tolist() == [1000] and chunk_size == 0
        self.clock.heard.append((self.name, "offline"))
        self.clock.now += self.whole_s


class Clock:
    def __init__(self):
        self.now, self.heard = 0.0, []

    def __call__(self):
        return self.now


def test_encoders_take_turns_and_medians_are_told():
    clock = Clock()
    slow, fast = Encoder("slow", clock, 0.01, 0.5), Encoder("fast", clock, 0.005, 0.4)
    other = Encoder("other", clock, 1, 0.25)
    both = {"a": slow, "b": fast}
    asked = {name: {"streaming": e, "offline": e} for name, e in both.items()}
    found = speed.measure({**asked, "c": {"offline": other}}, audio_s=10, repeats=5, clock=clock)
    turn = [(n, m) for n in ("slow", "fast") for m in ("streaming", "offline")] + [("other", "offline")]
    assert clock.heard == 6 * turn
    # 10 s are 5 chunks: 4 x 10 ms and 40 ms; a turn three times as slow and the one before all do not count.
    a = found["a"]["streaming"]
    assert dataclasses.astuple(a) == pytest.approx((0.008, 10.0, 34.0, 1.0))
    assert dataclasses.astuple(found["b"]["streaming"]) == pytest.approx((0.004, 5.0, 17.0, 2.0))
    times = {name: modes["offline"] for name, modes in found.items()}
    assert {n: (t.rtf, t.times_faster) for n, t in times.items()} == {
        "a": pytest.approx((0.05, 1.0)), "b": pytest.approx((0.04, 1.25)), "c": pytest.approx((0.025, 2.0)),
    }  # fmt: skip
    assert times["a"].chunk_ms_median is None and list(found["c"]) == ["offline"]
    lines = [line.split() for line in speed.table(found).splitlines()]
    assert lines[3] == ["b", "streaming", "0.00400", "5.00", "(17.00)", "2.00"]
    assert lines[5] == ["c", "offline", "0.02500", "-", "2.00"]


def test_what_the_reference_has_no_mode_for_has_no_ratio():
    clock = Clock()
    encoder = Encoder("x", clock, 0.01, 0.5)
    asked = {"offline": {"offline": encoder}, "streaming": {"streaming": encoder}}
    found = speed.measure(asked, audio_s=10, repeats=1, clock=clock)
    assert found["streaming"]["streaming"].times_faster is None
    assert speed.table(found).splitlines()[2].split()[-1] == "-"


def test_a_frozen_encoder_computes_what_the_encoder_does():
    torch.manual_seed(0)
    cfg = EncoderConfig(
        num_layers=2, encoder_dim=32, num_heads=2, feedforward_dim=32, cnn_module_kernel=5, chunk_size=4,
        left_context=8,
    )  # fmt: skip
    encoder = Conformer(cfg).eval()
    frozen = speed.FrozenEncoder(encoder)
    for frames in (83, 60, 83):  # the last chunk is not full
        x, lens = torch.randn(1, frames, 80), torch.tensor([frames])
        with torch.inference_mode():
            torch.testing.assert_close(frozen(x, lens, 0), encoder(x, lens, 0))
            states = [e.streaming_init(1, x.device) for e in (encoder, frozen)]
            for chunk, chunk_lens in chunks(x, lens, cfg.chunk_size):
                *expected, states[0] = encoder.streaming_forward(chunk, chunk_lens, states[0])
                *found, states[1] = frozen.streaming_forward(chunk, chunk_lens, states[1])
                torch.testing.assert_close([*found, *states[1]], [*expected, *states[0]])


def test_speeds_of_phases_are_written_beside_them(run, folder, capsys, monkeypatch):
    encoders = {}
    real = speed.measure
    monkeypatch.setattr(speed, "measure", lambda asked, *args: encoders.update(asked) or real(asked, *args))
    run("measure_speed", "dense unit", "--audio-s", 1, "--repeats", 1)
    shown = capsys.readouterr().out
    written = {phase: read(folder, phase, "speed") for phase in ("dense", "unit")}
    for found in written.values():
        assert found["reference"] == "dense" and (found["checkpoint"], found["chunk_size"]) == (
            "epoch-1-avg-1", CHUNK,
        )  # fmt: skip
        assert (found["num_threads"], found["repeats"], found["audio_s"]) == (1, 1, 1)
        assert found["torch"] == torch.__version__ and "--audio-s 1" in found["command"] and found["commit"]
        assert found["runtime"] == "TorchScript, frozen"
        assert list(found["modes"]) == ["streaming", "offline"]
        streaming, offline = found["modes"].values()
        assert streaming["rtf"] > 0 and streaming["chunk_ms_p95"] >= streaming["chunk_ms_median"] > 0
        assert offline["rtf"] > 0 and offline["chunk_ms_median"] is None
        reference = written["dense"]["modes"]["streaming"]["rtf"]
        assert streaming["times_faster"] == pytest.approx(reference / streaming["rtf"])
        assert f"{streaming['rtf']:.5f}" in shown
    own = encoders[folder / "unit"]
    hidden = {mode: encoder.encoder.layers[0].ff1.hidden.weight for mode, encoder in own.items()}
    assert (hidden["streaming"][1::2] == 0).all() and (hidden["offline"] != 0).all()
    with pytest.raises(UserError, match="no experiment folder .*/nothing"):
        run("measure_speed", "dense nothing")
    for wrong in (["--repeats", 0], ["--audio-s", 0], ["--num-threads", "x"], ["--epoch", -1, "--avg", 2]):
        with pytest.raises(SystemExit):
            run("measure_speed", "dense", *wrong)
