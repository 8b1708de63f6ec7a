"""tools/bench_soft_targets.py on a tiny untrained model: every column against a slower way to it."""

import importlib.util
import itertools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet

from transducer_kd import build
from transducer_kd.config import LossConfig, SpecAugmentConfig
from transducer_kd.data.batch import collate
from transducer_kd.data.pseudo_labels import pack_soft, soft_row_bytes, unpack_soft
from transducer_kd.decode import evaluate, wer
from transducer_kd.decode.beam_search import modified_beam_search
from transducer_kd.log import UserError
from transducer_kd.losses.distill import LatticeDistillOptions
from transducer_kd.losses.distill_reference import lattice_kd_reference
from transducer_kd.models.spec_augment import SpecAugment
from transducer_kd.models.subsampling import subsampled_lens
from transducer_kd.objectives.transducer import TransducerObjective

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/decode"))
from tiny_teacher import write_part, write_phases  # noqa: E402

DURATIONS_S = [round(0.4 + 0.15 * i, 2) for i in range(10)]
BATCH_S = 3.0
DIM = 8

spec = importlib.util.spec_from_file_location("bench_soft_targets", ROOT / "tools/bench_soft_targets.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """fbank/, lang/ and exp/; part dev has transcripts, silent has none."""
    folder = tmp_path_factory.mktemp("trained")
    write_phases(folder)
    write_part(folder / "fbank", "dev", DURATIONS_S, seed=1)
    cuts = write_part(folder / "fbank", "silent", [1.0])
    cuts[0].supervisions[0].text = ""
    CutSet.from_cuts(cuts).to_file(folder / "fbank" / "cuts_silent.jsonl.gz")
    return folder


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Where temporary folders are made; none may be left."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def arguments(trained, *options):
    given = ["--exp-dir", trained / "exp", "--part", "dev", "--max-duration", BATCH_S, "--device", "cpu"]
    return [str(a) for a in [*given, "--threads", "1", *options]]


def run(trained, *options):
    return bench.run(bench.parse_arguments(arguments(trained, *options)))


def rows_of(result):
    return {row["storage"]: row for row in result["rows"]}


def encoded(trained, chunk_size=0):
    """The model, and of each batch the batch, encoder_out and its lengths."""
    loaded = build.load_model(trained / "exp")
    batches = list(build.build_data(loaded.config.data, loaded.tokenizer).test_batches("dev", BATCH_S))
    assert len(batches) > 2
    with torch.no_grad():
        return loaded, [(b, *loaded.model.encode(b.features, b.feature_lens, chunk_size)) for b in batches]


def after_storage(out, lens, dtype):
    """(N,T',D) -> what is left of it, utterance by utterance."""
    left = torch.zeros_like(out)
    for n, frames in enumerate(lens.tolist()):
        rows = bench.pl.pack_soft(out[n, :frames].numpy(), dtype)
        left[n, :frames] = torch.from_numpy(unpack_soft(rows, out.shape[2], dtype))
    return left


def words_of(loaded, out, lens):
    nbests = modified_beam_search(loaded.model, out, lens, 4)
    return [loaded.tokenizer.decode(nbest[0].tokens).split() for nbest in nbests]


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_sizes_errors_and_word_error_rates(trained, chunk_size):
    options = ["--chunk-size", chunk_size] if chunk_size else []  # 0 is as trained
    result = run(trained, "--repeats", "1", *options)
    found = rows_of(result)
    assert list(found) == ["float32", "float16", "int8"]
    frames = sum(subsampled_lens(round(100 * s)) for s in DURATIONS_S)
    hours = sum(DURATIONS_S) / 3600
    for name, row_bytes in (("float32", 4 * DIM), ("float16", 2 * DIM), ("int8", DIM + 2)):
        assert found[name]["mb_per_hour"] == pytest.approx(frames * row_bytes / 1e6 / hours)
    loaded, batches = encoded(trained, chunk_size)
    largest = max(float(row[:t].abs().max()) for _, out, lens in batches for row, t in zip(out, lens))
    assert result["part"].endswith(f"chunk {chunk_size}, beam 4; encoder outputs up to {largest:.3g}")
    data = build.build_data(loaded.config.data, loaded.tokenizer)
    decoder = evaluate.PartDecoder(
        loaded.model, loaded.tokenizer, lambda: data.test_batches("dev", BATCH_S),
        evaluate.SearchOptions(chunk_size), torch.device("cpu"),
    )  # fmt: skip
    (plain,) = decoder.decode(["modified_beam_search"])
    assert found["float32"]["wer"] == wer.score(plain.utterances).wer > 0
    assert found["float32"]["compared"] is None and found["float32"]["largest_error"] == 0
    for dtype in bench.STORED:
        utterances, errors = [], []
        for batch, out, lens in batches:
            left = after_storage(out, lens, dtype)
            errors += [
                np.abs(left[n, :t].numpy() - out[n, :t].numpy()).max() for n, t in enumerate(lens.tolist())
            ]
            for cut_id, text, words in zip(batch.cut_ids, batch.texts, words_of(loaded, left, lens)):
                utterances.append((cut_id, text.split(), words))
        compared = wer.compare(plain.utterances, utterances)
        assert found[dtype]["wer"] == wer.score(utterances).wer
        assert found[dtype]["compared"] == vars(compared)
        assert found[dtype]["largest_error"] == max(errors) > 0
    assert found["float16"]["largest_error"] < found["int8"]["largest_error"] < 0.05


@pytest.mark.parametrize("is_coarse", [False, True])
def test_the_divergence_is_that_of_the_pruned_nodes_of_the_first_hypotheses(trained, is_coarse, monkeypatch):
    if is_coarse:  # so that it matters which distribution is the first
        monkeypatch.setattr(bench.pl, "pack_soft", lambda x, dtype: pack_soft(np.round(x), dtype))
    found = rows_of(run(trained, "--repeats", "1"))
    loaded, batches = encoded(trained)
    model = loaded.model
    objective = TransducerObjective(model, LossConfig("torch"), SpecAugment(SpecAugmentConfig(enabled=False)))
    nats, nodes = dict.fromkeys(bench.STORED, 0.0), 0
    for batch, out, lens in batches:
        tokens = [nbest[0].tokens for nbest in modified_beam_search(model, out, lens, 4)]
        features = [x[:t].numpy() for x, t in zip(batch.features, batch.feature_lens)]
        with torch.no_grad():
            done = objective.clean_pass(collate(features, tokens, batch.cut_ids, batch.texts))
            y = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in tokens], True)

            def every_node(out, decoder_out=done.decoder_out):
                logits = model.joiner(out[:, :, None], decoder_out[:, None])
                return logits.double()

            for dtype in bench.STORED:
                stored = every_node(after_storage(out, lens, dtype))
                losses, counts = lattice_kd_reference(
                    stored, every_node(out), y, done.ranges, done.boundary, LatticeDistillOptions("full")
                )
                nats[dtype] += float(losses.sum())
        nodes += int(counts.sum())
    assert found["float32"]["kl_per_node"] == 0
    for dtype in bench.STORED:
        assert found[dtype]["kl_per_node"] == pytest.approx(nats[dtype] / nodes, rel=1e-3)
    if not is_coarse:
        assert 0 < 10 * found["float16"]["kl_per_node"] < found["int8"]["kl_per_node"] < 1e-2


def test_a_storage_that_keeps_nothing_is_seen_in_every_column(trained, monkeypatch):
    good = run(trained, "--repeats", "1")
    monkeypatch.setattr(bench.pl, "pack_soft", lambda x, dtype: bytes(len(x) * soft_row_bytes(DIM, dtype)))
    bad = run(trained, "--repeats", "1")
    assert rows_of(bad)["float32"]["wer"] == rows_of(good)["float32"]["wer"]
    largest = float(bad["part"].split()[-1])
    for dtype in bench.STORED:
        row, before = rows_of(bad)[dtype], rows_of(good)[dtype]
        assert row["wer"] != before["wer"] and row["compared"]["difference"] != 0
        assert row["compared"]["difference"] == pytest.approx(row["wer"] - rows_of(bad)["float32"]["wer"])
        assert row["kl_per_node"] > 100 * before["kl_per_node"]
        assert row["largest_error"] == pytest.approx(largest, rel=1e-2)


def test_ways_take_turns_and_each_turn_is_timed(trained, monkeypatch):
    calls, read = [], bench.read
    monkeypatch.setattr(bench, "read", lambda *a: calls.append(a[1][0]["dtype"]) or read(*a))
    ticks = itertools.count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))  # a second between two calls
    found = rows_of(run(trained, "--repeats", "3"))
    num_batches = len(encoded(trained)[1])
    assert calls == num_batches * [*bench.STORED, *3 * bench.STORED]  # the first ones to warm up
    for row in found.values():
        assert row["seconds_of_turns"] == [num_batches] * 3
        assert row["audio_s_per_s"] == pytest.approx(sum(DURATIONS_S) / num_batches)
        assert row["times_as_fast"] == 1


def test_speeds_are_of_the_median_turn():
    made = bench.Bench.__new__(bench.Bench)
    made.nodes = 1
    made.storages = {
        "float32": bench.Storage([8.0, 6.0, 40.0], utterances=[("a", ["x"], ["x"])]),
        "int8": bench.Storage([2.0, 1.0, 4.0], utterances=[("a", ["x"], [])]),
    }
    row = made.row("int8", 24.0)
    assert (row["audio_s_per_s"], row["times_as_fast"]) == (12.0, 6.0)  # 24 / 2; of 4, 6 and 10
    assert (made.row("float32", 24.0)["audio_s_per_s"], row["compared"]["difference"]) == (3.0, 100.0)


def test_table_and_json_say_the_same(trained, tmp_path, monkeypatch, capsys):
    path = tmp_path / "soft.json"
    options = arguments(trained, "--repeats", "2", "--json", path, "--chunk-size", "4", "--beam-size", "2")
    monkeypatch.setattr(sys, "argv", ["bench_soft_targets.py", *options])
    monkeypatch.setattr(bench, "setup_logging", lambda: None)
    bench.main()
    printed, result = capsys.readouterr().out, json.loads(path.read_text())
    lines = printed.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("storage"))
    for line, row in zip(lines[header + 1 : header + 4], result["rows"]):
        cells = line.split()
        assert cells[:3] == [row["storage"], f"{row['mb_per_hour']:.2f}", f"{row['wer']:.2f}"]
        assert cells[-3:] == [
            f"{row['kl_per_node']:.1e}", f"{row['largest_error']:.1e}", f"{row['audio_s_per_s']:.0f}",
        ]  # fmt: skip
        if row["compared"]:
            assert cells[3] == f"{row['compared']['difference']:+.2f}"
            assert cells[7] == f"{row['compared']['p_value']:.3f}"
    faster = [f"{row['storage']} {row['times_as_fast']:.1f}" for row in result["rows"][1:]]
    assert f"page cache: {' and '.join(faster)} times as fast" in lines[-1]
    assert len({len(line) for line in lines[header : header + 4]}) == 1  # columns are in line
    assert "chunk 4, beam 2" in result["part"] and "dev, 10 utterances, 10.8 s" in result["part"]
    assert "epoch-1-avg-1 of teacher, D=8" in printed and "1 threads" in printed
    assert result["command"].startswith("tools/bench_soft_targets.py --exp-dir")
    assert list(tmp_path.glob("*soft*")) == [path]


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_hypotheses_without_a_token_have_one_node_a_frame(trained, backend):
    loaded = build.load_model(trained / "exp")
    loaded.config.loss.backend = backend
    with torch.no_grad():
        loaded.model.joiner.output_linear.bias[0] = 25.0
    made = bench.Bench(loaded, 0, 4, 1)
    batch, _, lens = max(encoded(trained)[1], key=lambda found: len(found[2]))
    made.add(batch)
    assert made.nodes == int(lens.sum()) and len(lens) > 1
    assert all(hyp == [] for _, _, hyp in made.storages["int8"].utterances)
    assert abs(made.storages["int8"].divergence) < 1e-6


def test_a_teacher_that_is_not_finite(trained):
    loaded = build.load_model(trained / "exp")
    with torch.no_grad():
        loaded.model.joiner.output_linear.bias[0] = float("nan")
    batch = encoded(trained)[1][0][0]
    with pytest.raises(UserError, match=f"cut {batch.cut_ids[0]}: no finite score as float32"):
        bench.Bench(loaded, 0, 4, 1).add(batch)


@pytest.mark.parametrize(
    "options,named",
    [
        (["--part", "silent"], "part silent has no transcripts"),
        (["--part", "nowhere"], "cuts_nowhere.jsonl.gz does not exist"),
        (["--part", "unlabelled"], "too little for one encoder frame"),
        (["--exp-dir", "nowhere"], "no experiment folder nowhere"),
        (["--epoch", "7"], "epoch-7.pt"),
    ],
)
def test_what_cannot_be_measured_is_an_error_that_says_why(trained, options, named):
    with pytest.raises(UserError, match=named):
        run(trained, *options)


@pytest.mark.parametrize(
    "options,named",
    [
        (["--repeats", "0"], "--repeats 0 must be greater than 0"),
        (["--threads", "0"], "--threads 0 must"),
        (["--max-duration", "nan"], "--max-duration nan must"),
        (["--epoch", "-1", "--use-averaged-model"], "--epoch -1 is best-valid.pt"),
    ],
)
def test_senseless_options(trained, capsys, options, named):
    with pytest.raises(SystemExit):
        bench.parse_arguments(arguments(trained, *options))
    assert named in capsys.readouterr().err.splitlines()[-1]
