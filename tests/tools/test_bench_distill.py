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
    assert "all utterances at once" in memory["requirement"]
    above = {name: row["peak_bytes"] - rows["plain"]["peak_bytes"] for name, row in rows.items()}
    beyond = found["memory above plain: pruned_kd / full_kd@2"]
    assert beyond["value"] == pytest.approx(above["pruned_kd"] / above["full_kd@2"])

    for name in [*rows, *found]:
        assert f"\n{name} " in done.stdout
    printed = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert printed["full_kd@2"][-1] == f"{above['full_kd@2'] / 1e6:.0f}"
    for word in (
        "tools/bench_distill.py --device cpu",
        "1 threads",
        "'vocab': 20",
        "the teacher's simple loss",
    ):
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


@pytest.mark.parametrize("ranges_from", ["student", "teacher"])
def test_the_teachers_bounds_cost_pruned_kd_its_simple_loss_and_no_other_step(ranges_from, monkeypatch):
    args = bench_distill.get_parser().parse_args(
        [*TINY, *MODELS, "--ranges-from", ranges_from, "--backend", "torch", "--part", "losses"]
    )
    bench = bench_distill.Bench(args, bench_distill.Sizes(2, 40, 8, 20, 16, 5))
    simple_loss, calls = bench_distill.pruned_rnnt.simple_loss, []
    monkeypatch.setattr(
        bench_distill.pruned_rnnt, "simple_loss", lambda *a, **k: calls.append(1) or simple_loss(*a, **k)
    )
    counted = {}
    for name in ("plain", "pruned_kd", "full_kd@2"):
        calls.clear()
        bench.step(name)()
        counted[name] = len(calls)
    assert counted == {"plain": 1, "pruned_kd": 1 + (ranges_from == "teacher"), "full_kd@2": 1}


def test_help_says_what_happens_without_an_option():
    text = " ".join(bench_distill.get_parser().format_help().split())
    assert "(default: torch's choice)" in text and "(default teacher)" in text and "16 4 1)" in text
    assert "None" not in text


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
    assert [(ratio["name"], ratio["value"], ratio["limit"]) for ratio in found] == [
        ("time: pruned_kd / plain", 1.5, None),
        ("memory: pruned_kd / plain", 2.0, None),
    ]
    runs, peaks = {**runs, "full_kd@4": [8.0]}, {"plain": 4, "pruned_kd": 8, "full_kd@4": 44}
    found = {ratio["name"]: ratio for ratio in bench_distill.ratios(runs, peaks, 4)}
    assert found["memory: pruned_kd / full_kd@4"]["value"] == pytest.approx(8 / 44)
    assert found["memory above plain: pruned_kd / full_kd@4"]["value"] == pytest.approx(4 / 40)
    assert found["memory above plain: pruned_kd / full_kd@4"]["limit"] is None


def test_a_missed_requirement_is_said():
    result = {
        **dict.fromkeys(("command", "machine", "sizes", "compared"), "?"),
        "rows": [],
        "ratios": [
            {"name": name, "value": value, "limit": 1.3, "requirement": "this to that"}
            for name, value in (("good", 1.3), ("bad", 1.31))
        ],
    }
    lines = [" ".join(line.split()) for line in bench_distill.table(result).splitlines()[-4:]]
    said = "the requirement, at most 1.3: this to that"
    assert lines == ["good 1.300", f"meets {said}", "bad 1.310", f"MISSES {said}"]


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
