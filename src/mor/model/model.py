"""The network: ``embed -> prelude -> recurse(depth) -> coda -> head``. There is no other copy.

Training and evaluation call :meth:`MoRModel.forward`, which runs the five stages in order; the
Hugging Face wrapper calls forward; the engine calls the stages.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mor.config import MoRConfig
from mor.config.choices import Routing
from mor.model.attend.protocol import Attend
from mor.model.cache import DepthCache
from mor.model.ends import build_head, pool
from mor.model.front import build_front, read_inputs
from mor.model.layers import DecoderLayer, RMSNorm
from mor.model.layout import Layout
from mor.model.limits import check_cache, check_exits, choose_rule, limit_depth
from mor.model.output import ModelOutput
from mor.model.recorder import Recorder
from mor.model.recursion import run_recursions
from mor.model.relaxation import DepthEmbedding
from mor.model.routers import build_router
from mor.model.routers.base import Router, active_router
from mor.model.seam import Seam, build_seam
from mor.model.wide import StaysWide
from mor.ops.cross_entropy import linear_cross_entropy, plain_cross_entropy
from mor.ops.rope import Rotation, grid_rotation, inverse_frequencies, rotation


class MoRModel(StaysWide):
    """Mixture-of-Recursions model (arXiv 2507.10524), vanilla and recursive included.

    Weights that are shared are one tensor under one name: ``block.i`` is the shared layer i. A
    tied head is the embedding itself.
    """

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens: nn.Embedding = build_front(config)  # type: ignore[assignment]
        self.prelude_layers = nn.ModuleList(
            DecoderLayer(config) for _ in range(config.num_prelude_layers)
        )
        self.block = nn.ModuleList(
            DecoderLayer(config, config.num_recursions) for _ in range(config.num_recursion_layers)
        )
        self.depth_embedding: DepthEmbedding | None = None
        if config.relaxation == "embeddings":
            self.depth_embedding = DepthEmbedding(config.hidden_size, config.num_recursions)
        self.seam: Seam | None = build_seam(config)
        self.coda_layers = nn.ModuleList(
            DecoderLayer(config) for _ in range(config.num_coda_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = build_head(config)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.router: Router = build_router(config)  # type: ignore[assignment]
        self.gradient_checkpointing = False

    # The five stages -----------------------------------------------------------------------------

    def embed(self, inputs: Tensor) -> Tensor:
        """Ids [B, N], pixels [B, C, H, W] or frames [B, T, bins] -> stream [B, N, D]."""
        return self.embed_tokens(inputs)

    def prelude(
        self, hidden: Tensor, rope: Rotation, attend: Attend, recorder: Recorder | None = None
    ) -> Tensor:
        """The private layers before the recursion, [B, N, D] -> [B, N, D]."""
        return self.run_layers(self.prelude_layers, hidden, rope, attend, recorder=recorder)

    def recurse(
        self,
        hidden: Tensor,
        depth: int | Tensor,
        rope: Rotation,
        attend: Attend,
        origin: Tensor | None = None,
    ) -> Tensor:
        """One pass of the shared block at ``depth`` over the tokens given, [A, M, W] -> [A, M, W].

        The output carries the residual stream; what becomes of it is the router's ``update``.

        Args:
            hidden: [A, M, W] what is carried between passes, from :meth:`widen`.
            rope, attend: as a layer takes them.
            depth: one for all tokens, or one per token [A, M]. In the second case ``attend`` knows
                which token is at which depth, and gets a layer's place within the block.
            origin: [A, M, W] the same before depth 0, where :attr:`needs_origin` asks for it.

        Raises:
            ValueError: a depth per token where single layers are repeated (``sequence``).
        """
        if self.seam is None:
            return self._pass(hidden, depth, rope, attend)
        entered = self.seam.enter(hidden, origin, depth)
        output = self._pass(entered, depth, rope, attend)
        return self.seam.leave(hidden, entered, output, depth)

    def _pass(self, hidden: Tensor, depth: int | Tensor, rope: Rotation, attend: Attend) -> Tensor:
        """The layers of the shared block at ``depth``, [A, M, D] -> [A, M, D]."""
        if self.depth_embedding is not None:
            hidden = self.depth_embedding(hidden, depth)
        if isinstance(depth, Tensor):
            if self.config.interleaved:
                raise ValueError(
                    f"sharing={self.config.sharing!r} repeats single layers; a depth per token "
                    "needs the block to be applied as a whole: use 'cycle' or 'middle_cycle'"
                )
            return self.run_layers(self.block, hidden, rope, attend, depth)
        first = depth * self.config.num_recursion_layers
        for unrolled in range(first, first + self.config.num_recursion_layers):
            layer = self.block[self.config.shared_layer(unrolled)]
            use = self.config.repetition(unrolled)
            hidden = self._layer(layer, hidden, rope, attend, unrolled, use)
        return hidden

    def coda(
        self, hidden: Tensor, rope: Rotation, attend: Attend, recorder: Recorder | None = None
    ) -> Tensor:
        """The private layers after the recursion, [B, N, D] -> [B, N, D]."""
        return self.run_layers(self.coda_layers, hidden, rope, attend, recorder=recorder)

    def widen(self, hidden: Tensor) -> Tensor:
        """The stream [A, N, D] as it is carried between passes, [A, N, W]; D = W without a seam."""
        return hidden if self.seam is None else self.seam.widen(hidden)

    def narrow(self, carried: Tensor) -> Tensor:
        """The stream [A, N, D] that is seen of what is carried [A, N, W]."""
        return carried if self.seam is None else self.seam.narrow(carried)

    @property
    def carried_width(self) -> int:
        """W, numbers per token that are carried between passes."""
        return self.config.hidden_size * self.config.recursion_streams

    @property
    def needs_origin(self) -> bool:
        """Whether a pass, or the router's update, looks at what was carried before depth 0."""
        injects = self.seam is not None and self.seam.injects
        return injects or active_router(self.router).returns_to_origin

    def head(self, hidden: Tensor, real: Tensor | None = None) -> Tensor:
        """Final norm and projection, [..., D] -> logits [..., V] or the next patch or frame.

        Classes: [B, T, D] -> [B, num_labels], pooled over the tokens that are ``real`` [B, T].
        """
        normed = self.norm(hidden)
        if self.config.head_type == "classes":
            normed = pool(normed, real, self.config.classifier_pooling)
        return self.lm_head(normed)

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross-entropies of :meth:`head` at ``targets``, the logits never all there.

        Args:
            hidden: [B, T, D]. targets: [B T], -100 where there is none.
        """
        head: nn.Module = self.lm_head
        if type(head) is not nn.Linear:  # an adapter sits on it
            return plain_cross_entropy(self.head(hidden).flatten(0, -2), targets)
        normed = self.norm(hidden).flatten(0, -2)
        return linear_cross_entropy(normed, head.weight, targets)

    # Around them ---------------------------------------------------------------------------------

    def rope(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Rotation of ``positions`` [B, N]."""
        if self.config.modality == "image":
            theta, width = self.config.rope_parameters["rope_theta"], self.config.head_dim
            return grid_rotation(positions, self.config.patch_grid[1], width, theta, dtype)
        frequencies, scale = inverse_frequencies(self.config, positions.device)
        return rotation(positions, frequencies, scale, dtype)

    def use_compiled_layers(self, compiled: bool = True) -> None:
        """Run every layer's two halves through ``torch.compile`` (or no longer)."""
        for module in self.modules():
            if isinstance(module, DecoderLayer):
                module.compiled = compiled

    def _layer(
        self,
        layer: nn.Module,
        hidden: Tensor,
        rope: Rotation,
        attend: Attend,
        index: int,
        use: int | Tensor = 0,
    ) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # Non-reentrant: shared keys and values reach later layers outside the arguments.
            return checkpoint(layer, hidden, rope, attend, index, use, use_reentrant=False)
        return layer(hidden, rope, attend, index, use)

    def run_layers(
        self,
        layers: nn.ModuleList,
        hidden: Tensor,
        rope: Rotation,
        attend: Attend,
        use: int | Tensor = 0,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """The layers of a stage one after another, [A, M, D] -> [A, M, D].

        Args:
            layers: of the stage; a layer's place is its number for ``attend``.
            hidden, rope, attend, use: as a layer takes them.
            recorder: keeps the stream after each layer.
        """
        for place, layer in enumerate(layers):
            hidden = self._layer(layer, hidden, rope, attend, place, use)
            if recorder is not None:
                recorder.add_state(hidden)
        return hidden

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: DepthCache | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        routing: Routing | None = None,
        max_depth: int | None = None,
        keep_states: bool = False,
        keep_traces: bool = False,
        exits: Collection[int] = (),
        features: Tensor | None = None,
    ) -> ModelOutput:
        """Run ``embed``, ``prelude``, the recursions and ``coda``; ``head`` is left to the caller.

        Args:
            input_ids: [B, T] token ids, or ``inputs_embeds`` [B, T, D].
            attention_mask: [B, T'] with T' >= T, 1 for real tokens; the last T columns count (of
                frames, all). Padding may stand anywhere; it is never routed, cached or attended to.
            positions: [B, T]; default counts the real tokens of each row or document.
            cache: keys and values of earlier calls; new ones are added.
            document_ids: [B, T] which document of its row a token belongs to, each document in one
                piece. A document is then a sequence of its own in every respect: its tokens see no
                others, and what training selects per sequence is selected per document.
            routing: ``topk`` is training's selection (it may look ahead), ``causal`` is
                ``router.decide``, and with ``full`` every token runs every recursion up to the
                depth cap. Default: ``topk`` in training mode and for encoders whose router selects
                within a row, else ``causal``.
            max_depth: depth cap, 1..R.
            keep_states, keep_traces: fill the output's fields of the same name.
            exits: after how many recursions, 1..R, to put the stream through the coda too; those
                past the depth cap are left out.
            features: in place of ids: pixels [B, C, H, W], or frames [B, T', bins], whose real
                tokens come out at the front of each row.

        Raises:
            ValueError: inputs of the wrong shape, a depth cap or an exit outside 1..R, documents or
                exits with a cache.
        """
        given = (input_ids, inputs_embeds, features, attention_mask)
        hidden, attention_mask = read_inputs(self.embed_tokens, *given)
        limit = limit_depth(self.config, max_depth)
        check_cache(self.config, cache)
        check_exits(self.config, exits, cache)
        layout = Layout.of(self.config, hidden, attention_mask, document_ids, cache, positions)
        if layout is None:  # padding and nothing else
            return ModelOutput.nothing(hidden)
        router, kv = active_router(self.router), layout.kv
        routing = choose_rule(self.config, router, routing, self.training)
        taught = routing == "topk" and router.training
        recorder = Recorder(keep_states, keep_traces, with_losses=taught, exits=exits)
        hidden = layout.lay(hidden)
        rope = self.rope(layout.positions, hidden.dtype)
        recorder.add_state(hidden)
        hidden = self.prelude(hidden, rope, kv.prelude(), recorder)
        carried, depths = run_recursions(
            self, router, self.widen(hidden), rope, layout,
            routing=routing, max_depth=limit, recorder=recorder,
        )  # fmt: skip
        hidden = self.coda(self.narrow(carried), rope, kv.coda(), recorder)
        kv.finish()
        last = layout.restore(hidden)
        outs = {
            passes: last if passes == limit else layout.restore(self.coda(stream, rope, kv.coda()))
            for passes, stream in recorder.exits.items()
        }
        return ModelOutput(
            last,
            layout.restore(depths),
            recorder.losses,
            [layout.restore(state) for state in recorder.states or ()],
            recorder.traces,
            outs,
            attention_mask,
        )
