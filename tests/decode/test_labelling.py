"""local/pseudo_label.py end to end on a tiny untrained model: however the work is shared, interrupted and
taken up again, the same labels come out, and nothing is done twice.
"""

import importlib.util
import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording

from transducer_kd import build, log
from transducer_kd.config import TeacherConfig
from transducer_kd.data import pseudo_labels
from transducer_kd.data.label_set import Filters
from transducer_kd.data.pseudo_labels import load_pseudo_labels, read_soft_targets
from transducer_kd.data.tokenizer import train_bpe
from transducer_kd.decode import evaluate, labelling
from transducer_kd.log import UserError
from transducer_kd.train import ddp

sys.path.insert(0, str(Path(__file__).parent))
from tiny_teacher import DURATIONS_S, TEXTS, write_part, write_phases  # noqa: E402

PROGRAM = Path(__file__).resolve().parents[2] / "local" / "pseudo_label.py"
NUM_UNITS = 6
# Of the labels of this untrained model some are kept and some dropped.
FILTERS = ["--min-confidence", "0.1", "--max-token-rate", "2", "--max-repeats", "1"]
WORK = ["--max-duration", "3", "--unit-hours", "0.0006", "--num-threads", "1"]
INT8 = ["--soft", "int8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """fbank/, lang/, and two phases of one model with other weights, exp/ and exp_other/."""
    folder = tmp_path_factory.mktemp("trained")
    write_phases(folder)
    return folder


def load_program():
    spec = importlib.util.spec_from_file_location("pseudo_label_program", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.setup_logging = lambda **options: None
    return program


def arguments(trained, folder, *options):
    given = ["--exp-dir", trained / "exp", "--parts", "unlabelled", "--output-dir", folder]
    return [str(a) for a in [*given, *WORK, *FILTERS, *options]]


@pytest.fixture
def label(trained):
    """label(folder, *options) runs the program."""
    program = load_program()
    return lambda folder, *options: program.main(arguments(trained, folder, *options))


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """The labels that one process makes in one go, int8."""
    folder = tmp_path_factory.mktemp("alone") / "labels"
    assert load_program().main(arguments(trained, folder, *INT8)) == 0
    return folder


def read_units(folder):
    """Labels of all units in order, without what took how long."""
    lines = [line for path in sorted((folder / "units").glob("*.jsonl")) for line in path.open()]
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def content(folder):
    """Everything that training reads, byte for byte; and the units."""
    soft = sorted(f"units/{p.name}" for p in (folder / "units").glob("*.soft"))
    names = ["cuts.jsonl.gz", "dropped.jsonl", *soft]
    return {name: (folder / name).read_bytes() for name in names}, read_units(folder)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def count_searches(monkeypatch):
    """-> a list that gets the number of utterances of each search."""
    found, search = [], labelling.modified_beam_search

    def counting(model, encoder_out, encoder_out_lens, beam):
        found.append(len(encoder_out_lens))
        return search(model, encoder_out, encoder_out_lens, beam)

    monkeypatch.setattr(labelling, "modified_beam_search", counting)
    return found


# ---------------------------------------------------------------- what the labels are


def test_labels_are_those_of_decoding_the_part(alone, trained):
    """evaluate.py has its own way from the cuts to the search; the batches are the same."""
    loaded = build.load_model(trained / "exp")
    data = build.build_data(loaded.config.data, loaded.tokenizer)
    short = f"unlabelled-{len(DURATIONS_S) - 1}"
    batches = [
        [c for c in batch if c.id != short]
        for batch in pseudo_labels.batches_by_duration(data._load_part("unlabelled"), 3.0, "unlabelled")
    ]
    assert len(batches) >= NUM_UNITS
    soft = {c.id: c.custom["soft"] for c in load_pseudo_labels(alone, trained / "fbank")}
    labels = {x["id"]: x for x in read_units(alone)}
    assert labels.pop(short)["text"] == ""
    checked = 0
    cpu, options = torch.device("cpu"), evaluate.SearchOptions()
    for batch in (data._plain_dataset()[0, cuts] for cuts in batches if cuts):
        decoder = evaluate.PartDecoder(loaded.model, loaded.tokenizer, [batch].copy, options, cpu)
        (encoded,) = decoder._encoded()
        (result,) = decoder.decode(["modified_beam_search"])
        for (cut_id, _, words), nbest in zip(result.utterances, decoder._beams(encoded)):
            label = labels.pop(cut_id)
            assert label["text"].split() == words
            assert (label["score"], label["num_tokens"]) == (nbest[0].score, len(nbest[0].tokens))
            assert label["confidence"] == math.exp(label["score"] / label["num_tokens"])
        for cut_id, out, frames in zip(batch.cut_ids, *encoded.out):
            if cut_id in soft:
                expected = out[:frames].numpy()
                found = read_soft_targets(alone, soft[cut_id])
                step = np.abs(expected).max(axis=1, keepdims=True) / 127 * 1.002
                assert found.shape == (int(frames), 8) and np.all(np.abs(found - expected) <= step / 2)
                checked += 1
    assert not labels and checked == len(soft) >= 5


def test_what_the_folder_says_of_the_labels(alone, trained):
    run, summary = json.loads((alone / "run.json").read_text()), summary_of(alone)
    loaded = build.load_model(trained / "exp")
    teacher = TeacherConfig(kind="exp_dir", exp_dir=str(trained / "exp"), use_averaged_model=False)
    origin = build.build_teacher(teacher, loaded.tokenizer)[1]
    assert run["teacher"] == summary["teacher"] == origin and origin["checkpoint"] == "epoch-1-avg-1"
    assert (run["bpe_sha256"], run["soft"], run["dim"]) == (loaded.tokenizer.sha256, "int8", 8)
    assert (run["beam_size"], run["chunk_size"], run["max_duration_s"]) == (4, 0, 3.0)
    counts = {reason: count["cuts"] for reason, count in summary["dropped"].items()}
    assert summary["kept"]["cuts"] + sum(counts.values()) == len(DURATIONS_S)
    assert counts["empty"] == 1 and counts["confidence"] > 0 and summary["kept"]["cuts"] >= 5
    assert summary["soft"]["bytes"] == sum(p.stat().st_size for p in (alone / "units").glob("*.soft"))
    # 25 frames a second of 8 + 2 bytes, less what the ends of short utterances lose.
    assert 0.8 * 0.9 < summary["soft"]["mb_per_hour"] < 0.9 and summary["label_wer"]["all"] > 0
    assert summary["audio_s"] == pytest.approx(sum(DURATIONS_S)) and summary["seconds"] > 0
    assert len(list((alone / "units").glob("*.jsonl"))) == NUM_UNITS


def test_several_parts_make_one_set(label, trained, tmp_path):
    label(tmp_path, "--parts", "other,unlabelled", "--min-confidence", "0")
    cuts = load_pseudo_labels(tmp_path, trained / "fbank")
    assert [c.id for c in cuts[:3]] == ["other-0", "other-1", "unlabelled-0"]
    assert cuts[1].load_features().shape == (120, 80) and summary_of(tmp_path)["part"] == "other,unlabelled"
    label(tmp_path, "--parts", " other, unlabelled,,other", "--min-confidence", "0")  # the same, and no other
    labeller = labelling.Labeller(build.load_model(trained / "exp"), chunk_size=0)
    with pytest.raises(UserError, match="part other: cut other-0 was there before"):
        labeller.load_parts(trained / "fbank", ["other", "unlabelled", "other"])


def test_without_soft_targets_the_labels_are_the_same(alone, label, tmp_path, trained, capsys):
    label(tmp_path)
    assert not list((tmp_path / "units").glob("*.soft")) and summary_of(tmp_path)["soft"] is None
    assert [{**x, "soft": None} for x in read_units(alone)] == read_units(tmp_path)
    assert "soft" not in load_pseudo_labels(tmp_path, trained / "fbank")[0].custom
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1][:2] == ["kept", str(summary_of(tmp_path)["kept"]["cuts"])] and len(rows) == 6


# ---------------------------------------------------------------- sharing, stopping, going on


@pytest.mark.parametrize(
    "shards", [["0/2", "1/2"], ["2/3", "0/3", "1/3"], ["5/8", *(f"{i}/8" for i in range(8))]]
)
def test_shards_in_any_order_make_the_labels_of_one_job(alone, label, tmp_path, shards):
    for shard in shards:
        label(tmp_path, *INT8, "--shard", shard)
        units = len(list((tmp_path / "units").glob("*.jsonl")))
        assert (tmp_path / "summary.json").exists() == (units == NUM_UNITS)
    assert content(tmp_path) == content(alone)
    assert summary_of(tmp_path)["sha256"] == summary_of(alone)["sha256"]


def test_another_sharding_goes_on_from_the_units_that_are_there(alone, label, tmp_path, monkeypatch):
    label(tmp_path, *INT8, "--shard", "1/2")
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "units").iterdir()}
    assert len(done) == NUM_UNITS
    searches = count_searches(monkeypatch)
    label(tmp_path, *INT8, "--shard", "2/3")
    assert len(searches) == 2  # the batches of unit 2; unit 5 is there
    label(tmp_path, *INT8)
    labelled = [json.loads(line) for p in done if p.suffix == ".jsonl" for line in p.open()]
    assert sum(searches) == len(DURATIONS_S) - 1 - sum(x["frames"] > 0 for x in labelled)
    before = len(searches)
    assert {p: p.stat().st_mtime_ns for p in done} == done and content(tmp_path) == content(alone)
    label(tmp_path, *INT8)
    assert len(searches) == before  # nothing was left to do


def test_what_another_job_has_done_meanwhile_is_not_done_again(alone, label, tmp_path, monkeypatch):
    write, wrote = pseudo_labels.write_unit, []

    def other_is_faster(folder, k, labels, soft):
        wrote.append(k)
        write(folder, k, labels, soft)
        if k == 1:  # while this job was in unit 1
            for name in ("00003.soft", "00003.jsonl"):
                shutil.copy(alone / "units" / name, folder / "units" / name)

    monkeypatch.setattr(pseudo_labels, "write_unit", other_is_faster)
    label(tmp_path, *INT8)
    assert wrote == [0, 1, 2, 4, 5] and content(tmp_path) == content(alone)


def test_every_process_leaves_the_group(label, tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(ddp, "cleanup", lambda: left.append(True))
    label(tmp_path)
    with pytest.raises(UserError, match="frozen with other filters"):
        label(tmp_path, "--min-confidence", "0")
    assert len(left) == 2


def test_ranks_of_torchrun_share_a_shard(alone, label, tmp_path, monkeypatch):
    did = []
    for shard in (1, 0):
        for rank in (0, 1, 2):
            place = ddp.Processes(rank, 3, torch.device("cpu"))
            monkeypatch.setattr(ddp, "setup", lambda device, place=place: place)
            before = {p.stem for p in (tmp_path / "units").glob("*.jsonl")}
            label(tmp_path, *INT8, "--shard", f"{shard}/2")
            did.append(sorted({p.stem for p in (tmp_path / "units").glob("*.jsonl")} - before))
    assert did == [["00003"], ["00004"], ["00005"], ["00000"], ["00001"], ["00002"]]
    assert content(tmp_path) == content(alone)


def test_a_stopped_job_repeats_only_the_unit_it_was_in(alone, label, tmp_path, monkeypatch):
    write, begun = pseudo_labels.write_unit, []

    def stops_at_the_third(folder, k, labels, soft):
        begun.append(k)
        if len(begun) == 3:
            raise KeyboardInterrupt
        write(folder, k, labels, soft)

    monkeypatch.setattr(pseudo_labels, "write_unit", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        label(tmp_path, *INT8)
    assert not (tmp_path / "summary.json").exists()
    label(tmp_path, *INT8)
    assert begun == [0, 1, 2, 2, 3, 4, 5] and content(tmp_path) == content(alone)


def test_kill_9_loses_and_repeats_nothing_that_was_finished(alone, label, trained, tmp_path, monkeypatch):
    """Killed between a unit's soft targets and its labels, with a temporary file open."""
    folder = tmp_path / "labels"
    code = (
        "import os, runpy, sys, time\n"
        "replace = os.replace\n"
        "def slow(source, target):\n"
        "    if str(target).endswith('00002.jsonl'): print('now', flush=True); time.sleep(60)\n"
        "    replace(source, target)\n"
        "os.replace = slow\n"
        f"sys.argv = {[str(PROGRAM), *arguments(trained, folder, *INT8)]!r}\n"
        f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "now"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {p.name: p.stat().st_mtime_ns for p in (folder / "units").iterdir()}
    done = [f"0000{k}.{kind}" for k in (0, 1) for kind in ("jsonl", "soft")]
    (leftover,) = set(left) - {*done, "00002.soft"}
    assert leftover.startswith(".00002.jsonl.") and leftover.endswith(".tmp")
    units, write = [], pseudo_labels.write_unit
    monkeypatch.setattr(pseudo_labels, "write_unit", lambda *a: (units.append(a[1]), write(*a)))
    label(folder, *INT8)
    assert units == [2, 3, 4, 5] and content(folder) == content(alone)
    assert all((folder / "units" / name).stat().st_mtime_ns == left[name] for name in done)
    assert not list(folder.rglob("*.tmp"))


# ---------------------------------------------------------------- filters, refusals


def test_other_filters_decode_nothing(label, tmp_path, monkeypatch):
    label(tmp_path)
    first = summary_of(tmp_path)
    monkeypatch.setattr(labelling, "modified_beam_search", None)
    label(tmp_path)
    assert summary_of(tmp_path) == first
    with pytest.raises(
        UserError, match=r"frozen with other filters \(min_confidence: 0.1 -> 0.0\).*--refilter"
    ):
        label(tmp_path, "--min-confidence", "0")
    unit = tmp_path / "units" / "00003.jsonl"
    lines = unit.read_bytes()
    unit.unlink()
    with pytest.raises(UserError, match="frozen with other filters"):  # before the unit is done again
        label(tmp_path, "--min-confidence", "0")
    unit.write_bytes(lines)
    label(tmp_path, "--min-confidence", "0", "--refilter")
    assert summary_of(tmp_path)["kept"]["cuts"] > first["kept"]["cuts"]
    assert summary_of(tmp_path)["filters"] == {**first["filters"], "min_confidence": 0.0}


def test_defaults_are_those_of_the_filters():
    args = vars(load_program().parse_arguments(["--exp-dir", "x", "--parts", "y", "--output-dir", "z"]))
    assert asdict(Filters()) == {name: args[name] for name in asdict(Filters())}


def test_a_folder_of_other_labels_is_refused_before_any_work(alone, label, trained, monkeypatch):
    before = content(alone)
    monkeypatch.setattr(labelling, "modified_beam_search", None)
    for options, words in (
        (["--exp-dir", trained / "exp_other"], r"teacher.sha256: [0-9a-f]{12} -> [0-9a-f]{12}\)"),
        (["--parts", "other"], r"cuts_sha256: .*, part: unlabelled -> other"),
        (["--beam-size", "2"], r"\(beam_size: 4 -> 2\)"),
        (["--chunk-size", "4"], r"\(chunk_size: 0 -> 4\)"),
        (["--soft", "float16"], r"\(soft: int8 -> float16\)"),
        (["--max-duration", "5"], r"\(max_duration_s: 3.0 -> 5.0\)"),
        (["--unit-hours", "1"], r"\(unit_hours: 0.0006 -> 1.0\)"),
    ):
        with pytest.raises(UserError, match=words):
            label(alone, *INT8, *options)
    assert content(alone) == before


def test_what_cannot_work_is_one_clear_error_and_leaves_nothing(label, trained, tmp_path):
    fbank, lang = tmp_path / "fbank", tmp_path / "lang"
    fbank.mkdir()
    train_bpe([text.upper() for text in TEXTS], lang, 40)
    cuts = write_part(fbank, "bare", [1.0])
    cuts[0].features = None
    CutSet.from_cuts(cuts).to_file(fbank / "cuts_bare.jsonl.gz")
    cuts = write_part(fbank, "long", [1.0])
    cuts[0].supervisions *= 2
    CutSet.from_cuts(cuts).to_file(fbank / "cuts_long.jsonl.gz")
    for options, words in (
        (["--parts", "third"], "cuts_third.jsonl.gz does not exist.*parts there: empty, other, unlabelled"),
        (["--parts", "empty"], "part empty has no cuts|cuts_empty.jsonl.gz cannot be read"),
        (["--parts", "bare", "--fbank-dir", fbank], "part bare: cut bare-0 has no features; run"),
        (["--parts", "long", "--fbank-dir", fbank], "part long: cut long-0 has 2 supervisions"),
        (["--exp-dir", tmp_path / "no"], "no experiment folder .*no; train the phase first"),
        (["--epoch", "7"], "epoch-7.pt does not exist"),
        (["--lang-dir", lang], "trained with another BPE model than .*lang/bpe.model"),
        (["--min-confidence", "2"], "--min-confidence 2.0 must be from 0 to 1"),
        (["--device", "cuda:99"], "cuda:99"),
    ):
        with pytest.raises(UserError, match=words):
            label(tmp_path / "labels", *options)
    assert not (tmp_path / "labels").exists()


def test_features_that_cannot_be_read_name_the_cut_and_keep_the_units_before(label, tmp_path):
    write_part(tmp_path, "unlabelled", DURATIONS_S)
    path = tmp_path / "feats_unlabelled.f16"
    good = path.read_bytes()
    path.write_bytes(good[: -160 * 30])  # ends in the middle of cut 15
    with pytest.raises(UserError, match="cut unlabelled-15: cannot read its features in .*feats_unlabel"):
        label(tmp_path / "labels", "--fbank-dir", tmp_path)
    assert len(list((tmp_path / "labels" / "units").glob("*.jsonl"))) == 2
    path.write_bytes(good)
    label(tmp_path / "labels", "--fbank-dir", tmp_path)
    assert len(list((tmp_path / "labels" / "units").glob("*.jsonl"))) == NUM_UNITS


def test_a_disk_that_cannot_hold_the_soft_targets_is_seen_before_the_work(label, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "_free_bytes", lambda folder: 100)
    monkeypatch.setattr(labelling, "modified_beam_search", None)
    with pytest.raises(UserError, match="storing the teacher's encoder output needs about .* GB in .*labels"):
        label(tmp_path / "labels", *INT8)


def test_scores_that_are_not_finite_name_the_cut(label, trained, tmp_path):
    content = torch.load(trained / "exp" / "epoch-1.pt")
    for value in (math.nan, math.inf):
        content["model"]["joiner.output_linear.bias"].fill_(value)
        torch.save(content, tmp_path / "epoch-1.pt")
        with pytest.raises(UserError, match="cut unlabelled-[0-9]+: its score is not finite"):
            label(tmp_path / str(value), "--exp-dir", tmp_path)


@pytest.mark.parametrize(
    "option",
    [
        ["--shard", "2/2"], ["--shard", "1"], ["--shard", "-1/2"], ["--shard", "0/0"], ["--soft", "int4"],
        ["--beam-size", "0"], ["--max-duration", "0"], ["--unit-hours", "nan"], ["--epoch", "-2"],
        ["--avg", "0"], ["--chunk-size", "-2"], ["--num-threads", "-1"], ["--epoch", "-1", "--avg", "2"],
        ["--parts", " ,"],
    ],
)  # fmt: skip
def test_senseless_options_are_refused(option, capsys):
    with pytest.raises(SystemExit) as error:
        load_program().main(["--exp-dir", "x", "--parts", "y", "--output-dir", "z", *option])
    assert error.value.code == 2 and option[0] in capsys.readouterr().err.splitlines()[-1]


def test_features_are_computed_on_the_fly_where_the_teacher_was_trained_so(trained, tmp_path):
    rng, cuts = np.random.default_rng(0), []
    for i in range(3):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(16000 + 800 * i), 16000)
        recording = Recording.from_file(path)
        cuts.append(MonoCut(f"fly-{i}", 0.0, recording.duration, 0, [], None, recording))
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts_fly.jsonl.gz")
    loaded = build.load_model(trained / "exp")
    loaded.config.data.on_the_fly_feats = True
    labeller = labelling.Labeller(loaded, chunk_size=0)
    units = pseudo_labels.work_units(labeller.load_parts(tmp_path, ["fly"]), "fly", 10.0, 1.0)
    labeller.label_units(tmp_path / "labels", units, range(len(units)))
    labels = read_units(tmp_path / "labels")
    assert sorted((x["id"], x["frames"]) for x in labels) == [("fly-0", 24), ("fly-1", 25), ("fly-2", 26)]
