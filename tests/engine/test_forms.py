"""Which form of attention an engine runs, and what is said where it cannot."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from mor.engine import Engine, forms
from mor.engine.attend import padded_attention
from mor.engine.forms import NAMES, Setting, choose_attention, explain_missing, name_of
from mor.errors import MorError
from mor.ops import native
from tests.engine.oracle import Oracle, greedy
from tests.strategies import make_model, random_ids, small_config

BF16, F32 = torch.bfloat16, torch.float32
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def setting(device: torch.device = CUDA, dtype: Any = BF16, entries: Any = None) -> Setting:
    config = small_config("fixed", head_dim=64)
    return Setting(config, device, dtype, dtype if entries is None else entries)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU of some capability with some packages; forms are named, not made."""

    def pretend(capability: tuple[int, int], *installed: str) -> None:
        def find(name: str) -> bool | None:
            return name in installed or None

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        for module in ("mor.ops.planned", "mor.ops.paged.varlen", "mor.ops.paged.flashinfer"):
            monkeypatch.setattr(f"{module}.find_spec", find)
        monkeypatch.setattr(forms, "_make", lambda name, setting: name)

    return pretend


FA3 = "flash_attn_interface"


@pytest.mark.parametrize(
    ("capability", "installed", "types", "wanted"),
    [
        ((9, 0), (FA3, "flashinfer", "triton"), (BF16, BF16), "varlen"),
        ((9, 0), ("flashinfer", "triton"), (BF16, BF16), "flashinfer"),
        ((9, 0), (FA3, "flashinfer", "triton"), (F32, F32), "triton"),
        ((9, 0), (FA3, "flashinfer", "triton"), (BF16, torch.int8), "triton"),
        ((10, 0), (FA3, "triton"), (BF16, BF16), "triton"),
        ((8, 6), (FA3, "flashinfer", "triton"), (BF16, BF16), "flashinfer"),
        ((8, 6), (FA3, "triton"), (BF16, torch.float8_e4m3fn), "triton"),
        ((7, 5), ("flashinfer", "triton"), (torch.float16, torch.float16), "plain"),
        ((8, 0), ("triton",), (torch.float64, torch.float64), "plain"),
    ],
)
def test_the_best_form_on_a_gpu(
    gpu: Any,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    installed: tuple[str, ...],
    types: tuple[torch.dtype, torch.dtype],
    wanted: str,
) -> None:
    gpu(capability, *installed)
    with caplog.at_level(logging.INFO, "mor.engine"):
        assert choose_attention("auto", setting(CUDA, *types)) == wanted
        assert choose_attention(None, setting(CUDA, *types)) == wanted
    assert f"attention over pages: {wanted}" in caplog.text
    if wanted != "varlen":
        assert "not varlen: " in caplog.text


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("varlen", setting(CPU), "it is for NVIDIA's GPUs, and the model is on cpu"),
        ("flashinfer", setting(CUDA, F32), "weights are torch.float32"),
        ("varlen", setting(CUDA), "the module flash_attn_interface is not installed"),
        ("flashinfer", setting(CUDA), "flashinfer-python is not installed"),
        ("triton", setting(CUDA), "the package triton is not installed"),
        ("native", setting(CUDA), "it is for the CPU, and the model is on cuda"),
        ("nativ", setting(CPU), "attention='nativ' is not known; use one of: auto, plain"),
        ("", setting(CPU), "attention='' is not known"),
        (5, setting(CPU), "attention=5 is not known"),
    ],
)
def test_a_form_that_cannot_run(gpu: Any, name: Any, own: Setting, message: str) -> None:
    gpu((9, 0))
    with pytest.raises(MorError) as caught:
        choose_attention(name, own)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_name_says_why_it_cannot_run_or_can(gpu: Any) -> None:
    gpu((8, 0))
    for name in NAMES[1:]:
        for own in (setting(CPU, F32), setting(CUDA), setting(torch.device("meta"))):
            reason = explain_missing(name, own)
            assert reason is None or reason.strip()


def test_an_engine_names_its_form() -> None:
    model = make_model(small_config("threshold", "recursive_update"), 1, torch.float64)
    oracle = Oracle(model)
    assert Engine(model, attention=padded_attention).attention == "padded"
    assert Engine(model, attention=lambda *a: a[0]).attention == "<lambda>"
    with_default = Engine(model, max_model_len=40).attention
    assert with_default == ("rows" if native.library() is None else name_of(forms._make(
        "native" if model.config.head_dim in native.HEAD_DIMS else "rows",
        setting(CPU),
    )))  # fmt: skip
    engine = Engine(model, attention="plain", max_model_len=40, page_size=3)
    assert engine.attention == "plain"
    for output in engine.generate([random_ids(i, 2 + 3 * i).tolist() for i in range(3)], greedy()):
        oracle.check(output, 8)
    with pytest.raises(MorError, match="attention='varlen' cannot run here"):
        Engine(model, attention="varlen")
