"""Models of two modes: sizes, speeds and comparisons mode by mode, what was extracted, the pretraining."""

import json
import re
import sys
from pathlib import Path

import pytest

from transducer_kd.decode.compare import pairs
from transducer_kd.log import UserError
from transducer_kd.report import collect, html, plots, summaries, systems, tables, text

sys.path.insert(0, str(Path(__file__).parent))
from made_up import (  # noqa: E402
    origins,
    record,
    write_delay,
    write_lines,
    write_meta,
    write_phase,
    write_speed,
)

WHOLE, LAYERS, LEFT = 1_000_000, 800_000, 680_000  # parameters: all, of the layers, without what units hold
DENSE = {"params_deployed": WHOLE, "bytes": 4 * WHOLE, "index_bytes": 0, "params_dense": WHOLE}
UNITS = {**DENSE, "params_deployed": LEFT, "bytes": 4 * LEFT}
BLOCKS = {**DENSE, "params_deployed": 600_000, "bytes": 2_437_500, "index_bytes": 37_500}
SMALL = {**UNITS, "params_dense": LEFT, "params_layers": LEFT - WHOLE + LAYERS}
# phase: ({mode: (WER, size)}, updates, begins with, compare_with, more of its configuration)
PHASES = {
    "pre": ({}, 4000, "", [], {"objective": "wav2vec2"}),
    "full": ({"offline": (8.0, DENSE)}, 6000, "", [], {}),
    "stream": ({"streaming": (10.0, DENSE)}, 6000, "", [], {}),
    "cut": ({"streaming": (12.5, BLOCKS)}, 3000, "stream", ["stream"], {}),
    "both": (
        {"offline": (8.4, DENSE), "streaming": (10.5, DENSE)}, 6000, "", ["full", "stream"],
        {"objective": "dual_mode"},
    ),
    "net": (
        {"offline": (8.2, DENSE), "streaming": (11.0, UNITS)}, 6000, "pre", ["cut", "both", "full", "stream"],
        {"objective": "dual_mode"},
    ),
    "alone": ({"streaming": (11.0, SMALL)}, 0, "net", ["net"], {}),
}  # fmt: skip
MASKS = {"pre": ("unit", 0.5), "cut": ("block8x1", 0.7), "net": ("unit", 0.5)}
VALID = {
    "kind": "valid", "step": 4000, "loss": 3.0, "accuracy_offline": 0.625, "accuracy_streaming": 0.5,
    "chance": 0.125, "perplexity_0": 40.25, "perplexity_1": 33.5,
}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """The recipe as it is run; net computes offline what full does, streaming with the half of its units."""
    exp = tmp_path / "dual_mode" / "exp" / "synthetic-mini"
    for name, (rates, updates, init, compare_with, config) in PHASES.items():
        decoded = [
            record(name, s, method, rate + more, mode=mode, **{"params_layers": LAYERS, **size})
            for mode, (rate, size) in rates.items()
            for s in ("a", "b")
            for method, more in (("modified_beam_search", 0.0), ("greedy_search", 0.5))
        ]
        groups, sparsity = MASKS.get(name, ("none", 0))
        config = {
            "objective": "transducer", "compare_with": compare_with, "pruning": {"sparsity": sparsity},
            "model": {"pruned_groups": groups, "encoder": {"num_layers": 4}}, **config,
            "wav2vec2": {"num_distractors": 99, "num_entries": 64},
        }  # fmt: skip
        folder = write_phase(exp, name, decoded, **config)
        came_from = {"init": origins(exp / init)} if init else {}
        if name == "alone":
            came_from = {"init": origins(folder, selected_from=origins(exp / "net"))}
        write_meta(folder, came_from, LEFT if name == "alone" else WHOLE)
        write_lines(folder / "train_log.jsonl", [{"kind": "train", "step": updates, "loss": 1.0}])
    (exp / "pre" / "metrics.json").unlink()
    (exp / "alone" / "train_log.jsonl").unlink()
    write_lines(exp / "pre" / "train_log.jsonl", [{"kind": "train", "step": 4000, "loss": 5.0}, VALID])
    return exp


def column(rows, name):
    at = rows[0].index(name)
    return {row[0]: row[at] for row in rows[1:]}


def test_every_phase_says_what_it_is_and_nothing_is_missed_that_cannot_be(root):
    report = collect.collect(root)
    assert {p["name"]: p["what"] for p in report["phases"]} == {
        "pre": "wav2vec 2.0, 50 % of units left out",
        "full": "transducer",
        "stream": "transducer",
        "cut": "stream finetuned, 70 % of 8x1 blocks left out",
        "both": "transducer in both modes",
        "net": "transducer in both modes on the encoder of pre, 50 % of units left out",
        "alone": "streaming mode of net by itself",
    }
    # What is compared with most others is no control, though alone is compared with it.
    controls = {p["name"] for p in report["phases"] if p["role"] == "control"}
    assert controls == {"full", "stream", "cut", "both"}
    found = {p["name"]: (p["begins_with"], p["is_extracted"]) for p in report["phases"]}
    assert found["alone"] == ("net", True) and found["net"] == ("pre", False)
    of_corpus, of_stages = "the description of the synthetic corpus", "stage times"
    assert [m for m in report["missing"] if not m.startswith((of_corpus, of_stages))] == []
    for name in ("cut", "net"):
        (root / name / "train_log.jsonl").unlink()
    (root / "cut" / "metrics.json").unlink()
    assert {
        "phase cut has not been decoded (no metrics.json)",
        "the training log of phase cut (no train_log.jsonl)",
        "the training log of phase net (no train_log.jsonl)",
    } <= set(collect.collect(root)["missing"])
    # Weights that were selected of another phase and then trained have another folder than their own.
    meta = json.loads((root / "alone" / "meta.json").read_text())
    meta["origins"]["init"]["path"] = str(root / "init" / "alone")
    (root / "alone" / "meta.json").write_text(json.dumps(meta))
    (alone,) = [p for p in collect.collect(root)["phases"] if p["name"] == "alone"]
    assert not alone["is_extracted"] and alone["what"] == "4 layers selected of net"


@pytest.mark.parametrize(
    "section, value, told",
    [
        ("data", {"train_share": 0.25}, "25 % of the speech"),
        ("distill", {"weight": 1.0, "frame_shift": 0}, "in-place distillation"),
        (
            "distill",
            {"weight": 1.0, "frame_shift": 2, "begin_step": 2000},
            "in-place distillation from update 2,000 on, frame shift 2",
        ),
    ],
)
def test_phases_say_what_is_special_of_them(root, section, value, told):
    config = json.loads((root / "both" / "config.json").read_text())
    (root / "both" / "config.json").write_text(json.dumps({**config, section: value}))
    what = {p["name"]: p["what"] for p in collect.collect(root)["phases"]}
    assert what["both"] == f"transducer in both modes, {told}"


def test_systems_have_the_size_speed_and_delay_of_their_mode(root):
    write_delay(root / "net")
    write_speed(root / "stream", "stream", 1.0, streaming=0.02, offline=0.01)
    write_speed(root / "alone", "stream", 1.25, streaming=0.016, offline=0.009)
    write_speed(root / "net", "stream", None, offline=0.0125)
    report = collect.collect(root)
    rows = systems.side_by_side_rows(report)
    assert rows[0][2:] == [
        "a first pass %", "b first pass %", "parameters", "float32 MB", "updates",
        "b emission delay, frames [95 %] (ms)", "x faster than stream, one thread (RTF)", "x real time",
    ]  # fmt: skip
    assert [row[0] for row in rows[1:]] == [
        "both (offline)", "both (streaming)", "full (offline)", "stream (streaming)", "cut (streaming)",
        "net (offline)", "net (streaming)", "alone (streaming)",
    ]  # fmt: skip
    cells = {row[0]: row[2:-1] for row in rows[1:]}
    assert cells["full (offline)"] == ["8.00", "8.00", "1.00 M", "4.0", "6,000", "-", "-"]
    assert cells["cut (streaming)"] == ["12.50", "12.50", "0.60 M", "2.4", "3,000 (9,000)", "-", "-"]
    timed = "- (0.0125)"
    assert cells["net (offline)"] == ["8.20", "8.20", "1.00 M", "4.0", "6,000 (10,000)", "-", timed]
    delay = "2.25 [-0.50, 3.00] (90)"
    assert cells["net (streaming)"] == ["11.00", "11.00", "0.68 M", "2.7", "6,000 (10,000)", delay, "-"]
    assert cells["alone (streaming)"][2:] == ["0.68 M", "2.7", "0 (10,000)", "-", "1.25 (0.0160)"]
    assert cells["stream (streaming)"][-1] == "1.00 (0.0200)"
    notes = systems.side_by_side_notes(report)
    assert systems.SIZE_NOTE in notes and "as the first teacher" not in " ".join(notes)
    assert "on one utterance of 20 s at a time" in notes[-1] and "only what was extracted" in notes[-1]
    facts = {row[0]: row[1] for row in tables.provenance_rows(report)}
    assert facts["alone: made by"].startswith("commit abc123") and "alone: trained by" not in facts
    assert facts["alone: speed by"] == "commit unknown, local/measure_speed.py"
    assert column(tables.results_rows(report), "parameters")["cut"] == "0.60 M"


@pytest.mark.parametrize(
    "changes",
    [{"modes": {"offline": {}}}, {"modes": []}, {"reference": None}, {"num_threads": "1"}, {"audio_s": None}],
)
def test_a_damaged_speed_is_named(root, changes):
    write_speed(root / "net", "stream", 1.0, offline=0.02)
    path = root / "net" / "speed.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=r"net/speed\.json: not what local/measure_speed\.py writes"):
        collect.collect(root)


def test_modes_by_hand(root, no_figures, tmp_path):
    write_speed(root / "alone", "stream", 1.25, streaming=0.016)
    report = collect.collect(root)
    (made,) = summaries.summaries(report)
    assert made.rows[0] == [
        "phase", "mode", "left out", "parameters", "MB", "a WER %", "b WER %", "dense control", "a relative",
        "b relative", "ms a chunk",
    ]  # fmt: skip
    by_mode = {tuple(row[:2]): row[2:5] + row[6:] for row in made.rows[1:]}
    rate = "{:.2f} [{:.2f}, {:.2f}]".format
    assert by_mode == {
        (name, mode): [left_out, *size, rate(wer, wer - 1.25, wer + 1.5), control, relative, relative, chunk]
        for name, mode, left_out, size, wer, control, relative, chunk in (
            ("both", "offline", "0.0 %", ("1.00 M", "4.00"), 8.4, "full", "+5.0 %", "-"),
            ("both", "streaming", "0.0 %", ("1.00 M", "4.00"), 10.5, "stream", "+5.0 %", "-"),
            ("full", "offline", "0.0 %", ("1.00 M", "4.00"), 8.0, "-", "-", "-"),
            ("stream", "streaming", "0.0 %", ("1.00 M", "4.00"), 10.0, "-", "-", "-"),
            ("cut", "streaming", "50.0 %", ("0.60 M", "2.44"), 12.5, "stream", "+25.0 %", "-"),
            # Of what net names cut has masks, and both is dense, of either mode, and before full and stream.
            ("net", "offline", "0.0 %", ("1.00 M", "4.00"), 8.2, "both", "-2.4 %", "-"),
            ("net", "streaming", "40.0 %", ("0.68 M", "2.72"), 11.0, "both", "+4.8 %", "-"),
            ("alone", "streaming", "40.0 %", ("0.68 M", "2.72"), 11.0, "both", "+4.8 %", "8.00 (9.60)"),
        )
    }
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    text.update_block(readme, report)
    pages = html.render(report, ""), text.markdown_section(report), text.terminal_report(report)
    for page in (*pages, readme.read_text()):
        assert summaries.MODES_TITLE in page and "Relative: WER relative to" in " ".join(page.split())
        assert "+4.8 %" in page


def test_records_from_before_there_were_modes_are_read(root):
    for name in PHASES:
        path = root / name / "metrics.json"
        old = [r for r in json.loads(path.read_text())] if path.exists() else []
        for r in old:
            for field in ("index_bytes", "params_dense", "params_layers"):
                del r[field]
        path.write_text(json.dumps(old))
    report = collect.collect(root)
    assert set(column(summaries.mode_rows(report), "left out").values()) == {"-"}
    assert column(systems.side_by_side_rows(report), "parameters")["net (streaming)"] == "1.00 M"
    damaged = [record("full", params_dense="many")]
    (root / "full" / "metrics.json").write_text(json.dumps(damaged))
    with pytest.raises(UserError, match="record 1: params_dense is 'many', not of type int"):
        collect.collect(root)


def test_other_experiments_have_no_modes(root):
    for name in ("pre", "cut", "both", "net", "alone"):
        (root / name).rename(root / f"{name}.old-20260101-000000")
    report = collect.collect(root)
    assert summaries.summaries(report) == [] and len(summaries.mode_rows(report)) == 1
    assert len(tables.pretraining_rows(report)) == 1
    page = html.render(report, "")
    assert summaries.MODES_TITLE not in page and "Pretraining" not in page
    assert "offline mode" not in " ".join(tables.training_rows(report)[0])


def test_comparisons_are_made_and_named_mode_by_mode(root):
    report = collect.collect(root)
    rates = {"difference": -1.0, "low": -2.0, "high": -0.5, "relative": -9.0, "p_value": 0.01}
    names = ("phase", "mode", "method")
    for kind, a, b in pairs(report["phases"], report["records"]):
        sides = {f"{name}_{side}": r[name] for side, r in (("a", a), ("b", b)) for name in names}
        report["comparisons"].append({"kind": kind, "test_set": b["test_set"], **rates, **sides})
    (made,) = systems.comparison_tables(report, is_short=True)
    assert sorted(tuple(row[:3]) for row in made["rows"][1:]) == sorted(
        (name, other, f"first pass, {mode}")
        for mode, compared in (
            ("offline", ["both full", "net both", "net full"]),
            ("streaming", ["both stream", "cut stream", "net cut", "net both", "net stream", "alone net"]),
        )
        for name, other in map(str.split, compared)
    )
    assert systems.MODES_NOTE not in systems.comparison_notes(report)
    # Where no phase has both modes, only streaming ones are named.
    for c in report["comparisons"]:
        c["mode_a"] = c["mode_b"] = "offline"
    report["records"] = [r for r in report["records"] if r["mode"] == "offline"]
    (made,) = systems.comparison_tables(report, is_short=True)
    assert {row[2] for row in made["rows"][1:]} == {"first pass"}


def test_key_systems_are_with_what_was_extracted_of_them(root):
    labels = [s["label"] for s in systems.key_systems(collect.collect(root))]
    assert labels[-3:] == ["net (offline)", "net (streaming)", "alone (streaming)"] and len(labels) == 8


# Training and figures


def test_the_pretraining_by_hand(root, no_figures):
    report = collect.collect(root)
    assert tables.pretraining_rows(report) == [
        [
            "phase", "updates", "accuracy offline %", "accuracy streaming %", "chance %",
            "1 / (1 + distractors) %", "codebook perplexity",
        ],
        ["pre", "4,000", "62.5", "50.0", "12.5", "1.0", "40.2, 33.5 of 64"],
    ]  # fmt: skip
    for page in (html.render(report, ""), text.markdown_section(report)):
        assert "40.2, 33.5 of 64" in page and "near 1 it has collapsed" in page
    of_one_mode = {name: value for name, value in VALID.items() if name != "accuracy_streaming"}
    write_lines(root / "pre" / "train_log.jsonl", [{"kind": "train", "step": 9, "loss": 5.0}, of_one_mode])
    assert tables.pretraining_rows(collect.collect(root))[1][2:4] == ["62.5", "-"]


def test_training_shows_both_modes_and_not_what_was_extracted(root):
    last = {
        "kind": "valid", "step": 6000, "pruned_loss_streaming": 0.5, "pruned_loss_offline": 0.25,
        "wer": 12.0, "wer_offline": 9.0, "loss": 1.0,
    }  # fmt: skip
    write_lines(root / "net" / "train_log.jsonl", [{"kind": "train", "step": 6000, "loss": 1.0}, dict(last)])
    report = collect.collect(root)
    rows = tables.training_rows(report)
    assert "alone" not in column(rows, "phase")
    assert rows[0][-5:] == [
        "dev pruned_loss", "dev las_loss", "dev WER %", "offline mode: dev pruned_loss",
        "offline mode: dev WER %",
    ]  # fmt: skip
    (net,) = [row for row in rows if row[0] == "net"]
    assert net[-5:] == ["0.500", "-", "12.0", "0.250", "9.0"]
    curves = {p["name"]: p for p in report["phases"]}
    panel = plots.learning_curves(curves["net"]).axes[1]
    assert [(line.get_label(), line.get_xydata().tolist()) for line in panel.lines] == [
        ("streaming", [[6000, 12]]), ("offline", [[6000, 9]]),
    ]  # fmt: skip
    panel = plots.learning_curves(curves["pre"]).axes[1]
    assert {line.get_label(): line.get_ydata().tolist() for line in panel.lines} == {
        "streaming": [50.0], "offline": [62.5], "chance": [12.5],
    }  # fmt: skip


def test_a_point_for_each_phase_and_mode_at_the_size_of_that_mode(root):
    report = collect.collect(root)
    panel = plots.wer_against_size(report).axes[0]
    points = {tuple(line.get_xydata()[0]) for line in panel.lines if line.get_marker() in "soX^v"}
    # Those of one size stand a fortieth of the largest apart.
    dense = [(1 + i / 40, rate) for i, rate in enumerate((8.4, 10.5, 8.0, 10.0, 8.2))]
    expected = [*dense, (0.6, 12.5), (0.68, 11.0), (0.68 + 1 / 40, 11.0)]
    assert sorted(points) == [pytest.approx(point) for point in sorted(expected)]
    labels = re.findall(r"(\w+ \(\w+\))", " ".join(t.get_text() for t in panel.figure.legends[0].get_texts()))
    assert {"net (offline)", "net (streaming)", "cut (streaming)"} <= set(labels) and len(labels) == 8
    page = html.render(report, "")
    assert "Learning curves: alone" not in page and "Learning curves: pre" in page
