"""Tiny models with random weights, sharp enough that a search emits tokens, and the folders exported from
them.
"""

import pytest
import torch

from transducer_kd.config import DecoderConfig, EncoderConfig, LasConfig, ModelConfig
from transducer_kd.data.tokenizer import train_bpe
from transducer_kd.export.write import write_folder
from transducer_kd.models.transducer import Transducer

TEXTS = ["turn on the light", "play the song", "stop", "what time is it", "turn off the radio"]


def tiny_model(vocab_size, chunk_size=4, with_las=False, seed=0, **encoder):
    torch.manual_seed(seed)
    sizes = dict(subsampling_channels=4, num_layers=2, encoder_dim=16, num_heads=2, feedforward_dim=32)
    sizes.update(cnn_module_kernel=7, dropout=0.0, chunk_size=chunk_size, left_context=8)
    las = LasConfig(enabled=with_las, decoder_dim=16, attention_dim=16, num_heads=2)
    model = Transducer(
        ModelConfig(EncoderConfig(**{**sizes, **encoder}), DecoderConfig(decoder_dim=12), 20, las), vocab_size
    )
    with torch.no_grad():
        for parameter in model.parameters():  # else the norms and biases of all layers are the same
            parameter.add_(0.02 * torch.randn(parameter.shape))
        model.joiner.output_linear.weight.mul_(6.0)
        model.joiner.output_linear.bias[0] = 4.0
    return model.eval()


@pytest.fixture(scope="session")
def lang_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lang")
    train_bpe(TEXTS, folder, 40)
    return folder


def _exported(model, lang_dir, path, rescore=None):
    about = {"recipe": "two_pass", "corpus": "synthetic", "scale": "smoke", "phase": path.name}
    about.update(checkpoint="epoch-1", commit="abc", command="local/export.py", bpe_sha256="0" * 64)
    return write_folder(path, model, model, model.state_dict(), lang_dir, about, rescore)[0].path


@pytest.fixture(scope="session")
def streaming_model():
    return tiny_model(40)


@pytest.fixture(scope="session")
def offline_model():
    return tiny_model(40, chunk_size=0)


@pytest.fixture(scope="session")
def las_model():
    return tiny_model(40, with_las=True)


@pytest.fixture(scope="session")
def streaming_folder(streaming_model, lang_dir, tmp_path_factory):
    """The folder's path; copy it before you change it."""
    return _exported(streaming_model, lang_dir, tmp_path_factory.mktemp("exported") / "streaming")


@pytest.fixture(scope="session")
def offline_folder(offline_model, lang_dir, tmp_path_factory):
    return _exported(offline_model, lang_dir, tmp_path_factory.mktemp("exported") / "offline")


@pytest.fixture(scope="session")
def las_folder(las_model, lang_dir, tmp_path_factory):
    rescore = {"method": "modified_beam_search_las_rescore", "mu": 0.6, "length_weight": 0.2, "beam_size": 4}
    rescore["rescore_nbest"] = 0
    return _exported(las_model, lang_dir, tmp_path_factory.mktemp("exported") / "las", rescore)
