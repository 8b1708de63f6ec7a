"""Recipe dual_mode: what its configurations promise, and a run at scale smoke."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from transducer_kd.config import load_config, to_dict

sys.path.insert(0, str(Path(__file__).parent))
from recipe_project import ROOT, Project, copy_project  # noqa: E402

CONF = ROOT / "egs/librispeech/dual_mode/conf"
TRAINED = ["pretrain", "supernet", "supernet_scratch", "offline", "streaming", "prune_after", "dual_dense"]
PHASES = [*TRAINED, "extracted"]
OTHERS = [
    f"{name}{tail}" for tail in ("_s70", "_block", "_block_s70") for name in ("supernet", "prune_after")
]
QUARTER = ["supernet_quarter", "supernet_scratch_quarter"]
BOTH_MODES = ["supernet", "supernet_scratch", "dual_dense"]
DECODED = ["offline", "streaming", "dual_dense", "supernet", "supernet_scratch", "prune_after", "extracted"]


@pytest.fixture(params=["smoke", "mini", "small", "full"])
def phases(request):
    folder = CONF / request.param
    assert sorted(p.stem for p in folder.glob("*.yaml")) == sorted([*PHASES, *OTHERS, *QUARTER])
    return {path.stem: load_config(path) for path in folder.glob("*.yaml")}


class TestConfigurations:
    def test_all_are_one_model_but_for_mode_and_groups(self, phases):
        models = []
        for config in phases.values():
            model = to_dict(config.model)
            del model["pruned_groups"], model["encoder"]["chunk_size"]
            models.append(model)
        assert all(model == models[0] for model in models)
        chunks = {name: config.model.encoder.chunk_size for name, config in phases.items()}
        assert chunks.pop("offline") == 0
        assert len(set(chunks.values())) == 1 and chunks["streaming"] > 0

    def test_controls_have_the_updates_of_what_they_are_compared_with(self, phases):
        whole = [*BOTH_MODES, "offline", "streaming"]
        assert len({phases[name].train.max_steps for name in whole}) == 1
        # prune_after goes on where streaming ended: it has more updates than the supernet, never fewer.
        assert len({phases[name].train.max_steps for name in phases if name.startswith("prune_after")}) == 1
        assert len({phases[name].train.max_steps for name in QUARTER}) == 1

    def test_in_every_phase_of_two_modes_the_offline_mode_teaches_alike(self, phases):
        taught = {name: c.distill for name, c in phases.items() if c.objective == "dual_mode"}
        assert set(taught) >= {*BOTH_MODES, *QUARTER} and taught["supernet"].weight > 0
        for name, distill in taught.items():
            assert 3 * distill.begin_step == phases[name].train.max_steps, name
            assert dataclasses.replace(distill, begin_step=0) == dataclasses.replace(
                taught["supernet"], begin_step=0
            )
        assert all(c.distill.weight == 0 for name, c in phases.items() if name not in taught)

    def test_masks_are_fixed_well_before_the_end(self, phases):
        for name, config in phases.items():
            pruning = config.pruning
            if pruning.sparsity:
                assert pruning.begin_step + pruning.num_steps <= 0.7 * config.train.max_steps, name

    def test_sparsity_and_groups_are_what_the_names_say(self, phases):
        for name in ["supernet", "prune_after", *OTHERS]:
            config = phases[name]
            assert config.pruning.sparsity == (0.7 if "_s70" in name else 0.5)
            assert config.model.pruned_groups == ("block8x1" if "_block" in name else "unit")
        assert phases["dual_dense"].model.pruned_groups == "none"
        assert all(phases[name].data.train_share == 0.25 for name in QUARTER)

    def test_with_and_without_pretraining_differ_in_the_beginning_of_the_masks_alone(self, phases):
        for with_it, without in (("supernet", "supernet_scratch"), QUARTER):
            one, other = to_dict(phases[with_it]), to_dict(phases[without])
            for config in (one, other):
                del config["phase"], config["compare_with"]
                # What was pretrained has masks already; both have their last ones from the same update on.
                pruning = config["pruning"]
                pruning["end"] = pruning.pop("begin_step") + pruning.pop("num_steps")
                del pruning["initial_sparsity"]
            assert one == other

    def test_all_but_pretraining_hear_the_same_silence(self, phases):
        probs = {name: config.data.silence_prob for name, config in phases.items()}
        assert probs.pop("pretrain") == 0.0 and set(probs.values()) == {0.1}

    def test_every_phase_that_is_compared_with_is_there(self, phases):
        for config in phases.values():
            assert set(config.compare_with) < set(phases)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A copy in which stages 0 to 6 have run."""
    project = Project(copy_project(tmp_path_factory.mktemp("dual_mode") / "project"), "dual_mode")
    project.needs_environment()
    project.output = project.run()
    return project


def records_of(smoke, phase):
    return json.loads((smoke.exp / phase / "metrics.json").read_text())


class TestWholeRun:
    """In this order: the last tests change what is there."""

    def test_every_phase_is_made_decoded_and_reported(self, smoke):
        stages = smoke.stages()
        assert (
            sorted(stages[2 : 1 + len(PHASES)]) == sorted(TRAINED) and stages[1 + len(PHASES)] == "extracted"
        )
        smoke.check_order(TRAINED)
        decoded = [f"decode {phase}" for phase in DECODED]
        assert stages[2 + len(PHASES) :] == [*decoded, "emission delays", "speed", "report"]
        for name in ("report.html", "RESULTS.md"):
            assert (smoke.exp / name).stat().st_size > 0, name
        assert not (smoke.exp / "pretrain/metrics.json").exists()

    def test_two_modes_are_decoded_in_both(self, smoke):
        parts = ("test-clean", "test-other")
        whole = {(p, m, "offline") for p in parts for m in ("greedy_search", "modified_beam_search")}
        streaming = {(p, m, "streaming") for p, m, _ in whole}
        streaming |= {(p, "streaming_greedy_search", "streaming") for p in parts}
        for phase in DECODED:
            found = {(r["test_set"], r["method"], r["mode"]) for r in records_of(smoke, phase)}
            expected = {"offline": whole}.get(phase, streaming | (whole if phase in BOTH_MODES else set()))
            assert found == expected, phase

    def test_chunk_by_chunk_is_decoded_with_the_masks(self, smoke):
        """A supernet that streams says what its extracted model says; so does the whole utterance at once."""
        for method in ("modified_beam_search", "streaming_greedy_search"):
            said = {}
            for phase in ("supernet", "extracted"):
                (record,) = (
                    r for r in records_of(smoke, phase)
                    if (r["test_set"], r["method"], r["mode"]) == ("test-clean", method, "streaming")
                )  # fmt: skip
                said[phase] = (record["errors"], record["params_deployed"], record["bytes"])
            assert said["supernet"] == said["extracted"]

    def test_origins(self, smoke):
        assert smoke.origins("supernet") == {"init": "pretrain"}
        assert smoke.origins("prune_after") == {"init": "streaming"}
        meta = json.loads((smoke.exp / "extracted/meta.json").read_text())
        assert Path(meta["origins"]["init"]["selected_from"]["path"]).name == "supernet"
        for phase in ("pretrain", "supernet_scratch", "offline", "streaming", "dual_dense"):
            assert smoke.origins(phase) == {}

    def test_pretraining_hears_the_unlabelled_part_and_reports_its_codebooks(self, smoke):
        config = json.loads((smoke.exp / "pretrain/config.json").read_text())
        assert config["data"]["train_parts"] == ["train", "unlabelled"]
        results = (smoke.exp / "RESULTS.md").read_text()
        assert "perplexity" in results and "chance" in results

    def test_speed_is_measured_against_the_dense_streaming_model(self, smoke):
        for phase in ("streaming", "supernet", "extracted"):
            speed = json.loads((smoke.exp / phase / "speed.json").read_text())
            assert speed["reference"] == "streaming" and speed["num_threads"] == 1
            assert speed["modes"]["streaming"]["times_faster"] > 0
        selection = json.loads((smoke.exp / "extracted/selection.json").read_text())
        assert selection["largest_difference"] < 1e-5

    def test_the_same_command_again_only_makes_the_report(self, smoke):
        before = smoke.stages()
        output = smoke.run()
        assert output.count("done already") == 2 + len(PHASES) + len(DECODED) + 2
        assert smoke.stages() == [*before, "report"]

    def test_each_mode_is_exported_as_it_is(self, smoke):
        smoke.run("--stage", "7")
        both = ("streaming", "offline")
        smoke.check_exports(dict.fromkeys(["streaming", "supernet", "extracted"], both))
        bytes_of = {}
        for phase in ("supernet", "extracted"):
            files = json.loads((smoke.exp / phase / "export/model.json").read_text())["files"]
            bytes_of[phase] = files["encoder-streaming.onnx"]["bytes"]
        assert bytes_of["extracted"] < bytes_of["supernet"], "what is left out is left out of the file"

    def test_a_supernet_that_was_stopped_goes_on_with_its_masks(self, smoke):
        long = ("--stage", "3", "--stop-stage", "3", "--set", "supernet:train.max_steps=100000")
        smoke.stop_in("stage-3-supernet.log", ("max_steps=100000", "Epoch 3"), *long)
        output = smoke.stop_in("stage-3-supernet.log", ("resumed from",), *long)
        assert "Stage 3: supernet" in output
        # What was made of the earlier supernet is of no use any more.
        assert "extracted began with or learnt from what was made anew" in smoke.run("--stage", "6")

    def test_controls_name_more_phases(self, smoke):
        output = smoke.run("--controls", "--stage", "6", "--set", "nothere:train.max_steps=1", status=1)
        assert all(name in output for name in (*OTHERS, *QUARTER))
