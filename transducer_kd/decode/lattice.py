"""Lattices of a transducer, made and searched with k2, and the n-best lists that a second pass scores.

k2's RnntDecodingStreams is a beam search that keeps alternatives (Kang et al., arXiv:2211.00484): at most one
symbol a frame, and hypotheses whose last `context_size` tokens agree share a state, so it needs a stateless
decoder. The lattice has one state per (frame, context); an arc carries a token, or 0 for blank, and its
log-probability; every path from the start to the end passes each frame once, and its scores add up to
log P(alignment | x).

k2 is imported when first needed: programs that never build a lattice run without it.

Shapes: N streams, T' encoder frames, V vocabulary.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, List, Sequence, Tuple

import kaldialign
import torch

from transducer_kd.decode.greedy import Hypothesis
from transducer_kd.log import UserError, atomic_write, one_line

# Log-probability of what may not happen. Finite, so that sums of it stay numbers; any beam prunes it.
_IMPOSSIBLE = -1e10


@dataclass(frozen=True)
class FastBeamSearchConfig:
    """What the search keeps per stream and frame. The defaults are icefall's."""

    beam: float = 20.0  # log-probability below the best state of the frame
    max_contexts: int = 8  # distinct contexts (last tokens)
    max_states: int = 64  # distinct states; with no grammar there is one per context


def _without_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    """No gradients, but no inference mode either: its tensors lack the version counters that k2 reads."""
    return torch.inference_mode(False)(torch.no_grad()(function))


def import_k2() -> Any:
    """The k2 module. UserError, with the mend, where it is missing."""
    try:
        import k2
    except (ImportError, OSError) as e:
        raise UserError(
            f"lattices (fast_beam_search*) need k2, which does not import here ({e}). Use the default "
            "environment (tools/setup.sh), or install the k2 wheel that matches your torch "
            "(tools/check_env.py prints the line), or decode with greedy_search or modified_beam_search"
        ) from None
    return k2


def check_model(model: Any, device: torch.device) -> None:
    """UserError where fast_beam_search cannot work with this model on this device, before time is spent."""
    k2 = import_k2()
    if not hasattr(model.decoder, "context_size"):
        raise UserError(
            "fast_beam_search needs a decoder with a limited context (model.decoder.kind=stateless), but "
            f"this model's is a {type(model.decoder).__name__}; decode with greedy_search or "
            "modified_beam_search"
        )
    if torch.device(device).type == "cuda" and not k2.with_cuda:
        raise UserError(
            "this k2 was built without CUDA; use --device cpu for fast_beam_search*, or a CUDA wheel of k2"
        )


@_without_grad
def fast_beam_search_lattice(
    model: Any, encoder_out: torch.Tensor, encoder_out_lens: torch.Tensor, config: FastBeamSearchConfig
) -> Any:
    """encoder_out (N,T',encoder_dim), encoder_out_lens (N,) -> k2.Fsa, a vector of N lattices.

    Stream n's lattice has encoder_out_lens[n] frames, then arcs of label -1 and score 0 into the final state.
    Nothing is lost at the end, which takes care with k2 1.23: `format_output` turns whatever arcs the last
    frame has into final arcs without a score. So each stream gets one frame more than it has, in which only
    blank is possible, with log-probability 0: one final arc for each state. And the graph has no arc to its
    final state, because such an arc would be followed at every frame, into states that lead nowhere and
    displace others; with `allow_partial` every state of the last frame counts as final.
    """
    check_model(model, encoder_out.device)
    k2 = import_k2()
    device, num_streams = encoder_out.device, encoder_out.size(0)
    graph = _loop_graph(k2, model.vocab_size).to(device)
    streams = k2.RnntDecodingStreams(
        [k2.RnntDecodingStream(graph) for _ in range(num_streams)],
        k2.RnntDecodingConfig(
            vocab_size=model.vocab_size,
            decoder_history_len=model.decoder.context_size,
            beam=config.beam,
            max_states=config.max_states,
            max_contexts=config.max_contexts,
        ),
    )
    projected = model.joiner.encoder_proj(encoder_out)
    lens = encoder_out_lens.to(device)
    only_blank = torch.full((model.vocab_size,), _IMPOSSIBLE, device=device)
    only_blank[model.blank_id] = 0.0
    shortest, longest = int(lens.min()), int(lens.max())
    for t in range(longest + 1):
        shape, contexts = streams.get_contexts()
        # k2 pads the first contexts with 0, the blank: it embeds to zero like the -1 of an unused slot.
        decoder_out = model.joiner.decoder_proj(model.decoder.forward_context(contexts.to(torch.int64)))
        stream = shape.row_ids(1).to(torch.int64)
        encoder_frame = projected[stream, min(t, longest - 1)]
        log_probs = model.joiner(encoder_frame, decoder_out, project_input=False).log_softmax(dim=-1)
        if t >= shortest:
            log_probs = torch.where((t < lens[stream]).unsqueeze(1), log_probs, only_blank)
        streams.advance(log_probs)
    streams.terminate_and_flush_to_streams()
    return streams.format_output((lens + 1).tolist(), allow_partial=True)


def _loop_graph(k2: Any, vocab_size: int) -> Any:
    """One state with a loop for each token; the final state, which k2 wants, is out of reach."""
    loops = "\n".join(f"0 0 {token} 0" for token in range(1, vocab_size))
    return k2.Fsa.from_str(loops + "\n1", acceptor=True)


def one_best(lattice: Any) -> List[Hypothesis]:
    """The most probable path of each lattice; its score is the log-probability of that one alignment."""
    return _best_paths(import_k2(), lattice)


@_without_grad
def nbest(lattice: Any, num_paths: int = 200, nbest_scale: float = 0.5) -> List[List[Hypothesis]]:
    """Distinct token sequences of each lattice, best first, with their first-pass scores.

    num_paths: paths drawn per lattice, beside the best one. There is no chance in it: k2 walks the cumulative
        probabilities in equal steps. Many have the same tokens, so that fewer sequences come back.
    nbest_scale: scales the log-probabilities for the drawing only; smaller gives more different sequences.
    A score is log P(tokens | x) over all alignments in the lattice, not only those drawn; timestamps are
    those of the most probable alignment.
    """
    k2 = import_k2()
    flattened = lattice.clone()  # a deep copy: an Fsa's scores live inside its arcs
    flattened.scores = lattice.scores * nbest_scale
    paths = k2.random_paths(flattened, use_double_scores=True, num_paths=num_paths)
    drawn = k2.ragged.index(lattice.labels.contiguous(), paths).remove_values_leq(0).tolist()
    sequences, of_stream = [], []
    for n, best in enumerate(one_best(lattice)):
        # Drawing may miss even the best path where many are about as probable.
        distinct = dict.fromkeys([tuple(best.tokens)] + [tuple(tokens) for tokens in drawn[n]])
        sequences += [list(tokens) for tokens in distinct]
        of_stream += [n] * len(distinct)
    linear = k2.add_epsilon_self_loops(k2.linear_fsa(sequences, device=str(lattice.device)))
    # Each sequence's own lattice: all alignments of it. 0 is an ordinary label here, hence the self-loops.
    of_stream_map = torch.tensor(of_stream, dtype=torch.int32, device=lattice.device)
    alignments = k2.intersect_device(
        k2.arc_sort(lattice), linear, b_to_a_map=of_stream_map, sorted_match_a=True
    )
    alignments = k2.top_sort(alignments)
    totals = alignments.get_tot_scores(use_double_scores=True, log_semiring=True).tolist()
    found: List[List[Hypothesis]] = [[] for _ in range(lattice.shape[0])]
    for n, hyp, total in zip(of_stream, _best_paths(k2, alignments), totals):
        found[n].append(Hypothesis(hyp.tokens, hyp.timestamps, total))
    return [sorted(hyps, key=lambda h: -h.score) for hyps in found]


def oracle(
    nbests: Sequence[Sequence[Hypothesis]],
    refs: Sequence[Sequence[str]],
    to_words: Callable[[List[int]], List[str]],
) -> List[Hypothesis]:
    """Of each n-best list the hypothesis with the fewest word errors; of equals the most probable.

    refs: reference words of each stream. to_words: token ids -> words, as the hypotheses will be scored.
    """
    chosen = []
    for hyps, ref in zip(nbests, refs):
        errors = [kaldialign.edit_distance(ref, to_words(h.tokens))["total"] for h in hyps]
        chosen.append(hyps[errors.index(min(errors))])
    return chosen


def save_lattices(path: Path, lattice: Any, cut_ids: Sequence[str]) -> None:
    """Write the lattices of one batch and the cuts they belong to, in order. Atomic."""
    # Through memory: torch 1.13's writer ends the whole process when the disk is full.
    buffer = io.BytesIO()
    torch.save({"cut_ids": list(cut_ids), "arcs": lattice.to("cpu").as_dict()["arcs"]}, buffer)
    with atomic_write(path, "wb") as f:
        f.write(buffer.getbuffer())


def load_lattices(path: Path) -> Tuple[List[str], Any]:
    """Read what `save_lattices` wrote -> cut ids, k2.Fsa. UserError for a file that is missing or not one.

    For a second pass over first-pass lattices, which then need not be made again.
    """
    k2 = import_k2()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content["cut_ids"], k2.Fsa(content["arcs"])
    except FileNotFoundError:
        raise UserError(
            f"lattice file {path} does not exist; make it with local/decode.py --save-lattices"
        ) from None
    except Exception as e:  # torch.load raises whatever the pickle reader stumbled over
        raise UserError(f"{path} is not a lattice file ({one_line(e)}); decode again") from None


def _best_paths(k2: Any, lattices: Any) -> List[Hypothesis]:
    best = k2.shortest_path(lattices, use_double_scores=True)
    scores = best.get_tot_scores(use_double_scores=True, log_semiring=False).tolist()
    labels = k2.RaggedTensor(best.arcs.shape().remove_axis(1), best.labels.contiguous()).tolist()
    out = []
    for path, score in zip(labels, scores):
        # One arc a frame, then the final arc of label -1.
        emitted = [(token, t) for t, token in enumerate(path) if token > 0]
        out.append(Hypothesis([token for token, _ in emitted], [t for _, t in emitted], score))
    return out
