"""The pruned loss by every installed kernel: against the reference, against k2's own losses, and padding."""

import sys
from pathlib import Path

import pytest
import torch

from transducer_kd.log import UserError
from transducer_kd.losses import pruned_rnnt
from transducer_kd.losses.pruned_rnnt import (
    gather_pruned,
    make_boundary,
    prune_ranges,
    pruned_loss,
    simple_loss,
)
from transducer_kd.losses.rnnt_reference import arcs_reference, loss_of_arcs_reference, rnnt_loss_reference

sys.path.insert(0, str(Path(__file__).parent))
from loss_problems import assert_close, leaf, make_problem  # noqa: E402

SHAPES = [([1], [0]), ([2], [1]), ([6, 4, 9], [5, 4, 0]), ([12, 12], [3, 12]), ([3, 5], [0, 0])]
CLOSED = -1e4  # a log-probability whose paths count for nothing; unlike -inf autograd can pass it


def simple(p, backend, lm_scale=0.25, am_scale=0.0, **replaced):
    """Loss, occupancies and gradients of a problem: (loss, px_grad, py_grad, lm.grad, am.grad)."""
    lm, am = leaf(replaced.get("lm", p.lm)), leaf(replaced.get("am", p.am))
    symbols = replaced.get("symbols", p.symbols)
    loss, (px_grad, py_grad) = simple_loss(lm, am, symbols, p.boundary, lm_scale, am_scale, backend)
    (loss * p.weights).sum().backward()
    return loss.detach(), px_grad, py_grad, lm.grad, am.grad


def pruned(p, ranges, backend, **replaced):
    """Loss and gradients of a small joiner on the kept nodes: (loss, lm.grad, am.grad)."""
    lm, am = leaf(replaced.get("lm", p.lm)), leaf(replaced.get("am", p.am))
    am_kept, lm_kept = gather_pruned(am, lm, ranges)
    loss = pruned_loss(
        2 * torch.tanh(am_kept + lm_kept), replaced.get("symbols", p.symbols), ranges, p.boundary, backend
    )
    (loss * p.weights).sum().backward()
    return loss.detach(), lm.grad, am.grad


@pytest.mark.parametrize("frames,tokens", SHAPES)
def test_simple_loss_equals_the_reference(backend, frames, tokens):
    p = make_problem(frames, tokens)
    loss, _, _, lm_grad, am_grad = simple(p, backend, lm_scale=0.0)
    lm, am = leaf(p.lm.double()), leaf(p.am.double())
    expected = rnnt_loss_reference(am[:, :, None] + lm[:, None], p.symbols, p.boundary)
    (expected * p.weights).sum().backward()
    assert_close(loss, expected.detach())
    assert_close(lm_grad, lm.grad)
    assert_close(am_grad, am.grad)


def test_smoothed_loss_by_its_definition(backend):
    lm_scale, am_scale = 0.25, 0.1
    p = make_problem([7, 5], [4, 2])
    lm, am = p.lm.double(), p.am.double()
    lm_only = lm.log_softmax(-1)
    valid = torch.cat([lm_only[0, :5], lm_only[1, :3]])  # U_n + 1 positions each
    unigram = valid.exp().mean(0).log()
    am_only = (am + unigram).log_softmax(-1)
    joint = (am[:, :, None] + lm[:, None]).log_softmax(-1)
    log_probs = 0.65 * joint + lm_scale * lm_only[:, None] + am_scale * am_only[:, :, None]
    token = torch.stack([log_probs[n, :, range(4), p.symbols[n]] for n in range(2)])
    expected = loss_of_arcs_reference(token, log_probs[..., 0], p.boundary)
    assert_close(simple(p, backend, lm_scale, am_scale)[0], expected)


@pytest.mark.parametrize("frames,tokens", SHAPES)
def test_pruned_loss_equals_the_reference_on_the_kept_nodes(backend, frames, tokens):
    p = make_problem(frames, tokens, seed=1)
    _, px_grad, py_grad, _, _ = simple(p, backend)
    ranges = prune_ranges(px_grad, py_grad, p.boundary, 3)
    loss, lm_grad, am_grad = pruned(p, ranges, backend)

    lm, am = leaf(p.lm.double()), leaf(p.am.double())
    token, blank = arcs_reference(2 * torch.tanh(am[:, :, None] + lm[:, None]), p.symbols)
    kept = torch.zeros(blank.shape, dtype=torch.bool).scatter(2, ranges, True)
    # A token arc is kept where its first node is; a window's last token leads to a node without arcs of its
    # own.
    token = token.masked_fill(~kept[:, :, :-1], CLOSED)
    expected = loss_of_arcs_reference(token, blank.masked_fill(~kept, CLOSED), p.boundary)
    (expected * p.weights).sum().backward()
    assert_close(loss, expected.detach())
    assert_close(lm_grad, lm.grad)
    assert_close(am_grad, am.grad)


def test_a_window_over_all_tokens_gives_the_full_loss(backend):
    p = make_problem([8, 6], [4, 3])
    _, px_grad, py_grad, _, _ = simple(p, backend)
    ranges = prune_ranges(px_grad, py_grad, p.boundary, 50)
    assert ranges.shape == (2, 8, 5) and torch.equal(ranges[1, 7], torch.arange(5))
    expected = rnnt_loss_reference(2 * torch.tanh(p.logits().double()), p.symbols, p.boundary)
    assert_close(pruned(p, ranges, backend)[0], expected)


@pytest.mark.parametrize("s_range", [2, 3, 5])
def test_windows_leave_no_token_out(backend, s_range):
    p = make_problem([20, 13, 9, 6], [13, 13, 2, 0], seed=s_range)
    _, px_grad, py_grad, _, _ = simple(p, backend)
    ranges = prune_ranges(px_grad, py_grad, p.boundary, s_range)
    assert ranges.shape == (4, 20, s_range) and ranges.dtype == torch.int64
    assert torch.equal(ranges - ranges[:, :, :1], torch.arange(s_range).expand(4, 20, -1))
    steps = ranges[:, 1:, 0] - ranges[:, :-1, 0]
    assert steps.min() >= 0 and steps.max() < s_range
    assert torch.equal(ranges[:, 0, 0], torch.zeros(4, dtype=torch.int64)) and ranges.max() <= 13
    for n, (_, _, u, t) in enumerate(p.boundary.tolist()):
        assert ranges[n, t - 1, 0] == max(u - s_range + 1, 0)  # the window of the last frame ends with U_n


def test_windows_follow_the_alignment(backend):
    # Token u is certain at frame 3 u + 1: the window of each frame must hold the node it leads to.
    frames, tokens = 15, 5
    lm = torch.zeros(1, tokens + 1, tokens + 1)
    am = torch.zeros(1, frames, tokens + 1)
    am[:, :, 0] = 8.0
    for u in range(tokens):
        am[0, 3 * u + 1, u + 1] = 16.0
    symbols = torch.arange(1, tokens + 1)[None]
    boundary = torch.tensor([[0, 0, tokens, frames]])
    _, gradients = simple_loss(lm, am, symbols, boundary, 0.0, 0.0, backend)
    ranges = prune_ranges(*gradients, boundary, 2)
    for t in range(frames):
        emitted = min((t + 1) // 3 + ((t + 1) % 3 == 2), tokens)
        assert emitted in ranges[0, t].tolist(), (t, ranges[0, t])


@pytest.mark.parametrize("am_scale", [0.0, 0.1])
def test_equals_the_losses_of_the_library(library, backend, am_scale):
    # Full lengths where am_scale counts: the libraries average the language model over padding too. Nobody is
    # without tokens: fast_rnnt's own loss refuses that.
    frames, tokens = ([25, 25, 25], [9, 9, 9]) if am_scale else ([25, 17, 12], [9, 4, 7])
    p = make_problem(frames, tokens, vocab=20, seed=3)
    lm, am = leaf(p.lm), leaf(p.am)
    expected, gradients = library.rnnt_loss_smoothed(
        lm, am, p.symbols, 0, lm_only_scale=0.25, am_only_scale=am_scale, boundary=p.boundary,
        reduction="none", return_grad=True,
    )  # fmt: skip
    expected_ranges = library.get_rnnt_prune_ranges(
        *gradients, p.boundary, 4
    )  # before backward overwrites them
    px_expected, py_expected = gradients[0][:, :, :-1].clone(), gradients[1].clone()
    (expected * p.weights).sum().backward()
    loss, px_grad, py_grad, lm_grad, am_grad = simple(p, backend, am_scale=am_scale)
    assert_close(loss, expected.detach())
    assert_close(px_grad, px_expected)
    assert_close(py_grad, py_expected)
    assert_close(lm_grad, lm.grad)
    assert_close(am_grad, am.grad)
    ranges = prune_ranges(px_grad, py_grad, p.boundary, 4)
    assert torch.equal(ranges, expected_ranges)

    lm, am = leaf(p.lm), leaf(p.am)
    am_kept, lm_kept = library.do_rnnt_pruning(am, lm, ranges)
    logits = 2 * torch.tanh(am_kept + lm_kept)
    expected = library.rnnt_loss_pruned(logits, p.symbols, ranges, 0, p.boundary, reduction="none")
    (expected * p.weights).sum().backward()
    loss, lm_grad, am_grad = pruned(p, ranges, backend)
    assert_close(loss, expected.detach())
    assert_close(lm_grad, lm.grad)
    assert_close(am_grad, am.grad)


@pytest.mark.parametrize("am_scale", [0.0, 0.1])
def test_padding_changes_nothing(backend, am_scale):
    p = make_problem([9, 6], [4, 2])
    more_t, more_u = 5, 20  # more padded tokens than frames, too
    garbage = torch.Generator().manual_seed(9)
    longer = {
        "am": torch.cat([p.am, 30 * torch.randn(2, more_t, 7, generator=garbage)], 1),
        "lm": torch.cat([p.lm, 30 * torch.randn(2, more_u, 7, generator=garbage)], 1),
        "symbols": torch.cat([p.symbols, torch.randint(0, 7, (2, more_u), generator=garbage)], 1),
    }
    plain = simple(p, backend, am_scale=am_scale)
    padded = simple(p, backend, am_scale=am_scale, **longer)
    assert_close(padded[0], plain[0])
    assert_close(padded[3][:, :5], plain[3])
    assert_close(padded[4][:, :9], plain[4])
    assert padded[3][:, 5:].abs().max() == 0 and padded[4][:, 9:].abs().max() == 0
    assert padded[3][1, 3:].abs().max() == 0 and padded[4][1, 6:].abs().max() == 0

    ranges = prune_ranges(plain[1], plain[2], p.boundary, 3)
    padded_ranges = prune_ranges(padded[1], padded[2], p.boundary, 3)
    assert torch.equal(padded_ranges[:, :9], ranges)
    plain, padded = pruned(p, ranges, backend), pruned(p, padded_ranges, backend, **longer)
    assert_close(padded[0], plain[0])
    assert_close(padded[1][:, :5], plain[1])
    assert_close(padded[2][:, :9], plain[2])
    assert padded[1][1, 3:].abs().max() == 0 and padded[2][1, 6:].abs().max() == 0


def test_an_utterance_alone_has_the_loss_it_has_in_a_batch(backend):
    p = make_problem([9, 6, 7], [4, 2, 0])
    loss, px_grad, py_grad, _, _ = simple(p, backend)
    in_batch = pruned(p, prune_ranges(px_grad, py_grad, p.boundary, 3), backend)[0]
    for n, (_, _, u, t) in enumerate(p.boundary.tolist()):
        lm, am, symbols, boundary = (
            p.lm[n : n + 1, : u + 1],
            p.am[n : n + 1, :t],
            p.symbols[n : n + 1, :u],
            p.boundary[n : n + 1],
        )
        alone, gradients = simple_loss(lm, am, symbols, boundary, 0.25, 0.0, backend)
        assert_close(alone[0], loss[n])
        ranges = prune_ranges(*gradients, boundary, 3)
        am_kept, lm_kept = gather_pruned(am, lm, ranges)
        alone = pruned_loss(2 * torch.tanh(am_kept + lm_kept), symbols, ranges, boundary, backend)
        assert_close(alone[0], in_batch[n])


def test_gradients_in_float64(backend):
    p = make_problem([4, 3], [2, 1], vocab=4, dtype=torch.float64)
    _, px_grad, py_grad, _, _ = simple(p, backend)
    ranges = prune_ranges(px_grad, py_grad, p.boundary, 2)

    def both(lm, am):
        am_kept, lm_kept = gather_pruned(am, lm, ranges)
        return (
            simple_loss(lm, am, p.symbols, p.boundary, 0.25, 0.1, backend)[0],
            pruned_loss(am_kept * lm_kept, p.symbols, ranges, p.boundary, backend),
        )

    assert torch.autograd.gradcheck(both, (leaf(p.lm), leaf(p.am)))


def test_float32_inside_autocast(backend):
    p = make_problem([9, 6], [4, 2])
    ranges = torch.arange(5).expand(2, 9, 5)
    lm, am = p.lm.bfloat16(), p.am.bfloat16()
    expected, _ = simple_loss(lm.float(), am.float(), p.symbols, p.boundary, 0.25, 0.0, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = simple_loss(lm, am, p.symbols, p.boundary, 0.25, 0.0, backend)
        kept = pruned_loss(p.logits().bfloat16(), p.symbols, ranges, p.boundary, backend)
    assert loss.dtype == kept.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(
        kept, pruned_loss(p.logits().bfloat16().float(), p.symbols, ranges, p.boundary, backend)
    )


def test_backward_leaves_the_occupancies_alone(backend):
    p = make_problem([9, 6], [4, 2])
    lm = leaf(p.lm)
    loss, (px_grad, py_grad) = simple_loss(lm, p.am, p.symbols, p.boundary, 0.25, 0.0, backend)
    before = px_grad.clone(), py_grad.clone()
    (3 * loss).sum().backward()
    assert torch.equal(px_grad, before[0]) and torch.equal(py_grad, before[1])
    assert not px_grad.requires_grad


def test_no_gradient_wanted(backend):
    p = make_problem([9, 6], [4, 2])
    with torch.no_grad():
        loss, (px_grad, py_grad) = simple_loss(p.lm, p.am, p.symbols, p.boundary, 0.25, 0.0, backend)
        ranges = prune_ranges(px_grad, py_grad, p.boundary, 3)
        am_kept, lm_kept = gather_pruned(p.am, p.lm, ranges)
        kept = pruned_loss(2 * torch.tanh(am_kept + lm_kept), p.symbols, ranges, p.boundary, backend)
    assert_close(loss, simple(p, backend)[0])
    assert_close(kept, pruned(p, ranges, backend)[0])


def test_impossible_token_gives_infinite_loss_without_nan(backend):
    p = make_problem([6, 6], [2, 2])
    logits = p.logits()
    logits[0, :, :, p.symbols[0, 0]] = -float("inf")
    logits = leaf(logits)
    ranges = torch.arange(3).expand(2, 6, 3)
    loss = pruned_loss(logits, p.symbols, ranges, p.boundary, backend)
    assert loss[0] == float("inf") and loss[1].isfinite()
    loss[1].backward()
    assert logits.grad[1].isfinite().all() and logits.grad[1].abs().sum() > 0


def test_fewer_frames_than_tokens_is_named(backend):
    p = make_problem([4, 3], [2, 6])
    with pytest.raises(UserError, match=r"number 1 in the batch \(T'=3, U=6; symbols \(2, 6\)\).*drop them"):
        simple_loss(p.lm, p.am, p.symbols, p.boundary, 0.25, 0.0, backend)
    with pytest.raises(UserError, match="drop them"):
        pruned_loss(p.logits(), p.symbols, torch.arange(7).expand(2, 4, 7), p.boundary, backend)


def test_shapes_that_do_not_fit_are_named():
    p = make_problem([4], [2])
    with pytest.raises(ValueError, match=r"am does not fit symbols \(1, 2\), T'=4"):
        simple_loss(p.lm[:, 1:], p.am, p.symbols, p.boundary, 0.25, 0.0, "torch")
    with pytest.raises(UserError, match="s_range is 1"):
        prune_ranges(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4), p.boundary, 1)


def test_make_boundary():
    boundary = make_boundary(torch.tensor([3, 0], dtype=torch.int32), torch.tensor([7, 5]))
    assert torch.equal(boundary, torch.tensor([[0, 0, 3, 7], [0, 0, 0, 5]]))


def test_gather_pruned_takes_the_named_rows():
    am, lm = torch.randn(2, 3, 4), leaf(torch.randn(2, 5, 4))
    ranges = torch.tensor([[[0, 1], [1, 2], [3, 4]], [[0, 1], [0, 1], [2, 3]]])
    am_kept, lm_kept = gather_pruned(am, lm, ranges)
    for n in range(2):
        for t in range(3):
            for i in range(2):
                assert torch.equal(am_kept[n, t, i], am[n, t])
                assert torch.equal(lm_kept[n, t, i], lm[n, ranges[n, t, i]])
    lm_kept.sum().backward()
    assert torch.equal(lm.grad[..., 0], torch.tensor([[1.0, 2, 1, 1, 1], [2.0, 2, 1, 1, 0]]))


def installed_only(monkeypatch, names, has_cuda):
    class Module:
        with_cuda = has_cuda

    def import_module(name):
        if name in names:
            return Module
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(pruned_rnnt.importlib, "import_module", import_module)


@pytest.mark.parametrize(
    "names,kernels_have_cuda,machine_has_cuda,expected",
    [
        (["k2", "fast_rnnt"], True, True, "k2"),
        (["fast_rnnt"], False, False, "fast_rnnt"),
        (["fast_rnnt"], False, True, "torch"),
        ([], True, True, "torch"),
    ],
)
def test_auto_takes_the_first_that_works(monkeypatch, names, kernels_have_cuda, machine_has_cuda, expected):
    installed_only(monkeypatch, names, kernels_have_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine_has_cuda)
    assert pruned_rnnt.resolve_backend("auto") == expected


def test_a_missing_backend_names_its_mend(monkeypatch):
    installed_only(monkeypatch, [], False)
    with pytest.raises(UserError, match="loss.backend is k2.*No module named.*check_env"):
        pruned_rnnt.resolve_backend("k2")
    with pytest.raises(UserError, match="fast_rnnt.*setup.sh --env modern"):
        pruned_rnnt.resolve_backend("fast_rnnt")
    with pytest.raises(UserError, match="'warp' is not one of auto, k2, fast_rnnt, torch"):
        pruned_rnnt.resolve_backend("warp")
    assert pruned_rnnt.resolve_backend("torch") == "torch"


def test_auto_tells_of_a_backend_that_is_installed_and_broken(tmp_path, monkeypatch, caplog):
    installed_only(monkeypatch, [], False)
    monkeypatch.setattr(pruned_rnnt.importlib.util, "find_spec", lambda name: None)
    assert pruned_rnnt.resolve_backend("auto") == "torch" and not caplog.records
    (tmp_path / "k2").mkdir()
    (tmp_path / "k2/__init__.py").write_text("import _k2_of_another_python\n")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] in ("k2", "_k2")]:
        monkeypatch.delitem(sys.modules, name)
    pruned_rnnt.resolve_backend("auto")
    assert "going on without it: loss.backend is k2, which cannot be imported" in caplog.text
    assert "_k2_of_another_python" in caplog.text and "check_env" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu(backend):
    if backend != "torch" and not pruned_rnnt._has_cuda(pruned_rnnt._kernel(backend)):
        pytest.skip(f"this {backend} was built without CUDA")
    p = make_problem([30, 21, 9], [12, 9, 0], vocab=20)
    on_cpu = simple(p, "torch")
    ranges = prune_ranges(on_cpu[1], on_cpu[2], p.boundary, 4)
    on_cpu += pruned(p, ranges, "torch")
    for name, value in vars(p).items():
        setattr(p, name, value.cuda())
    on_gpu = simple(p, backend)
    gpu_ranges = prune_ranges(on_gpu[1], on_gpu[2], p.boundary, 4)
    assert torch.equal(gpu_ranges.cpu(), ranges)
    on_gpu += pruned(p, gpu_ranges, backend)
    for got, expected in zip(on_gpu, on_cpu):
        assert_close(got.cpu(), expected)
