"""Invented records and phase folders for the tests of reports."""

import json
from pathlib import Path

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
