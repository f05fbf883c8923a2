"""Depth, as it follows from a configuration's fields: how deep, which family, which layer when."""

from __future__ import annotations


class Depth:
    """What follows from the fields of depth and routing; a base of :class:`~mor.config.MoRConfig`.

    The names below are fields of the configuration.
    """

    num_recursions: int
    num_recursion_layers: int
    num_prelude_layers: int
    num_coda_layers: int
    sharing: str
    router: str

    @property
    def num_hidden_layers(self) -> int:
        """Unrolled depth: prelude + R x block + coda."""
        recursion = self.num_recursions * self.num_recursion_layers
        return self.num_prelude_layers + recursion + self.num_coda_layers

    @property
    def is_routed(self) -> bool:
        """Whether tokens may differ in depth, so that rows have to be compacted."""
        return self.router != "fixed"

    @property
    def family(self) -> str:
        """``vanilla``, ``recursive`` or ``mor``: the paper's three families."""
        if self.is_routed:
            return "mor"
        return "vanilla" if self.num_recursions == 1 else "recursive"

    @property
    def interleaved(self) -> bool:
        """Whether each shared layer is repeated in a row (``sequence``) rather than the block."""
        return self.sharing.endswith("sequence")

    def shared_layer(self, unrolled: int) -> int:
        """Index of the shared layer that unrolled recursion layer ``unrolled`` (0-based) uses."""
        if self.interleaved:
            return unrolled // self.num_recursions
        return unrolled % self.num_recursion_layers

    def repetition(self, unrolled: int) -> int:
        """How often that shared layer has been used before (0 for its first use)."""
        if self.interleaved:
            return unrolled % self.num_recursions
        return unrolled // self.num_recursion_layers
