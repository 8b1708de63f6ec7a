"""LAS, the second pass: an attention decoder over the transducer's encoder that scores whole hypotheses.

Listen, Attend and Spell (arXiv:1508.01211) on a shared encoder, as in two-pass end-to-end recognition
(arXiv:1908.10992). An LSTM reads the tokens, its outputs attend to the frames, and both together predict the
next token. What was attended to is not fed back into the LSTM, so a known token sequence takes one parallel
pass. It runs when the utterance is over: also behind a streaming encoder it has full context.

Blank is no class of the second pass: its logit is the constant FORBIDDEN, which has probability zero.

Shapes: N batch, T' encoder frames, D encoder_dim, U tokens, V vocabulary, A attention_dim, H heads, E = A/H,
    B hypotheses of all utterances together, P prefixes of all utterances together.
"""

from __future__ import annotations

import dataclasses
from typing import Dict, List, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transducer_kd.config import ModelConfig
from transducer_kd.models.attention import RotaryTable, attend
from transducer_kd.models.conformer import ConformerLayer
from transducer_kd.models.decoder import BLANK_ID
from transducer_kd.models.lstm import TokenLstm
from transducer_kd.models.masks import FORBIDDEN, sequence_bias, valid_mask

SOS_EOS_ID = 1


class LasMemory(NamedTuple):
    """What an utterance offers to attention; it does not depend on any hypothesis."""

    keys: Tensor  # (N, H, T', E)
    values: Tensor  # (N, H, T', E)
    bias: Tensor  # (N, 1, 1, T')


class PrefixTable(NamedTuple):
    """Prefixes to predict from, and which of their predictions make up each hypothesis. All int64.

    Each prefix stands at one place in the n-best lists; each token to predict, the closing <sos/eos>
    included, names its prefix.
    """

    utterance: Tensor  # (P,)
    slot: Tensor  # (P,) its number within its utterance
    hyp: Tensor  # (P,) a hypothesis that begins with it, counted over all utterances
    position: Tensor  # (P,) how many tokens it has
    token_prefix: Tensor  # (tokens,) index of a prefix
    token: Tensor  # (tokens,) what follows the prefix
    token_hyp: Tensor  # (tokens,) in which hypothesis


class Las(nn.Module):
    """Second-pass decoder of the encoder that `cfg.encoder` describes, with the sizes of `cfg.las`."""

    def __init__(self, cfg: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        las, encoder_dim = cfg.las, cfg.encoder.encoder_dim
        self.config = las
        self.vocab_size = vocab_size
        self.rotary = RotaryTable(cfg.encoder.channels_per_head)
        layer = dataclasses.replace(cfg.encoder, num_layers=las.num_encoder_layers, dropout=las.dropout)
        self.layers = nn.ModuleList(ConformerLayer(layer) for _ in range(las.num_encoder_layers))
        self.norm = nn.LayerNorm(encoder_dim) if las.num_encoder_layers else nn.Identity()
        self.lstm = TokenLstm(vocab_size, las.decoder_dim, las.num_layers, las.dropout, BLANK_ID)
        self.query = nn.Linear(las.decoder_dim, las.attention_dim)
        self.key_value = nn.Linear(encoder_dim, 2 * las.attention_dim)
        self.combine = nn.Linear(las.decoder_dim + las.attention_dim, las.decoder_dim)
        self.dropout = nn.Dropout(las.dropout)
        self.output = nn.Linear(las.decoder_dim, vocab_size - 1)  # every class but blank
        for projection in (self.query, self.key_value, self.combine, self.output):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, encoder_out: Tensor, encoder_out_lens: Tensor, y: Tensor, y_lens: Tensor) -> Tensor:
        """Predict every token from the ones before it, and <sos/eos> after the last (teacher forcing).

        Args:
            encoder_out: (N, T', D); encoder_out_lens: (N,) int64, their valid frames.
            y: (N, U) int64 without blanks, padded with anything; y_lens: (N,) int64.
        Returns:
            logits (N, U+1, V): position u predicts token u+1, position y_lens predicts <sos/eos>; later
            positions mean nothing.
        """
        memory = self.memory(encoder_out, encoder_out_lens)
        lstm_out = self._read(y, y_lens)
        return self._predict(lstm_out, self._attend(lstm_out, memory))

    def score(
        self,
        encoder_out: Tensor,
        encoder_out_lens: Tensor,
        hyps: List[List[List[int]]],
        share_prefixes: bool = True,
    ) -> List[Tensor]:
        """Log-probabilities of n-best lists, the closing <sos/eos> included, all in one call.

        Keys and values are computed once per utterance. With `share_prefixes`, so is the prediction after a
        prefix that several of its hypotheses have in common (the scores are the same); the LSTM still reads
        each hypothesis, which is cheaper in one parallel run than prefix by prefix.

        Args:
            encoder_out: (N, T', D); encoder_out_lens: (N,) int64.
            hyps: for each of the N utterances, its hypotheses: token ids without blank, possibly none.
        Returns:
            for each utterance a float32 tensor with one score (nats, differentiable) per hypothesis.
        Raises:
            ValueError: another number of n-best lists than utterances, or a blank in a hypothesis.
        """
        device = encoder_out.device
        flat = [hyp for nbest in hyps for hyp in nbest]
        _check_hyps(hyps, encoder_out.size(0))
        if not flat:
            return [torch.zeros(0, device=device) for _ in hyps]
        y_lens = torch.tensor([len(hyp) for hyp in flat])
        y = torch.full((len(flat), int(y_lens.max())), BLANK_ID, dtype=torch.int64)
        for row, hyp in zip(y, flat):
            row[: len(hyp)] = torch.tensor(hyp, dtype=torch.int64)
        table = PrefixTable(*(t.to(device) for t in prefix_table(hyps, share_prefixes)))

        lstm_out = self._read(y.to(device), y_lens.to(device))[table.hyp, table.position]  # (P, decoder_dim)
        # The prefixes of an utterance are the queries of one product with its keys: nothing is repeated.
        queries = lstm_out.new_zeros(len(hyps), int(table.slot.max()) + 1, lstm_out.size(-1))
        queries[table.utterance, table.slot] = lstm_out
        context = self._attend(queries, self.memory(encoder_out, encoder_out_lens))
        logits = self._predict(lstm_out, context[table.utterance, table.slot])
        tokens = logits.float().log_softmax(-1)[table.token_prefix, table.token]
        scores = torch.zeros(len(flat), device=device).index_add(0, table.token_hyp, tokens)
        return list(scores.split([len(nbest) for nbest in hyps]))

    def score_padded(self, encoder_out: Tensor, y: Tensor, y_lens: Tensor) -> Tensor:
        """The same scores for the hypotheses of one utterance, tensors in, tensor out, fit for tracing.

        encoder_out (1, T', D), all of it valid; y (B, U) int64, U at least 1, padded with anything; y_lens
        (B,) int64. Returns (B,).
        """
        lens = torch.ones_like(encoder_out[..., 0], dtype=torch.int64).sum(dim=1)
        lstm_out = self._read(y, y_lens)  # (B, U+1, decoder_dim)
        context = self._attend(lstm_out.reshape(1, -1, lstm_out.size(-1)), self.memory(encoder_out, lens))
        logits = self._predict(lstm_out, context.view(lstm_out.size(0), lstm_out.size(1), -1))
        position = torch.arange(y.size(1) + 1, device=y.device)
        is_end = position == y_lens.unsqueeze(1)
        target = F.pad(y, (0, 1)).masked_fill(is_end, SOS_EOS_ID).unsqueeze(-1)
        found = logits.float().log_softmax(-1).gather(-1, target).squeeze(-1)
        return found.masked_fill(position > y_lens.unsqueeze(1), 0.0).sum(dim=1)

    def memory(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> LasMemory:
        """Keys and values of encoder_out (N, T', D), after the encoder layers of the second pass."""
        num_frames = encoder_out.size(1)
        bias = sequence_bias(encoder_out_lens, num_frames, 0, 0)
        x = encoder_out
        if len(self.layers):
            padding = ~valid_mask(encoder_out_lens, num_frames).unsqueeze(-1)
            rotary = self.rotary(num_frames, x.device)
            for layer in self.layers:
                x = layer(x, rotary, bias, padding, False)
        keys, values = self._split_heads(self.key_value(self.norm(x))).chunk(2, dim=1)
        return LasMemory(keys, values, bias)

    def _read(self, y: Tensor, y_lens: Tensor) -> Tensor:
        """Tokens (N, U) -> LSTM outputs (N, U+1, decoder_dim); row u has read <sos/eos> and u tokens."""
        y = y.masked_fill(~valid_mask(y_lens, y.size(1)), BLANK_ID)
        return self.lstm(F.pad(y, (1, 0), value=SOS_EOS_ID))[0]

    def _attend(self, queries: Tensor, memory: LasMemory) -> Tensor:
        """LSTM outputs (N, Q, decoder_dim), any number of them per utterance -> contexts (N, Q, A)."""
        q = self._split_heads(self.query(queries)).to(memory.values.dtype)
        return attend(q, memory.keys, memory.values, memory.bias).transpose(1, 2).flatten(2)

    def _predict(self, lstm_out: Tensor, context: Tensor) -> Tensor:
        """(..., decoder_dim), (..., A) -> logits (..., V)."""
        hidden = torch.tanh(self.combine(torch.cat([lstm_out, context.to(lstm_out.dtype)], dim=-1)))
        return F.pad(self.output(self.dropout(hidden)), (1, 0), value=FORBIDDEN)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(N, T, any x E) -> (N, any, T, E)."""
        return x.unflatten(-1, (-1, self.config.attention_dim // self.config.num_heads)).transpose(1, 2)


def prefix_table(hyps: List[List[List[int]]], share_prefixes: bool) -> PrefixTable:
    """List the prefixes of n-best lists, each once per utterance, or once per hypothesis if not shared."""
    prefixes: List[Tuple[int, int, int, int]] = []  # utterance, slot, hyp, position
    tokens: List[Tuple[int, int, int]] = []  # prefix, token, hyp
    hyp_index = 0
    for utterance, nbest in enumerate(hyps):
        first = len(prefixes)
        # A prefix is known by the prefix one token shorter and its last token, so no tuple grows long.
        known: Dict[Tuple[int, int], int] = {}
        for hyp in nbest:
            if not share_prefixes:
                known = {}
            prefix = -1
            for position, (last, token) in enumerate(zip([SOS_EOS_ID, *hyp], [*hyp, SOS_EOS_ID])):
                key = (prefix, last)
                prefix = known.setdefault(key, len(prefixes))
                if prefix == len(prefixes):
                    prefixes.append((utterance, prefix - first, hyp_index, position))
                tokens.append((prefix, token, hyp_index))
            hyp_index += 1
    return PrefixTable(*torch.tensor(prefixes).unbind(1), *torch.tensor(tokens).unbind(1))


def _check_hyps(hyps: List[List[List[int]]], num_utterances: int) -> None:
    if len(hyps) != num_utterances:
        raise ValueError(f"{len(hyps)} n-best lists were given for {num_utterances} utterances")
    for n, nbest in enumerate(hyps):
        for hyp in nbest:
            if BLANK_ID in hyp:
                raise ValueError(f"a hypothesis of utterance {n} holds blank (0): {hyp}; give labels only")
