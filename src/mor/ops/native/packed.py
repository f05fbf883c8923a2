"""Products with a few rows, and a layer's two halves, over packed weights.

A row's result is the same to the last bit whatever rows are beside it, and however many.
"""

from __future__ import annotations

import math
import time
from ctypes import byref
from functools import cache

import torch
from torch import Tensor

from mor.ops.native.calls import GROUP, LayerStruct, LinearStruct, Workspace, at, kernels, shape
from mor.ops.native.tuning import Tuning, tune


class PackedLinear:
    """``x @ weight.T + bias``, the weights laid out for products with a few rows.

    Args:
        weights: [n, k] each, on the CPU, one below the other. With ``paired``, two of equal shape
            whose panels alternate.
        biases: one per weight, or none at all.
        int8: keep weights as bytes with a scale per output, and make the inputs bytes with a scale
            per row and 64 inputs.
        tuned: choose how products go first, if nobody has yet in this process.
        halves: keep weights that bfloat16 holds exactly in it, which changes no result.
    """

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor | None],
        *,
        paired: bool = False,
        int8: bool = False,
        tuned: bool = True,
        halves: bool = True,
    ) -> None:
        panel = shape()[0]
        if tuned:
            choose_tuning()
        # The kernels read floats, whatever these are.
        floats = [w.detach().float() for w in weights]
        weight = floats[0] if len(floats) == 1 else torch.cat(floats)
        given = [b for b in biases if b is not None]
        bias = None
        if given:
            bias = torch.cat(
                [weight.new_zeros(len(w)) if b is None else b.detach().float()
                 for w, b in zip(weights, biases, strict=True)]
            )  # fmt: skip
        if paired:
            weight = _alternate(weight, panel)
            bias = None if bias is None else _alternate(bias, panel)
        self.n, self.k = weight.shape
        count = -(-self.n // panel)
        weight = weight.contiguous()
        self.weight: Tensor | None = None
        self.bytes: tuple[Tensor, Tensor, Tensor] | None = None
        if int8:
            groups = -(-self.k // GROUP)
            self.bytes = (
                weight.new_empty(count * panel * groups * GROUP, dtype=torch.int8),
                weight.new_empty(count * panel),
                weight.new_empty(count * panel * groups, dtype=torch.int32),
            )
            kernels().mor_pack8(at(weight), self.n, self.k, *map(at, self.bytes))
        elif halves and is_exact(weight[:1]) and is_exact(weight):  # one row mostly says no
            self.weight = weight.new_empty(count * panel * -(-self.k // 2), dtype=torch.int32)
            kernels().mor_pack16(at(weight), self.n, self.k, at(self.weight))
        else:
            self.weight = weight.new_empty(count * panel * self.k)
            kernels().mor_pack(at(weight), self.n, self.k, at(self.weight))
        self.bias = None
        if bias is not None:
            self.bias = torch.nn.functional.pad(bias, (0, count * panel - self.n)).contiguous()
        of_bytes = self.bytes or (None, None, None)
        small = self.weight is not None and self.weight.dtype == torch.int32
        of_floats, of_halves = (None, self.weight) if small else (self.weight, None)
        self.struct = LinearStruct(
            at(of_floats), at(self.bias), self.n, self.k, *map(at, of_bytes), at(of_halves)
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weights take."""
        parts = [t for t in (self.weight, self.bias, *(self.bytes or ())) if t is not None]
        return sum(part.nbytes for part in parts)

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        """[M, k] -> [M, n]."""
        x = x.contiguous()
        out = x.new_empty(len(x), self.n)
        rows = work.rows("rows", len(x), self.k)
        threads = torch.get_num_threads()
        kernels().mor_linear(byref(self.struct), at(x), len(x), at(out), rows, threads)
        return out

    def after_norm(self, x: Tensor, norm: Tensor, eps: float, work: Workspace) -> Tensor:
        """[M, k] -> [M, n], normalised (RMSNorm) first."""
        x, norm = x.contiguous(), norm.detach().float().contiguous()
        out = x.new_empty(len(x), self.n)
        rows, threads = work.rows("rows", len(x), self.k), torch.get_num_threads()
        kernels().mor_head(byref(self.struct), at(norm), eps, at(x), len(x), at(out), rows, threads)
        return out


def is_exact(weight: Tensor) -> bool:
    """Whether bfloat16 holds every number of a float32 tensor as it is."""
    return torch.equal(weight, weight.bfloat16().float())


@cache
def choose_tuning() -> Tuning:
    """How products go in this process; see :mod:`mor.ops.native.tuning`."""
    work = Workspace()
    made: list[tuple[PackedLinear, Tensor]] = []

    def measure(_: Tuning) -> float:
        if not made:
            for inputs, outputs in ((576, 1536), (1536, 576)):
                weight = torch.full((outputs, inputs), 0.01, dtype=torch.float32, device="cpu")
                packed = [
                    PackedLinear([weight], [None], tuned=False, halves=False) for _ in range(4)
                ]
                made.extend(
                    (p, weight.new_full((n, inputs), 0.5)) for n in (24, 384) for p in packed
                )
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        spent = {24: 0.0, 384: 0.0}
        with torch.no_grad():
            for linear, x in made:
                began = clock()
                linear(x, work)
                spent[len(x)] += clock() - began
        # Few rows count as much as many, though they take less.
        return math.sqrt(spent[24] * spent[384])

    return tune(measure)


def _alternate(both: Tensor, panel: int) -> Tensor:
    """The two halves of ``both``, padded to whole panels, a panel of each in turn."""
    first, second = both.chunk(2)
    missing = -len(first) % panel
    pad = (0, missing) if both.dim() == 1 else (0, 0, 0, missing)
    parts = [
        torch.nn.functional.pad(half, pad).unflatten(0, (-1, panel)) for half in (first, second)
    ]
    return torch.stack(parts, dim=1).flatten(0, 2)


class PackedLayer:
    """A decoder layer's two halves in one call each.

    Args:
        query, key_value, out, gate_up, down: its products.
        input_norm, post_norm, query_norm, key_norm: weights [D] or [uses, D]; the last two may be
            missing.
        gains: of what attention and the feed-forward add, [uses, D] each, or none.
        heads, kv_heads, head_dim, eps: as in the configuration.
    """

    def __init__(
        self,
        query: PackedLinear,
        key_value: PackedLinear,
        out: PackedLinear,
        gate_up: PackedLinear,
        down: PackedLinear,
        norms: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        gains: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.linears = (query, key_value, out, gate_up, down)
        self.norms = tuple(None if n is None else n.detach().float().contiguous() for n in norms)
        self.width, self.inner = query.k, down.k
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.gains = (
            (None, None)
            if gains is None
            else tuple(gain.detach().float().contiguous() for gain in gains)
        )
        norm_uses = 1 if norms[0].dim() == 1 else len(norms[0])
        self.struct = LayerStruct(
            *(linear.struct for linear in self.linears), *(at(n) for n in self.norms),
            *(at(g) for g in self.gains), norm_uses, self.width, heads, kv_heads, head_dim,
            self.inner, eps,
        )  # fmt: skip
        self.uses = len(gains[0]) if gains else norm_uses

    def uses_of(self, use: int | Tensor, count: int) -> Tensor | None:
        """[M] uses; None where they make no difference."""
        if self.uses == 1:
            return None
        if isinstance(use, int):
            return torch.full((count,), use, dtype=torch.long, device="cpu")
        return use.flatten().contiguous()

    def enter(
        self, x: Tensor, cos: Tensor, sin: Tensor, use: int | Tensor, with_kv: int, work: Workspace
    ) -> tuple[Tensor, Tensor]:
        """What comes before attention.

        Args:
            x: [M, D] stream. cos, sin: [M, head_dim].
            use: which use of the layer, one or [M].
            with_kv: the first so many tokens have keys and values.

        Returns:
            Query [M, H, d]; key and value [with_kv, 2, Hkv, d].
        """
        count = len(x)
        query = x.new_empty(count, self.heads, self.head_dim)
        key_value = x.new_empty(with_kv, 2, self.kv_heads, self.head_dim)
        uses = self.uses_of(use, count)
        kernels().mor_enter(
            byref(self.struct), at(x), at(cos), at(sin), at(uses), count, with_kv, at(query),
            at(key_value), work.rows("rows", count, self.width), torch.get_num_threads(),
        )  # fmt: skip
        return query, key_value

    def leave(self, x: Tensor, mixed: Tensor, use: int | Tensor, work: Workspace) -> Tensor:
        """What comes after: x [M, D] and mixed [M, H, d] -> [M, D]."""
        count, threads = len(x), torch.get_num_threads()
        out = torch.empty_like(x)
        uses = self.uses_of(use, count)
        rows = work.rows("rows", count, max(self.width, self.heads * self.head_dim))
        inner = work.rows("inner", count, self.inner)
        kept = work.rows("kept", count, threads * shape()[0])
        kernels().mor_leave(
            byref(self.struct), at(x), at(mixed), at(uses), count, at(out), rows, inner, kept,
            threads,
        )  # fmt: skip
        return out
