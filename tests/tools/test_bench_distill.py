"""tools/bench_distill.py: that every step is measured, and that table, ratios and JSON say the same."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from transducer_kd.log import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = ROOT / "tools/bench_distill.py"
CONF = ROOT / "egs/librispeech/two_pass/conf/smoke"

spec = importlib.util.spec_from_file_location("bench_distill", PROGRAM)
bench_distill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_distill)

TINY = "--device cpu --threads 1 --batch 2 --frames 40 --tokens 8 --vocab 20 --joiner-dim 16".split()
MODELS = ["--student", str(CONF / "student.yaml"), "--teacher", str(CONF / "teacher.yaml")]


def bench(*options):
    command = [sys.executable, str(PROGRAM), *TINY, *MODELS, *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_losses_in_all_steps(tmp_path):
    path = tmp_path / "cost.json"
    done = bench("--part", "losses", "--repeats", "2", "--utterances-at-once", "1", "9", "--json", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    rows = {row["step"]: row for row in result["rows"]}
    # K is never more than the batch, and the largest comes first.
    assert list(rows) == ["plain", "teacher", "pruned_kd", "full_kd@2", "full_kd@1"]
    assert [len(row["seconds_of_runs"]) for row in rows.values()] == [2, 2, 2, 1, 1]
    assert all(row["seconds"] > 0 and row["peak_bytes"] >= 0 for row in rows.values())
    # 2 x 40 x 9 x 20 logits of 4 bytes, of both models: one utterance's less is the least that pieces save.
    assert rows["full_kd@2"]["peak_bytes"] > 2 * 40 * 9 * 20 * 4

    found = {ratio["name"]: ratio for ratio in result["ratios"]}
    time = found["time: pruned_kd / (plain + teacher)"]
    runs = {name: row["seconds_of_runs"] for name, row in rows.items()}
    turns = [runs["pruned_kd"][i] / (runs["plain"][i] + runs["teacher"][i]) for i in range(2)]
    expected = sum(turns) / 2  # the median of two
    assert time["value"] == pytest.approx(expected) and time["limit"] == 1.3
    memory = found["memory: pruned_kd / full_kd@2"]
    expected = rows["pruned_kd"]["peak_bytes"] / rows["full_kd@2"]["peak_bytes"]
    assert memory["value"] == pytest.approx(expected) and memory["limit"] == 0.1
    assert [name for name, ratio in found.items() if ratio["limit"]] == [time["name"], memory["name"]]

    for name in [*rows, *found]:
        assert f"\n{name} " in done.stdout
    for word in ("tools/bench_distill.py --device cpu", "1 threads", "'vocab': 20"):
        assert word in done.stdout
    assert str(tmp_path.parent) not in result["machine"]


@pytest.mark.parametrize("form,weighting", [("full", "uniform"), ("collapsed", "occupancy")])
def test_the_whole_model_learns_in_every_step_but_the_teachers(form, weighting):
    args = bench_distill.get_parser().parse_args(
        [*TINY, *MODELS, "--form", form, "--weighting", weighting, "--backend", "torch"]
    )
    sizes = bench_distill.Sizes(2, 40, 8, 20, 16, 5)
    bench = bench_distill.Bench(args, sizes)
    for name, learns in {"plain": True, "teacher": False, "pruned_kd": True, "full_kd@1": True}.items():
        bench.clear()
        bench.step(name)()
        gradients = [p.grad for p in bench.student.parameters()]
        assert all(g is not None for g in gradients) if learns else not any(g is not None for g in gradients)
        assert all(p.grad is None for p in bench.frozen.module.parameters())


def test_the_peak_grows_with_the_lattice():
    sizes = ["--frames", "200", "--tokens", "100", "--vocab", "60"]
    peaks = {}
    for name in ("pruned_kd", "full_kd@2"):
        done = bench("--part", "losses", *sizes, "--measure-peak-of", name)
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout)
    logits = 2 * 200 * 101 * 60 * 4
    assert peaks["full_kd@2"] > 2 * logits and peaks["full_kd@2"] > 2 * peaks["pruned_kd"]


def test_ratios_of_what_was_measured():
    assert (
        bench_distill.ratios({"teacher": [1.0], "full_kd@4": [8.0]}, {"teacher": 0, "full_kd@4": 8}, 4) == []
    )
    # Three turns of which one was disturbed on one side, and a machine that was half as fast in another.
    runs = {"plain": [2.0, 4.0, 2.0], "pruned_kd": [3.0, 6.0, 9.0]}
    found = bench_distill.ratios(runs, {"plain": 4, "pruned_kd": 8}, 4)
    assert found == [
        {"name": "time: pruned_kd / plain", "value": 1.5, "limit": None},
        {"name": "memory: pruned_kd / plain", "value": 2.0, "limit": None},
    ]


def test_a_missed_requirement_is_said():
    result = {
        **dict.fromkeys(("command", "machine", "sizes", "compared"), "?"),
        "rows": [],
        "ratios": [
            {"name": name, "value": value, "limit": 1.3} for name, value in (("good", 1.3), ("bad", 1.31))
        ],
    }
    good, bad = bench_distill.table(result).splitlines()[-2:]
    assert good.split() == ["good", "1.300", "meets", "<=", "1.3"]
    assert bad.split() == ["bad", "1.310", "MISSES", "<=", "1.3"]


@pytest.mark.parametrize(
    "options,named",
    [
        (["--tokens", "41"], "--frames 40 must be at least --tokens 41"),
        (["--repeats", "0"], "'0' is not a whole number above 0"),
        (["--student", "nowhere.yaml", "--steps", "plain"], "nowhere.yaml"),
    ],
)
def test_wrong_options_are_errors_that_say_what_to_do(options, named):
    done = bench(*options)
    assert done.returncode != 0 and named in done.stderr and "Traceback" not in done.stderr


def test_a_lattice_that_does_not_fit_is_refused():
    sizes = bench_distill.Sizes(10**6, 250, 60, 500, 512, 5)
    with pytest.raises(UserError, match="full_kd@1000000 needs about .* GB are free.*--utterances-at-once"):
        bench_distill._check_memory(10**6, sizes, "cpu")
