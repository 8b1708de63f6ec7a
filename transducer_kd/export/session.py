"""The ONNX files of a model folder in onnxruntime, as a model that the searches of decode/ can run.

What sherpa-onnx does in C++, open to look into: n-best lists, and the encoder frames that a second pass
attends to.

Shapes: N streams or hypotheses, S samples in [-1, 1] at 16 kHz, T feature frames, C mel bins, T' encoder
    frames, J joiner_dim, D encoder_dim, V vocabulary.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import kaldi_native_fbank as knf
import numpy as np
import onnxruntime
import torch
from torch import Tensor

from transducer_kd.export.folder import ModelFolder
from transducer_kd.export.sherpa import FEATURE_DIM, SAMPLING_RATE, SUBSAMPLING_FACTOR
from transducer_kd.log import UserError, one_line
from transducer_kd.models.decoder import BLANK_ID

LOW_FREQ_HZ, HIGH_FREQ_HZ = 20.0, -400.0  # the latter below the Nyquist frequency; as in data/features.py


def load_session(
    path: Path, num_threads: int = 1, content: Optional[bytes] = None
) -> onnxruntime.InferenceSession:
    """Open an ONNX file, or `content` in its place. UserError where it is missing or damaged."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.log_severity_level = 3  # errors
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; export the phase again (local/export.py)")
    try:
        return onnxruntime.InferenceSession(content or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime has an exception of its own for every kind of damage
        raise UserError(
            f"{path} cannot be opened ({one_line(e)}); export the phase again (local/export.py)"
        ) from None


# ---------------------------------------------------------------- features


class FeatureStream:
    """80-bin log-mel features of audio that comes piece by piece; what was taken is forgotten."""

    def __init__(self) -> None:
        options = knf.FbankOptions()
        options.frame_opts.samp_freq = SAMPLING_RATE
        options.frame_opts.dither = 0.0
        options.frame_opts.snip_edges = False
        options.mel_opts.num_bins = FEATURE_DIM
        options.mel_opts.low_freq = LOW_FREQ_HZ
        options.mel_opts.high_freq = HIGH_FREQ_HZ
        self._fbank = knf.OnlineFbank(options)
        self._start = 0

    def accept(self, samples: np.ndarray) -> None:
        """Hear the next samples (S,)."""
        self._fbank.accept_waveform(SAMPLING_RATE, np.asarray(samples, dtype=np.float32))

    def finish(self) -> None:
        """No more audio will come: frames at the end need not wait for what follows them."""
        self._fbank.input_finished()

    def num_ready(self) -> int:
        """Frames that can be taken."""
        return self._fbank.num_frames_ready - self._start

    def take(self, num_frames: int, advance: int) -> np.ndarray:
        """The next frames (num_frames,C). Those that follow begin `advance` frames later."""
        frames = np.zeros((num_frames, FEATURE_DIM), dtype=np.float32)
        for i, row in enumerate(frames):
            row[:] = self._fbank.get_frame(self._start + i)  # a view of what pop frees
        self._fbank.pop(advance)
        self._start += advance
        return frames


def features(samples: np.ndarray) -> np.ndarray:
    """samples (S,) -> (T,C), those of data/features.py within 1e-3."""
    stream = FeatureStream()
    stream.accept(samples)
    stream.finish()
    return stream.take(stream.num_ready(), stream.num_ready())


# ---------------------------------------------------------------- the model


class Encoded(NamedTuple):
    """What an encoder makes of a whole utterance or a chunk."""

    encoder_out: Tensor  # (N,T',J), projected for the joiner
    encoder_out_lens: Tensor  # (N,) int64
    frames: Optional[Tensor]  # (N,T',D), what the second pass attends to; None without a second pass


class StreamState(NamedTuple):
    """What streams carry from chunk to chunk."""

    cached_attn: np.ndarray
    cached_conv: np.ndarray
    processed_lens: np.ndarray  # (N,) int64, feature frames


class OnnxTransducer:
    """Encoder, decoder and joiner files of a folder.

    Has what searches expect of a transducer: blank_id, decoder.init_state and step, joiner with its
    projections. These are the identity, since the encoder and the decoder file have them inside. An encoder
    is opened when it is used first. Raises UserError where the folder has no such precision, or a file is
    damaged.
    """

    blank_id = BLANK_ID

    def __init__(self, folder: ModelFolder, precision: str = "float", num_threads: int = 1):
        self._folder, self._precision, self._num_threads = folder, precision, num_threads
        self.chunk_size = int(folder.info["chunk_size"])
        self.decoder = _Decoder(self.session("decoder"), int(folder.info["context_size"]))
        self.joiner = _Joiner(self.session("joiner"))

    def session(self, part: str) -> onnxruntime.InferenceSession:
        """Open one of the folder's files: see folder.PARTS."""
        return load_session(self._folder.file(part, self._precision), self._num_threads)

    def open(self, mode: str) -> None:
        """Open the encoder of a mode, streaming or offline, now."""
        _ = self._streaming if mode == "streaming" else self._offline

    def encode(self, x: Any, x_lens: Any) -> Encoded:
        """Whole utterances: x (N,T,C), x_lens (N,) int64, arrays or tensors."""
        inputs = {"x": np.asarray(x, dtype=np.float32), "x_lens": np.asarray(x_lens, dtype=np.int64)}
        encoder_out, lens, *frames = _run(self._offline, inputs)
        return Encoded(encoder_out, lens, frames[0] if frames else None)

    def streaming_init(self, num_streams: int) -> StreamState:
        """The state of streams that have heard nothing yet."""
        shapes = {node.name: node.shape for node in self._streaming.get_inputs()}
        attn, conv = (
            np.zeros([*shapes[name][:2], num_streams, shapes[name][3]], dtype=np.float32)
            for name in ("cached_attn", "cached_conv")
        )
        return StreamState(attn, conv, np.zeros(num_streams, dtype=np.int64))

    def streaming_forward(self, x: Any, state: StreamState) -> Tuple[Encoded, StreamState]:
        """The next chunk of every stream: x (N,4*chunk_size+3,C), an array or a tensor."""
        inputs = {"x": np.asarray(x, dtype=np.float32), **state._asdict()}
        encoder_out, attn, conv, *frames = _run(self._streaming, inputs)
        num_streams, num_frames, _ = encoder_out.shape
        encoded = Encoded(encoder_out, torch.full((num_streams,), num_frames), frames[0] if frames else None)
        # Every chunk begins as many frames later as encoder frames came out of it.
        advance = SUBSAMPLING_FACTOR * num_frames
        return encoded, StreamState(attn.numpy(), conv.numpy(), state.processed_lens + advance)

    @cached_property
    def _offline(self) -> onnxruntime.InferenceSession:
        return self.session("encoder-offline")

    @cached_property
    def _streaming(self) -> onnxruntime.InferenceSession:
        return self.session("encoder-streaming")


class _Decoder:
    """The step interface of models/decoder.py over the decoder file."""

    def __init__(self, session: onnxruntime.InferenceSession, context_size: int):
        self._session, self.context_size = session, context_size

    def init_state(self, num: int, device: Any = None) -> Tuple[Tensor, ...]:
        """The tokens before the last one, (N,context_size-1), all -1."""
        return (torch.full((num, self.context_size - 1), -1, dtype=torch.int64),)

    def step(self, y: Tensor, state: Tuple[Tensor, ...]) -> Tuple[Tensor, Tuple[Tensor, ...]]:
        """y (N,) int64, the last tokens -> decoder_out (N,J) and the state for the next step."""
        context = torch.cat([state[0], y.unsqueeze(1)], dim=1)
        (decoder_out,) = _run(self._session, {"y": context.numpy()})
        return decoder_out, (context[:, 1:],)


class _Joiner:
    """The joiner file. Its inputs are projected already."""

    def __init__(self, session: onnxruntime.InferenceSession):
        self._session = session

    def encoder_proj(self, encoder_out: Tensor) -> Tensor:
        return encoder_out

    def decoder_proj(self, decoder_out: Tensor) -> Tensor:
        return decoder_out

    def __call__(self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool = False) -> Tensor:
        """(...,J) and (...,J), of which the leading dimensions broadcast -> logits (...,V)."""
        pair = torch.broadcast_tensors(encoder_out, decoder_out)
        inputs = {
            name: y.reshape(-1, y.size(-1)).numpy() for name, y in zip(("encoder_out", "decoder_out"), pair)
        }
        (logits,) = _run(self._session, inputs)
        return logits.view(*pair[0].shape[:-1], -1)


def _run(session: onnxruntime.InferenceSession, inputs: Dict[str, np.ndarray]) -> List[Tensor]:
    return [torch.from_numpy(y) for y in session.run(None, inputs)]
