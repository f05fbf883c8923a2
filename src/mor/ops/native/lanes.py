"""A stage over tokens in flight in one call, with what it takes from their lanes and leaves there.

The plain forms are ``_start``, ``_run`` and ``_finish`` of ``mor.engine.runner.Runner``,
``mor.model.routers.updates.update_stream`` and ``BoundaryRouter.answer``.
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor

from mor.ops.native.calls import POINTWISE, PassStruct, RouterStruct, at, kernels
from mor.ops.native.paged import PackedStack, Ragged

RULES = ("last", "additive", "gated", "residual")
"""Of the update, in the order of pass.h."""


@dataclass(frozen=True)
class RouterAnswers:
    """What is asked of a router that compares a score with a boundary, by depth.

    Attributes:
        weight, bias: [sets, 1, D], and [sets, 1] or none.
        boundary, full: [R], and which depths let all through.
        at_it: whether a token at its boundary goes on.
        squash: of ``POINTWISE``, what makes a gate of a score and ``shift``; None for none.
        alpha: times that.
    """

    weight: Tensor
    bias: Tensor | None
    boundary: Tensor
    full: Tensor
    at_it: bool
    squash: str | None
    shift: float
    alpha: float

    def struct(self) -> RouterStruct:
        """For the kernel; the tensors have to live as long."""
        kind = -1 if self.squash is None else POINTWISE.index(self.squash)
        tensors = (self.weight, self.bias, self.boundary, self.full)
        assert all(one is None or one.is_contiguous() for one in tensors)
        return RouterStruct(
            *map(at, tensors), len(self.full), self.at_it, kind, self.shift, self.alpha
        )


def route(x: Tensor, depths: Tensor, asked: RouterAnswers) -> tuple[Tensor, Tensor, Tensor]:
    """Answers about x [M, D], each of its tokens at its own of the depths [M], in one call.

    Returns:
        Scores, gates and who goes on, [M] each.
    """
    x, depths = x.contiguous(), depths.contiguous()
    logits, gates = x.new_empty(2, len(x)).unbind()
    goes = x.new_empty(len(x), dtype=torch.bool)
    kernels().mor_route(
        byref(asked.struct()), at(x), *x.shape, at(depths), at(logits), at(gates), at(goes)
    )
    return logits, gates, goes


@dataclass(frozen=True)
class Settling:
    """What becomes of the layers' output.

    Attributes:
        lanes: [., D] where it goes.
        gates: [.] gate of the last answer of each; None where the router has none.
        rule: of the update, one of :data:`RULES`; its gate is that of the answer before.
        ahead: which depth is asked about: so many behind that of the token.
        router: whom to ask; None where all go on.
    """

    lanes: Tensor
    gates: Tensor | None
    rule: str
    ahead: int
    router: RouterAnswers | None


class LanePass:
    """A stage, with all that stays the same from call to call.

    Args:
        stack: its layers.
        pages: the pool and the stage's page table; its columns are not looked at.
        first: the table's layer of the first of these layers.
        source: [., D] rows that streams come from.
        turns: cosines and sines of all positions, [places, d] each.
        settling: what becomes of the output; None where it is only given back.
    """

    def __init__(
        self,
        stack: PackedStack,
        pages: Ragged,
        first: int,
        source: Tensor,
        turns: tuple[Tensor, Tensor],
        settling: Settling | None,
    ) -> None:
        self.stack, self.pages, self.settling = stack, pages, settling
        self._kept = source, turns
        after = settling or Settling(source, None, "last", 0, None)
        asked = RouterStruct() if after.router is None else after.router.struct()
        lanes = None if settling is None else at(settling.lanes)
        self.struct = PassStruct(
            at(source), lanes, at(after.gates), *map(at, turns), source.shape[1],
            turns[0].shape[1], first, after.ahead, RULES.index(after.rule), asked,
        )  # fmt: skip

    def __call__(
        self, numbers: Tensor, tokens: int, pieces: int, writes: int, index: Tensor | None = None
    ) -> Tensor:
        """Run the stage.

        Args:
            numbers: int64 [7 tokens + 5 pieces] columns, as :class:`mor.engine.view.Flat` has them.
            tokens, pieces: how many there are.
            writes: the first so many tokens leave entries.
            index: int64 [tokens] rows of the source; None for the tokens' lanes.

        Returns:
            bool [tokens] who goes on; or the output [tokens, D], where it goes to no lane.
        """
        stack, threads = self.stack, torch.get_num_threads()
        one, work, turn = stack.layers[0], stack.work, self.struct.turn
        goes = stream = None
        if self.settling is None:
            stream = torch.empty(tokens, one.width, dtype=torch.float32, device="cpu")
        else:
            goes = torch.empty(tokens, dtype=torch.bool, device="cpu")
        kernels().mor_pass(
            byref(self.struct), stack.structs, len(stack.layers), byref(self.pages.struct),
            numbers.data_ptr(), tokens, pieces, writes, one.uses > 1, at(index),
            work.room("stream", tokens * one.width) if stream is None else stream.data_ptr(),
            work.room("cos", tokens * turn), work.room("sin", tokens * turn),
            *stack.rooms(tokens, writes, threads), at(goes), threads,
        )  # fmt: skip
        found = goes if stream is None else stream
        assert found is not None
        return found

    def write_entries(self, numbers: Tensor, tokens: int) -> None:
        """Write keys and values made of the streams as they are, for every layer; none is run.

        Args:
            numbers: int64 [7 tokens] columns, as :meth:`__call__` takes them; the depth is which
                norms are used, entries go to ``written`` and ``own_row``.
            tokens: how many there are.
        """
        stack, threads = self.stack, torch.get_num_threads()
        one, work, turn = stack.layers[0], stack.work, self.struct.turn
        query, key_value, _, rows, *_ = stack.rooms(tokens, tokens, threads)
        kernels().mor_entries(
            byref(self.struct), stack.structs, len(stack.layers), byref(self.pages.struct),
            numbers.data_ptr(), tokens, one.uses > 1, work.room("stream", tokens * one.width),
            work.room("cos", tokens * turn), work.room("sin", tokens * turn), query, key_value,
            rows, threads,
        )  # fmt: skip
