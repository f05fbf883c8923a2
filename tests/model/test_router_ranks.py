"""Batch statistics over several ranks are those of one batch that holds all rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mor import MoRForCausalLM
from mor.model.routers import batch_boundary
from mor.model.routers.base import Candidates
from mor.model.routers.quantile import boundary_over_ranks
from tests.strategies import KV_SHARING, random_ids, small_config

SUM, MAX = torch.distributed.ReduceOp.SUM, torch.distributed.ReduceOp.MAX


class Ranks:
    """Threads that stand for ranks: ``torch.distributed`` as far as routers use it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.here = threading.local()
        self.meet = threading.Barrier(number, timeout=30)
        self.given: list[Any] = [None] * number

    def all_reduce(self, tensor: Tensor, op: Any = SUM) -> None:
        self.given[self.here.rank] = tensor.clone()
        self.meet.wait()
        stacked = torch.stack(self.given)
        tensor.copy_(stacked.sum(0) if op == SUM else stacked.amax(0))
        self.meet.wait()

    @contextmanager
    def patched(self) -> Iterator[None]:
        names: dict[str, Any] = {
            "all_reduce": self.all_reduce,
            "is_initialized": lambda: True,
            "get_world_size": lambda: self.number,
            "get_rank": lambda: self.here.rank,
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in names.items():
                patch.setattr(torch.distributed, name, value)
            yield

    def run(self, task: Callable[[int], Any]) -> list[Any]:
        """``task(rank)`` of every rank, at the same time."""
        results: list[Any] = [None] * self.number

        def one(rank: int) -> None:
            self.here.rank = rank
            try:
                results[rank] = task(rank)
            except BaseException as error:
                results[rank] = error
                self.meet.abort()

        with self.patched():
            threads = [threading.Thread(target=one, args=(n,)) for n in range(self.number)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


finite = st.one_of(
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-38, -1e-38, 3e38, -3e38]),
    st.integers(-2, 2).map(float),
)


@given(
    parts=st.lists(st.lists(st.tuples(finite, st.booleans()), max_size=9), min_size=1, max_size=3),
    share=st.floats(0, 1),
    wide=st.booleans(),
)
def test_the_boundary_is_that_of_all_values(
    parts: list[list[tuple[float, bool]]], share: float, wide: bool
) -> None:
    """Bit for bit, with ties, signed zeros, invalid places and ranks without a value."""
    dtype = torch.float64 if wide else torch.float32
    values = [torch.tensor([v for v, _ in part], dtype=dtype) for part in parts]
    valid = [torch.tensor([ok for _, ok in part], dtype=torch.bool) for part in parts]
    together, real = torch.cat(values), torch.cat(valid)
    kept = torch.tensor(round(share * int(real.sum())))
    found = Ranks(len(parts)).run(lambda rank: boundary_over_ranks(values[rank], kept, valid[rank]))
    if not real.any():
        assert all(bool(torch.isinf(one)) for one in found)
        return
    expected = batch_boundary(together[real], kept, None)
    for one in found:
        assert_close(one, expected, rtol=0, atol=0)
        assert int((together[real] > one).sum()) <= int(kept)


@pytest.mark.parametrize("router", ["expert_choice", "threshold", "token_choice", "random"])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("documents", [False, True])
def test_a_micro_batch_may_be_split(router: str, ranks: int, documents: bool) -> None:
    """Depths, router losses and stored constants of rows do not depend on who holds them."""
    config = small_config(
        router,
        router_z_loss_coef=0.1,
        initializer_range=0.3,
        router_bias_update_rate=1e-3,
        router_balancing="loss",
    )
    if documents and router == "random":
        pytest.skip("draws for rows, and documents are none")
    ids = random_ids(3, ranks, 12)
    parts = None
    if documents:  # equally many tokens of each in every row, as losses are means of means
        parts = torch.tensor([0] * 5 + [1] * 7).expand(ranks, -1)

    def fresh() -> MoRForCausalLM:
        torch.manual_seed(0)
        return MoRForCausalLM(config).train()

    torch.manual_seed(0)
    models = [fresh() for _ in range(ranks)]
    alone = fresh()
    whole = alone(ids, labels=ids, document_ids=parts)
    alone.model.router.finish_step()

    def one(rank: int) -> Any:
        own = slice(rank, rank + 1)
        part = None if parts is None else parts[own]
        output = models[rank](ids[own], labels=ids[own], document_ids=part)
        models[rank].model.router.finish_step()
        return output

    outputs = Ranks(ranks).run(one)
    assert torch.equal(torch.cat([output.depths for output in outputs]), whole.depths)
    if router != "random":
        assert whole.router_losses
    for name, term in (whole.router_losses or {}).items():
        mean = torch.stack([output.router_losses[name] for output in outputs]).mean()
        assert_close(mean, term, rtol=1e-5, atol=1e-6)
    for model in models:
        for name, buffer in alone.model.router.named_buffers():
            assert_close(model.model.router.get_buffer(name), buffer, rtol=1e-6, atol=1e-6)


def test_outside_training_nobody_is_asked() -> None:
    """One rank may evaluate by itself."""
    model = MoRForCausalLM(small_config("threshold")).eval()
    ids = random_ids(0, 2, 12)

    def refuse(*args: Any) -> None:
        raise AssertionError("a message to ranks that are not there")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "all_reduce", refuse)
        model(ids)
        model(ids, routing="topk")
        with pytest.raises(AssertionError, match="a message"):
            model.train()(ids)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("kind", ["plain", "padded", "documents"])
@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_a_rank_without_a_token_keeps_step(
    kv_sharing: str, first: int, kind: str, routing: str
) -> None:
    """From depth ``first`` on it has none: it runs every depth and nothing of it is to be seen."""
    capacities = [0.9, 0.6, 0.3]
    config = small_config("threshold", router_capacities=capacities, kv_sharing=kv_sharing)
    torch.manual_seed(0)
    model = MoRForCausalLM(config).eval()
    bound = 0.0
    if kv_sharing == "propagate":  # in step all tokens are projected at once: others' last bits
        model, bound = model.double(), 1e-12
    model.model.router.boundary.fill_(-torch.inf)
    model.model.router.boundary[first:] = torch.inf
    ids = random_ids(1, 2, 9)
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids, "routing": routing}
    if kind == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :4] = 0
    elif kind == "documents":
        inputs["document_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2)
    if routing == "topk":  # as where all that the quantile lets through lies on other ranks
        select = model.model.router.select

        def of_others(scores: Any, depth: int, candidates: Candidates) -> Any:
            chosen = select(scores, depth, candidates)
            return chosen if depth < first else torch.zeros_like(scores.decision, dtype=torch.bool)

        model.model.router.select = of_others  # type: ignore[method-assign]
    plain = model(**inputs, output_hidden_states=True)
    ran: list[int] = []
    before = model.model.recurse

    def noted(hidden: Tensor, depth: int, *rest: Any) -> Tensor:
        ran.append(depth)
        return before(hidden, depth, *rest)

    model.model.recurse = noted  # type: ignore[method-assign]
    model.model.router.run_every_depth()
    kept = model(**inputs, output_hidden_states=True)
    assert ran == [0, 1, 2]
    assert int(kept.depths.max()) == first
    for one, other in zip(
        (kept.logits, kept.depths, *kept.hidden_states),
        (plain.logits, plain.depths, *plain.hidden_states),
        strict=True,
    ):
        assert_close(one, other, rtol=bound, atol=bound)
    kept.loss.backward()
    if first == 0:
        for parameter in model.model.block.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()
