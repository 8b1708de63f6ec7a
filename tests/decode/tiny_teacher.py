"""A tiny untrained teacher with something to label."""

import numpy as np
import torch
from lhotse import CutSet, MonoCut, SupervisionSegment

from transducer_kd.config import PhaseConfig, to_dict
from transducer_kd.data.features import FeatureFileWriter
from transducer_kd.data.tokenizer import train_bpe
from transducer_kd.models.transducer import Transducer
from transducer_kd.train.checkpoint import save_checkpoint

TEXTS = ["turn on the light", "play the song", "stop", "what time is it", "turn off the radio"]
DURATIONS_S = [*(round(0.4 + 0.1 * i, 1) for i in range(16)), 0.05]  # the last is too short for any text


def write_part(fbank_dir, part, durations, seed=0):
    rng = np.random.default_rng(seed)
    cuts = []
    with open(fbank_dir / f"feats_{part}.f16", "wb") as f:
        writer = FeatureFileWriter(f, f"feats_{part}.f16")
        for i, duration in enumerate(durations):
            cut_id = f"{part}-{i}"
            matrix = rng.normal(-8, 4, size=(round(100 * duration), 80)).astype(np.float32)
            said = SupervisionSegment(cut_id, cut_id, 0.0, duration, text=TEXTS[i % len(TEXTS)])
            features = writer.write(matrix, cut_id, 0.0, duration)
            cuts.append(MonoCut(cut_id, 0.0, duration, 0, [said], features))
    CutSet.from_cuts(cuts).to_file(fbank_dir / f"cuts_{part}.jsonl.gz")
    return cuts


def tiny_model(config, vocab_size, seed):
    """Random weights, sharp enough that a search has something to choose from."""
    torch.manual_seed(seed)
    model = Transducer(config.model, vocab_size)
    with torch.no_grad():
        model.joiner.output_linear.weight.mul_(4.0)
        model.joiner.output_linear.bias[0] = 6.0
    return model


def write_phases(folder):
    """fbank/, lang/, and two phases of one model with other weights, exp/ and exp_other/."""
    (folder / "fbank").mkdir()
    tokenizer = train_bpe(TEXTS, folder / "lang", 40)
    write_part(folder / "fbank", "unlabelled", DURATIONS_S)
    write_part(folder / "fbank", "other", [1.0, 1.2])
    write_part(folder / "fbank", "empty", [])
    config = PhaseConfig()
    config.data.fbank_dir, config.data.lang_dir = str(folder / "fbank"), str(folder / "lang")
    encoder = config.model.encoder
    encoder.num_layers, encoder.encoder_dim, encoder.feedforward_dim, encoder.num_heads = 1, 8, 16, 2
    encoder.subsampling_channels = 2
    config.model.decoder.decoder_dim = config.model.joiner_dim = 8
    for seed, name in enumerate(("exp", "exp_other")):
        model = tiny_model(config, tokenizer.vocab_size, seed)
        content = {"model": model.state_dict(), "config": to_dict(config), "bpe_sha256": tokenizer.sha256}
        save_checkpoint(folder / name / "epoch-1.pt", content)
