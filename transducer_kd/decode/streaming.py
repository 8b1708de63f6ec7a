"""Greedy decoding of a streaming model the way a device does it: chunk by chunk, with caches.

Shapes: N streams, T feature frames, C mel bins, T' encoder frames.
"""

from typing import Any, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F

from transducer_kd.decode.greedy import GreedySearcher, Hypothesis
from transducer_kd.log import UserError
from transducer_kd.models.subsampling import LOOKAHEAD_FRAMES, SUBSAMPLING_FACTOR, subsampled_lens


@torch.inference_mode()
def streaming_greedy_search(
    model: Any,
    x: torch.Tensor,
    x_lens: torch.Tensor,
    chunk_size: Optional[int] = None,
    max_sym_per_frame: int = 1,
) -> List[Hypothesis]:
    """x (N,T,C), x_lens (N,) -> one hypothesis per stream.

    chunk_size: encoder frames of a chunk; None: what the model was trained with.
    All streams start together; one that ends early idles until the longest ends. The hypotheses are those of
    `greedy_search` on the encoder's masked full-sequence output with the same chunk size.
    A supernet needs LoadedModel.in_mode first: its encoder alone knows no masks.
    Raises UserError for a model without a chunk size, ValueError for a supernet.
    """
    if hasattr(model, "masks"):
        raise ValueError("a supernet's encoder would stream with all its weights: take Supernet.plain()")
    chunk_size = model.encoder.cfg.chunk_size if chunk_size is None else chunk_size
    if chunk_size <= 0:
        raise UserError(
            "streaming decoding needs a chunk size, but this model was trained with full context "
            "(model.encoder.chunk_size=0); pass --chunk-size, e.g. 16, or leave streaming_greedy_search out"
        )
    state = model.encoder.streaming_init(x.size(0), x.device)
    searcher = GreedySearcher(model, x.size(0), x.device, max_sym_per_frame)
    for chunk, lens in chunks(x, x_lens, chunk_size):
        encoder_out, encoder_out_lens, state = model.encoder.streaming_forward(chunk, lens, state)
        searcher.advance(encoder_out, encoder_out_lens)
    return searcher.results()


def chunks(
    x: torch.Tensor, x_lens: torch.Tensor, chunk_size: int
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """What Conformer.streaming_forward is given, call after call: (N,4*chunk_size+3,C), lens (N,)."""
    advance = SUBSAMPLING_FACTOR * chunk_size
    num_chunks = -(-int(subsampled_lens(x_lens).max()) // chunk_size)
    tail = num_chunks * advance + LOOKAHEAD_FRAMES - x.size(1)
    x = F.pad(x, (0, 0, 0, max(0, tail)))
    for start in range(0, num_chunks * advance, advance):
        end = start + advance + LOOKAHEAD_FRAMES
        yield x[:, start:end], (x_lens - start).clamp(min=0, max=end - start)
