"""The kernel in Triton compiles for GPUs, with tensor cores; no GPU is needed, but Triton is."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton, which does not interpret", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize(
    ("capability", "dtype", "kind", "longest", "product"),
    [
        (80, "bf16", 0, 1, "mma.sync"),
        (90, "bf16", 0, 64, "wgmma.mma_async"),
        (89, "bf16", 2, 1, "mma.sync"),
        (80, "fp16", 1, 64, "mma.sync"),
        (90, "fp32", 0, 64, "fma.rn.f32"),  # exact products: no tensor cores
    ],
)
def test_it_compiles(capability: int, dtype: str, kind: int, longest: int, product: str) -> None:
    triton: Any = import_module("triton")
    target = import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    kernel: Any = import_module("mor.ops.paged.kernel")
    sizes, options = kernel.kernel_sizes(3, 64, longest, dtype == "fp32")
    constants = {
        "RAGGED": longest > 1, "SEARCH": 5, "KIND": kind, "PAGE": 16, "KV_HEADS": 5, "GROUP": 3,
        "WIDTH": 64, "WIDE": False, **sizes,
    }  # fmt: skip
    pool = (dtype, "i8", "u8")[kind]
    types = dict.fromkeys(("out", "query"), f"*{dtype}")
    types |= dict.fromkeys(("keys", "values"), f"*{pool}")
    types |= dict.fromkeys(("key_scales", "value_scales"), "*fp32")
    types |= dict.fromkeys(("table", "used", "starts"), "*i32") | {"scale": "fp32"}
    types |= dict.fromkeys(("rows", "query_stride", "head_stride", "table_stride"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel._attend.arg_names}
    source = import_module("triton.compiler").ASTSource(
        kernel._attend, signature=signature, constexprs=constants
    )
    assert product in triton.compile(source, target=target, options=options).asm["ptx"]
