"""Which systems take part, from the words of the command line.

vanilla  vanilla@34  mor3  recursive3  mor3:no_refill  mor3:int8  mor3:min_gather=16  DIR  name=DIR
transformers  openvino  openvino:int8  openvino:float32-f32cache  vllm  llamacpp  llamacpp:int8
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mor.bench.forced import bench_config
from mor.config import MoRConfig
from mor.engine.scheduler import Policy
from mor.errors import MorError
from mor.folder.config import load_config
from mor.model.packed import Quantization

PEERS = ("transformers", "openvino", "vllm", "llamacpp", "fake")
FAMILY = re.compile(r"(vanilla|recursive|mor)(\d+)?(?:@(\d+))?")


@dataclass(frozen=True)
class Spec:
    """One system, not made yet.

    Attributes:
        name: its row in the table; what the user wrote.
        kind: ``shape`` (random weights), ``folder`` (a trained model), or ``peer``.
        family, recursions, layers: of a shape.
        folder: of a trained model.
        options: for :class:`mor.engine.Engine`.
        peer, variant: of a peer.
    """

    name: str
    kind: Literal["shape", "folder", "peer"]
    family: str = ""
    recursions: int = 1
    layers: int | None = None
    folder: Path | None = None
    options: tuple[tuple[str, Any], ...] = ()
    peer: str = ""
    variant: str = ""


def parse_spec(text: str) -> Spec:
    """A system from its word.

    Raises:
        MorError: saying what can be written.
    """
    head, _, tail = text.partition(":")
    if head in PEERS:
        return Spec(text, "peer", peer=head, variant=tail or "float32")
    options = tuple(_option(part) for part in tail.split(",")) if tail else ()
    if found := FAMILY.fullmatch(head):
        family, number, layers = found.groups()
        recursions = int(number or (1 if family == "vanilla" else 3))
        if (family == "vanilla") != (recursions == 1):
            raise MorError(f"system={text!r}: vanilla has one recursion, {family} more than one")
        return Spec(
            text, "shape", family, recursions, int(layers) if layers else None, options=options
        )
    name, _, folder = head.rpartition("=")
    if not Path(folder).is_dir():
        raise MorError(
            f"system={text!r} is not known; write vanilla, vanilla@LAYERS, morR, recursiveR, a "
            f"model folder (NAME=DIR), or a peer: {', '.join(PEERS[:-1])}; options of the engine "
            "go behind a colon (mor3:no_refill,min_gather=16)"
        )
    label = text if not name else name + (f":{tail}" if tail else "")
    return Spec(label, "folder", folder=Path(folder), options=options)


def config_of(spec: Spec, shape: str) -> MoRConfig:
    """The configuration of one of our systems."""
    if spec.folder is None:
        return bench_config(shape, spec.recursions, spec.layers, spec.family)
    config: MoRConfig = load_config(spec.folder)
    return config


def _option(part: str) -> tuple[str, Any]:
    """``no_refill``, ``int8`` or ``key=value``; numbers and truth values are read as such."""
    if part in get_args(Policy):
        return "policy", part
    if part in get_args(Quantization):
        return "quantization", part
    key, equals, value = part.partition("=")
    words = (*get_args(Policy), *get_args(Quantization))
    if not equals or not key.isidentifier():
        raise MorError(
            f"option {part!r} must be one of {', '.join(words)}, or KEY=VALUE for the engine"
        )
    if value in ("True", "False"):
        return key, value == "True"
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value


def default_systems(shape: str, recursions: tuple[int, ...], int8: bool = False) -> list[str]:
    """Vanilla, MoR at each R, the peers; and a vanilla as deep as a MoR that had to be deeper.

    ``int8`` adds the same with weights of 8 bits.

    The paper pads its 360M model to 34 layers at R = 4 and compares with a vanilla of 34.
    """
    names = ["vanilla", *(f"mor{r}" for r in recursions)]
    plain = bench_config(shape).num_hidden_layers
    if shape == "360m":
        deep = {bench_config(shape, r).num_hidden_layers for r in recursions} - {plain}
        names[1:1] = [f"vanilla@{layers}" for layers in sorted(deep)]
    names += [f"{name}:int8" for name in names] if int8 else []
    return [*names, "transformers", "openvino", *(["openvino:int8"] if int8 else []), "vllm"]
