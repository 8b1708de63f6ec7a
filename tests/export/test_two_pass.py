"""Two passes over the files choose what PyTorch chooses."""

import json
import shutil

import pytest
import torch

from tests.data.test_features import speechlike
from tests.export.folders import without_words
from transducer_kd.data.features import FeatureExtractor
from transducer_kd.data.tokenizer import Tokenizer
from transducer_kd.decode.beam_search import modified_beam_search
from transducer_kd.decode.rescore import Weights, score_nbests
from transducer_kd.export.folder import open_folder
from transducer_kd.export.sherpa import SherpaStreaming, padded
from transducer_kd.export.two_pass import TwoPassRecogniser
from transducer_kd.log import UserError

LENGTHS = [1, 160, 2560, 9000, 20000, 33333, 50000]


def chosen(model, folder, samples):
    """PyTorch's n-best list with the scores of the second pass, and the hypothesis that wins."""
    x = torch.from_numpy(FeatureExtractor("lhotse").extract(padded(samples, folder)))[None]
    rescore = folder.rescore
    with torch.inference_mode():
        encoded = model.encode(x, torch.tensor([x.size(1)]))
        nbests = modified_beam_search(model, *encoded, rescore["beam_size"])
        (scored,) = score_nbests(model.las, *encoded, nbests, rescore["rescore_nbest"])
    return scored, scored.best(Weights(rescore["mu"], rescore["length_weight"]))


@pytest.mark.parametrize("mode", ["streaming", "offline"])
def test_equals_pytorch(las_folder, las_model, mode):
    folder = open_folder(las_folder)
    recogniser, tokenizer, changed_by_las = TwoPassRecogniser(folder, mode=mode), Tokenizer(las_folder), 0
    for num_samples in LENGTHS:
        samples = speechlike(num_samples, seed=num_samples)
        found, (scored, best) = recogniser.decode(samples), chosen(las_model, folder, samples)
        assert [h.tokens for h in found.nbest.hyps] == [h.tokens for h in scored.hyps]
        assert found.nbest.second == pytest.approx(scored.second, rel=1e-4)
        assert found.hyp.tokens == best.tokens
        assert found.words == tokenizer.decode(best.tokens).split()
        changed_by_las += best is not scored.hyps[0]
    assert changed_by_las > 1, "the second pass has changed nothing, and the test asks nothing"


def test_only_the_best_of_the_first_pass_are_scored(las_folder, tmp_path):
    folder = open_folder(with_rescore(las_folder, tmp_path, rescore_nbest=2))
    samples = speechlike(33333)
    few, all_of_them = (TwoPassRecogniser(f).decode(samples) for f in (folder, open_folder(las_folder)))
    assert len(all_of_them.nbest.hyps) == 4 and len(few.nbest.hyps) == 2
    assert few.nbest.second == pytest.approx(all_of_them.nbest.second[:2], rel=1e-5)


def with_rescore(source, tmp_path, **changes):
    target = shutil.copytree(source, tmp_path / "copy")
    info = json.loads((target / "model.json").read_text())
    info["rescore"].update(changes)
    (target / "model.json").write_text(json.dumps(info))
    return target


@pytest.mark.parametrize("piece", [500, 7000])
def test_a_stream_gives_the_same_and_shows_the_first_pass_before(las_folder, piece):
    folder = open_folder(las_folder)
    recogniser, samples = TwoPassRecogniser(folder), speechlike(33333)
    stream, seen = recogniser.stream(), []
    for start in range(0, len(samples), piece):
        stream.accept(samples[start : start + piece])
        seen.append(stream.text())
    stream.finish()
    stream.finish()
    assert stream.result() == recogniser.decode(samples)
    assert stream.final_text() == " ".join(stream.result().words) != ""
    assert stream.text() == " ".join(SherpaStreaming(folder).decode(samples).split())
    assert len(set(seen)) > 3 and all(b.startswith(a) for a, b in zip(seen, seen[1:]))
    with pytest.raises(ValueError, match="over"):
        stream.accept(samples)


@pytest.mark.parametrize("pause_s, expected", [(0.5, True), (5.0, False), (0.0, False)])
def test_a_pause_is_noticed(las_folder, tmp_path, pause_s, expected):
    folder = without_words(las_folder, tmp_path / "silent")
    stream = TwoPassRecogniser(folder, pause_s=pause_s).stream()
    stream.accept(speechlike(24000))
    assert stream.text() == "" and stream.at_pause() == expected


def test_what_a_folder_does_not_have(streaming_folder, las_folder):
    with pytest.raises(UserError, match="has no second pass; leave --two-pass out"):
        TwoPassRecogniser(open_folder(streaming_folder))
    with pytest.raises(UserError, match="no mode 'quick'; it has streaming, offline"):
        TwoPassRecogniser(open_folder(las_folder), mode="quick")
    with pytest.raises(UserError, match="has no decoder.int8.onnx"):
        TwoPassRecogniser(open_folder(las_folder), "int8")
    with pytest.raises(UserError, match="mode offline hears whole utterances"):
        TwoPassRecogniser(open_folder(las_folder), mode="offline").stream()
