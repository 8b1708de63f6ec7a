"""Invented records and phase folders for the tests of reports."""

import json
from pathlib import Path

from transducer_kd.log import write_json

ROOT = Path(__file__).resolve().parents[2]


def record(phase="teacher", test_set="test-clean", method="greedy_search", wer=5.0, **changes):
    made = {
        "recipe": "two_pass", "corpus": "synthetic", "scale": "mini", "phase": phase, "mode": "offline",
        "params_deployed": 1_750_000, "bytes": 7_000_000, "test_set": test_set, "method": method,
        "wer": wer, "wer_low": wer - 1.25, "wer_high": wer + 1.5, "errors": 200, "ref_words": 4000,
        "audio_s": 1200.0, "decode_s": 10.0, "commit": "abc123", "command": f"{ROOT}/local/decode.py",
    }  # fmt: skip
    return {**made, **changes}


TRAIN_LOG = [
    {"kind": "train", "step": 50, "epoch": 1, "loss": 4.0, "audio_s_per_s": 100.0, "elapsed_s": 10.0},
    {"kind": "train", "step": 100, "epoch": 2, "loss": 0.25, "audio_s_per_s": 200.0, "elapsed_s": 40.0},
    {"kind": "valid", "step": 50, "epoch": 1, "loss": 0.5, "pruned_loss": 0.375, "wer": 40.0},
    {"kind": "valid", "step": 100, "epoch": 2, "loss": 0.75, "pruned_loss": 0.625, "wer": 30.0},
]


def write_lines(path, values):
    path.write_text("".join(json.dumps(v) + "\n" for v in values))


def write_done(exp_dir, **ended):
    """run.sh's marks: ended(phase=unix time)."""
    for name, time in ended.items():
        (exp_dir / name / ".done").write_text(f"phase={name} set=\nteacher ended 5\nended {time}.25\n")


def write_phase(exp_dir, name, records, deployed=5, **config):
    """deployed: parameters, as meta.json says; None: it says nothing. config: more of config.json."""
    folder = exp_dir / name
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(records))
    (folder / "config.json").write_text(json.dumps({"corpus": "synthetic", "scale": "mini", **config}))
    write_meta(folder, {}, deployed)
    write_lines(folder / "train_log.jsonl", TRAIN_LOG)
    return folder


def write_meta(folder, came_from, deployed):
    """came_from: {"init" | "teacher" | "labels": origins(...)}"""
    meta = {"commit": "abc123", "command": "local/train.py", "versions": {"torch": "1.13.1"}}
    meta["parameters"] = {} if deployed is None else {"deployed": deployed}
    (folder / "meta.json").write_text(json.dumps({**meta, "origins": came_from}))


def origins(path, **more):
    """One origin, as meta.json names it."""
    return {"path": str(path), "checkpoint": "epoch-5", "sha256": f"of {path.name}", **more}


def write_speed(folder, reference, times_faster, **modes):
    """modes: real-time factors; a chunk takes 500 times as many ms."""
    made = {
        mode: {"rtf": rtf, "chunk_ms_median": None, "chunk_ms_p95": None, "times_faster": times_faster}
        for mode, rtf in modes.items()
    }
    if "streaming" in made:
        rtf = modes["streaming"]
        made["streaming"].update(chunk_ms_median=500 * rtf, chunk_ms_p95=600 * rtf)
    about = {"reference": reference, "num_threads": 1, "audio_s": 20, "command": "local/measure_speed.py"}
    (folder / "speed.json").write_text(json.dumps({**about, "modes": made}))


def write_delay(folder, **changes):
    part = {"mean_frames": 2.25, "low": -0.5, "high": 3.0, "median_frames": 2, "tokens": 9, "utterances": 4}
    made = {
        "reference": {"phase": "teacher", "checkpoint": "epoch-1"}, "checkpoint": "epoch-2",
        "mode": "streaming", "frame_ms": 40, "parts": {"b": part, "elsewhere": part},
    }  # fmt: skip
    (folder / "delay.json").write_text(json.dumps({**made, **changes}))


def write_export(phase_folder, wers, sizes=(8.0, 2.0), modes=("streaming", "offline"), las=None, **more):
    """A model folder that passed the gate. Of each test set `wers` has the WER of PyTorch and of sherpa-onnx
    float; int8 is 0.25 worse. sizes: MB of float and int8, half of them the encoder's.

    las: what the WER is lower with the second pass, None without one. more: other fields of model.json.
    """
    folder = phase_folder / "export"
    folder.mkdir()
    origin = {"commit": "abc123", "command": f"{ROOT}/local/export.py"}
    files = {}
    for ending, size in zip((".onnx", ".int8.onnx"), sizes):
        parts = {**{f"encoder-{mode}": 0.5 for mode in modes}, "decoder": 0.3, "joiner": 0.2}
        parts.update({} if las is None else {"las": 0.1})
        files.update(
            {part + ending: {"sha256": "0", "bytes": int(1e6 * size * x)} for part, x in parts.items()}
        )
    model = {**origin, "phase": phase_folder.name, "checkpoint": "epoch-2", "files": files, **more}
    write_json(folder / "model.json", model)
    words = [
        row
        for test_set, wer in wers.items()
        for mode in modes
        for less in (0.0, *([] if las is None else [las]))
        for row in word_rows(mode, test_set, wer - less, two_pass=less > 0)
    ]
    words_of = {name: "turn it on" for name in ("pytorch", "chunks", "onnx", "int8")}
    gate = {
        **origin, "passed": True, "runtime": "sherpa-onnx 2.0.1", "seconds": 9.0, "least_identical": 0.995,
        "most_worse": 0.3, "least_same_unseen": 0.9, "words": words,
        "tensors": [
            {"part": "las", "output": "score", "max_difference": 1e-6, "limit": 1e-4, "passed": True},
        ],
        "odd": [{"mode": modes[0], "input": "silence", "words": words_of, "same": True, "passed": True}],
    }  # fmt: skip
    write_json(folder / "gate.json", gate)
    return folder


def word_rows(mode, test_set, wer, two_pass=False):
    """Of the gate's word part: int8 is 0.25 worse, and others than PyTorch in 8 of 400 utterances."""
    rows = []
    for name, more, identical in (
        ("pytorch", 0.0, 400),
        ("chunks", 0.0, 400),
        ("onnx", 0.0, 399),
        ("int8", 0.25, 392),
    ):
        rate = {
            "wer": wer + more,
            "wer_low": wer + more - 1,
            "wer_high": wer + more + 1,
            "wer_difference": more,
        }
        counts = {"num_utts": 400, "identical": identical, "identical_share": identical / 400, "passed": True}
        key = {"mode": mode, "implementation": name, "two_pass": two_pass, "test_set": test_set}
        rows.append({**key, **counts, **rate})
    return [row for row in rows if mode == "streaming" or row["implementation"] != "chunks"]


def write_bench(export_folder, times=(1.0, 2.0), smaller=(1.0, 4.0), **changes):
    """times, smaller: how many times faster and smaller float and int8 are than the reference."""
    files, rows = json.loads((export_folder / "model.json").read_text())["files"], []
    for precision, ending, faster, factor in zip(("float", "int8"), (".onnx", ".int8.onnx"), times, smaller):
        stored = sum(files[part + ending]["bytes"] for part in ("encoder-streaming", "decoder", "joiner"))
        minute = {"resident_mb": 60.0, "chunk_ms_median": 12.0 / faster, "chunk_ms_p95": 15.0 / faster}
        rows.append({
            "phase": export_folder.parent.name, "precision": precision, "mode": "streaming", "bytes": stored,
            "rtf": 0.04 / faster, "rtf_model": 0.03 / faster, "times_faster": faster,
            "peak_mb": 70.0, "baseline_mb": 45.5,
            "times_faster_model": faster, "times_smaller": factor, "chunk_ms_median": 12.0 / faster,
            "chunk_ms_p95": 15.0 / faster, "first_minute": minute,
            "last_minute": {**minute, "resident_mb": 60.5},
        })  # fmt: skip
    bench = {
        "reference": "teacher float", "num_threads": 1, "runtime": "sherpa-onnx 2.0.1", "turns": 15,
        "audio_s": 120.0, "stream_s": 300.0, "checkpoint": "epoch-2", "commit": "abc123",
        "command": f"{ROOT}/local/bench_export.py", "rows": rows,
    }  # fmt: skip
    write_json(export_folder / "bench.json", {**bench, **changes})
