"""Somebody else's transducer as a teacher: a TorchScript file as icefall exports it, behind our interface.

icefall's jit_script.pt and cpu_jit.pt are scripted modules with the parts encoder, decoder and joiner (the
joiner with encoder_proj and decoder_proj), and mostly simple_am_proj and simple_lm_proj. Their features are
ours (data/features.py): 80 log-mel bins up to 7,600 Hz with the natural logarithm, Povey window, samples in
[-1, 1], 10 ms frames, from kaldifeat or lhotse.

Shapes: N batch, T feature frames, C mel bins, T' encoder frames, U tokens, E encoder_dim, D decoder_dim, J
joiner_dim, V vocabulary.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transducer_kd.config import EncoderConfig
from transducer_kd.log import UserError
from transducer_kd.models.decoder import BLANK_ID
from transducer_kd.models.subsampling import subsampled_lens

_PROBE_FRAMES = 100
_PROBE_TOKENS = 5

# On a GPU TorchScript's optimiser compiles kernels for the shapes that it meets, and every batch differs.
_as_written = torch.jit.optimized_execution(False)


def load_scripted(path: Path, device: Any = "cpu") -> ScriptedTransducer:
    """The teacher in a TorchScript file, in eval, on `device`.

    Raises UserError that names the file when it is not there, is no TorchScript that this torch can load, or
    cannot serve as a teacher (see ScriptedTransducer).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not there; teacher.torchscript names a jit_script.pt or cpu_jit.pt")
    try:
        with warnings.catch_warnings():
            # New torch calls TorchScript deprecated, which whoever was given such a file cannot change.
            warnings.simplefilter("ignore", DeprecationWarning)
            scripted = torch.jit.load(str(path), map_location=device)
    except (RuntimeError, ValueError) as e:
        raise UserError(
            f"{path} is no TorchScript file that torch {torch.__version__} can load ({_last_line(e)}); "
            "export the model with --jit 1, and with a torch no newer than this one"
        ) from None
    return ScriptedTransducer(scripted, str(path), device)


class ScriptedTransducer(nn.Module):
    """What distillation needs of a Transducer: encode, decode_labels, joiner, vocab_size, simple_am_proj and
    simple_lm_proj (None where the file has none), las (always None).

    Raises UserError with `origin` for a missing part, a joiner that cannot take projected inputs, an encoder
    that wants more than features and lengths (a streaming export), a blank other than 0, and parts or
    features that do not fit together, which a second of made-up features shows.
    """

    blank_id = BLANK_ID
    las = None

    def __init__(self, scripted: nn.Module, origin: str, device: Any = "cpu") -> None:
        super().__init__()
        _check_parts(scripted, origin)
        self.encoder = scripted.encoder
        self.decoder = scripted.decoder
        self.joiner = ScriptedJoiner(scripted.joiner)
        self.simple_am_proj: Optional[nn.Module] = getattr(scripted, "simple_am_proj", None)
        self.simple_lm_proj: Optional[nn.Module] = getattr(scripted, "simple_lm_proj", None)
        self._decoder_options = _padding_option(self.decoder)
        self._left_padding = 0
        self.eval()
        try:
            # A decoder without need_pad may return fewer rows than it got tokens: the caller pads.
            num_rows = self.decode_labels(torch.zeros(1, _PROBE_TOKENS - 1, device=device)).size(1)
            self._left_padding = max(0, _PROBE_TOKENS - num_rows)
            num_frames, num_rows, self.vocab_size = self._probe(device)
        except Exception as e:  # foreign code: it may raise anything
            raise UserError(
                f"{origin}: {_PROBE_FRAMES} feature frames and {_PROBE_TOKENS} tokens do not go through "
                f"encoder, decoder and joiner: {_last_line(e)}"
            ) from None
        expected = subsampled_lens(_PROBE_FRAMES)
        if abs(num_frames - expected) > 2:
            raise UserError(
                f"{origin}: the encoder makes {num_frames} frames of {_PROBE_FRAMES}, ours makes {expected}; "
                "a teacher has to subsample by 4 too"
            )
        if num_rows != _PROBE_TOKENS:
            raise UserError(f"{origin}: the decoder returns {num_rows} rows for {_PROBE_TOKENS} tokens")

    @_as_written
    def encode(self, x: Tensor, x_lens: Tensor, chunk_size: Optional[int] = None) -> Tuple[Tensor, Tensor]:
        """(N, T, C), (N,) -> encoder_out (N, T', E), encoder_out_lens (N,) int64.

        T has to be the largest of x_lens (icefall's encoders assert it). T' may be another one than ours by a
        frame or two. chunk_size has to be None: how much the encoder sees is fixed in the file.
        """
        if chunk_size is not None:
            raise ValueError(f"a scripted encoder has its own chunk_size, got {chunk_size}")
        # By position, because older recipes name them x and x_lens, newer ones features and feature_lengths.
        # Some return their states too.
        encoder_out, encoder_out_lens = self.encoder(x, x_lens)[:2]
        return encoder_out, encoder_out_lens.to(torch.int64)

    @_as_written
    def decode_labels(self, y: Tensor) -> Tensor:
        """Labels y (N, U), padded, without blanks -> decoder_out (N, U+1, D); row u has seen u labels."""
        y = F.pad(y.to(torch.int64), (1 + self._left_padding, 0), value=self.blank_id)
        return self.decoder(y, **self._decoder_options)

    @torch.no_grad()
    def _probe(self, device: Any) -> Tuple[int, int, int]:
        """T', U+1 and V of a second of features and some tokens."""
        x = torch.zeros(1, _PROBE_FRAMES, EncoderConfig().feature_dim, device=device)
        encoder_out, _ = self.encode(x, torch.tensor([_PROBE_FRAMES], device=device))
        decoder_out = self.decode_labels(torch.zeros(1, _PROBE_TOKENS - 1, device=device))
        logits = self.joiner(encoder_out.unsqueeze(2), decoder_out.unsqueeze(1))
        return logits.size(1), logits.size(2), logits.size(3)


class ScriptedJoiner(nn.Module):
    """Our Joiner's interface over a scripted one."""

    def __init__(self, joiner: nn.Module) -> None:
        super().__init__()
        self.joiner = joiner
        self._options = {"project_input": False} if "project_input" in _arguments(joiner) else {}

    @property
    def encoder_proj(self) -> nn.Module:
        return self.joiner.encoder_proj

    @property
    def decoder_proj(self) -> nn.Module:
        return self.joiner.decoder_proj

    @_as_written
    def forward(self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool = True) -> Tensor:
        """encoder_out (N, T', S, E) and decoder_out (N, T', S, D), both (N, T', S, J) with project_input
        False -> logits (N, T', S, V). Leading dimensions may be 1 in one of them.
        """
        if project_input:
            encoder_out, decoder_out = self.encoder_proj(encoder_out), self.decoder_proj(decoder_out)
        # icefall's joiners assert two or four dimensions, the first ones also equal shapes.
        return self.joiner(*torch.broadcast_tensors(encoder_out, decoder_out), **self._options)


def _check_parts(scripted: nn.Module, origin: str) -> None:
    joiner = getattr(scripted, "joiner", None)
    parts = [(name, scripted) for name in ("encoder", "decoder", "joiner")]
    parts += [(name, joiner) for name in ("encoder_proj", "decoder_proj")]
    missing = [name for name, owner in parts if not isinstance(getattr(owner, name, None), nn.Module)]
    if missing:
        raise UserError(
            f"{origin} has no {', '.join(missing)}; a teacher is a scripted transducer as icefall exports it"
        )
    names = _arguments(scripted.encoder)
    needed = [name for name, (_, has_default) in names.items() if not has_default]
    if len(names) < 2 or len(needed) > 2:
        raise UserError(
            f"{origin}: the encoder takes {', '.join(needed)}, not features and lengths alone; give a file "
            "that was exported for whole utterances, not for streaming"
        )
    # A joiner that projects by itself would project a second time, unnoticed where the widths agree.
    if "project_input" not in _arguments(joiner) and "encoder_proj" in joiner.code:
        raise UserError(
            f"{origin}: the joiner always projects its inputs; it needs icefall's argument project_input"
        )
    blank_id = getattr(scripted.decoder, "blank_id", BLANK_ID)
    if blank_id != BLANK_ID:
        raise UserError(f"{origin}: the blank is token {blank_id}, not {BLANK_ID}; its tokens are not ours")


def _arguments(module: nn.Module) -> Dict[str, Tuple[str, bool]]:
    """Name -> (type, whether it has a default) of the arguments of a scripted module's forward, {} where it
    has none.
    """
    schema = getattr(getattr(module, "forward", None), "schema", None)
    arguments: List[Any] = schema.arguments[1:] if schema is not None else []
    return {a.name: (str(a.type), a.has_default_value()) for a in arguments}


def _padding_option(decoder: nn.Module) -> Dict[str, Any]:
    """How to ask a decoder to pad on the left as in training: by need_pad, in some recipes a tensor."""
    kind = _arguments(decoder).get("need_pad", ("", False))[0]
    return {"need_pad": torch.tensor([True]) if kind == "Tensor" else True} if kind else {}


def _last_line(error: BaseException) -> str:
    """What went wrong, in the last line of TorchScript's tracebacks, short enough for a line of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()[:200]
