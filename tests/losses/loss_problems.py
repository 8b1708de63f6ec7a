"""Random transducer problems with known sizes, for the loss tests."""

from dataclasses import dataclass

import torch


@dataclass
class Problem:
    """Random inputs: lm (N,U+1,V), am (N,T',V), symbols (N,U), boundary (N,4), weights (N,) to sum the losses
    with."""

    lm: torch.Tensor
    am: torch.Tensor
    symbols: torch.Tensor
    boundary: torch.Tensor
    weights: torch.Tensor

    def logits(self):
        return self.am[:, :, None] + self.lm[:, None]


def make_problem(frames, tokens, vocab=7, seed=0, dtype=torch.float32):
    """A batch of utterances with `frames[i]` encoder frames and `tokens[i]` tokens."""
    g = torch.Generator().manual_seed(seed)
    n, t, u = len(frames), max(frames), max(tokens)
    boundary = torch.tensor([[0, 0, tokens[i], frames[i]] for i in range(n)])
    return Problem(
        lm=torch.randn(n, u + 1, vocab, generator=g, dtype=torch.float64).to(dtype),
        am=torch.randn(n, t, vocab, generator=g, dtype=torch.float64).to(dtype),
        symbols=torch.randint(1, vocab, (n, u), generator=g),
        boundary=boundary,
        weights=torch.rand(n, generator=g, dtype=torch.float64).to(dtype) + 0.5,
    )


def leaf(x):
    return x.detach().clone().requires_grad_()


def assert_close(got, expected, tolerance=1e-4):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance, check_dtype=False)
