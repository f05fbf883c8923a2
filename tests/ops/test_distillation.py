"""Distillation of logits: values and gradients against the plain form, all of it and top k."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from mor.ops.distillation import KnownRows, LiveRows, linear_distillation

TOKENS, WIDTH, VOCABULARY = 11, 6, 23


def case(seed: int = 0) -> tuple[Tensor, ...]:
    """hidden, weight, targets (some without), teacher's hidden and weight."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    targets[[2, -1]] = -100
    theirs = torch.randn(TOKENS, 2 * WIDTH, generator=draw)
    head = torch.randn(VOCABULARY, 2 * WIDTH, generator=draw)
    return hidden, weight.requires_grad_(), targets, theirs, head


def plain(
    case: tuple[Tensor, ...], lm: float, kd: float, temperature: float, top_k: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in the fewest words; the rest beyond ``top_k`` is one outcome."""
    hidden, weight, targets, theirs, head = case
    logits, real = hidden @ weight.t(), targets != -100
    ce = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    q = (logits / temperature).softmax(-1)
    p = (theirs.double() @ head.double().t() / temperature).softmax(-1)
    if top_k is not None:
        chosen = p.topk(top_k).indices
        p, q = p.gather(1, chosen), q.gather(1, chosen)
        p = torch.cat([p, 1 - p.sum(1, keepdim=True)], 1)
        q = torch.cat([q, 1 - q.sum(1, keepdim=True)], 1)
    kl = temperature**2 * (p * (p.log() - q.log())).sum(1)[real].sum()
    return lm * ce + kd * kl, ce, kl


@pytest.mark.parametrize("top_k", [None, 1, 5, VOCABULARY - 1])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("lm", "kd"), [(0.0, 1.0), (0.3, 0.7), (1.0, 0.0)])
def test_values_and_gradients(lm: float, kd: float, temperature: float, top_k: int | None) -> None:
    made = case()
    hidden, weight, targets, theirs, head = made
    expected = plain(made, lm, kd, temperature, top_k)
    slopes = torch.autograd.grad(3 * expected[0], (hidden, weight))
    teacher = LiveRows(theirs, head, temperature, top_k)
    found = linear_distillation(
        hidden, weight, targets, teacher, lm=lm, kd=kd, temperature=temperature, rows=4
    )
    for ours, theirs_ in zip(found, expected, strict=True):
        assert_close(ours, theirs_.detach(), rtol=2e-5, atol=1e-5)
    ours = torch.autograd.grad(3 * found[0], (hidden, weight))
    for slope, right in zip(ours, slopes, strict=True):
        assert_close(slope, right, rtol=2e-4, atol=2e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, targets, theirs, head = case()
    weight = weight.detach()
    total, _, _ = linear_distillation(
        hidden, weight, targets, LiveRows(theirs, head), lm=0.5, kd=0.5
    )
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_known_rows_say_what_live_ones_said() -> None:
    _, _, _, theirs, head = case()
    ids, logs = LiveRows(theirs, head, 1.0, 5).logs(0, TOKENS)
    assert ids is not None
    known = KnownRows(ids.int(), logs)
    again, values = known.logs(3, 7)
    assert again is not None
    assert again.equal(ids[3:7])
    assert values.equal(logs[3:7])


def test_a_student_that_is_the_teacher_learns_nothing() -> None:
    hidden, weight, targets, _, _ = case()
    teacher = LiveRows(hidden.detach().float(), weight.detach().float())
    _, _, kl = linear_distillation(hidden, weight, targets, teacher, lm=0.0, kd=1.0)
    assert float(kl) == pytest.approx(0.0, abs=1e-5)


def test_all_as_the_top_k_is_all() -> None:
    hidden, weight, targets, theirs, head = case()
    totals = []
    for top_k in (None, VOCABULARY):
        teacher = LiveRows(theirs, head, 1.0, top_k)
        totals.append(linear_distillation(hidden, weight, targets, teacher, lm=0.3, kd=0.7)[0])
    assert_close(*totals)
    slopes = [torch.autograd.grad(total, hidden)[0] for total in totals]
    assert_close(*slopes)


def test_a_student_that_is_sure_of_the_teachers_few() -> None:
    """What it leaves to the rest is below all numbers; the teacher leaves some."""
    hidden, weight, targets, theirs, head = case()
    sure = (hidden.detach() * 150).float().requires_grad_()
    wide = sure.detach().double().requires_grad_()
    grads = []
    for one, factor in ((sure, weight.detach().float()), (wide, weight.detach())):
        teacher = LiveRows(theirs, head, 1.0, 3)
        total, _, _ = linear_distillation(one, factor, targets, teacher, lm=0.5, kd=0.5)
        grads.append(torch.autograd.grad(total, one)[0].double())
    assert_close(*grads, atol=1e-3, rtol=1e-3)
