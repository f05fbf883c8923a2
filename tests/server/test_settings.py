"""Every option of ``mor serve`` reaches replicas, or is refused by its name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from mor.cli.serve import serve
from mor.engine import Engine
from mor.errors import MorError
from mor.server.build import Served
from mor.server.ray.settings import ELSEWHERE, Settings, read_settings
from tests.server.live import TEMPLATE, model, tokenizer

OPTIONS = {name: one.default for name, one in inspect.signature(serve).parameters.items()}
ENGINE = set(inspect.signature(Engine).parameters) - {"model"}
# Something else than the default, and where a server keeps it if not in its options.
OTHERS: dict[str, Any] = {
    "replicas": 2, "autoscale": "1:3", "upscale_seconds": 1.5, "downscale_seconds": 2.5,
    "api_key": "secret", "served_model_name": "x", "max_num_seqs": 3, "max_residents": 5,
    "max_waiting": 7, "max_model_len": 64, "max_depth": 1, "prefill_chunk": 8, "min_gather": 2,
    "page_size": 4, "num_pages": 200, "memory_fraction": 0.25, "quantization": "int8",
    "kv_cache_dtype": "int8", "dtype": "bfloat16", "attention": "plain", "prefix_caching": False,
    "max_restarts": 1, "max_body_bytes": 4096, "drain_seconds": 4.0, "playground": False,
    "cors_origin": ["http://a.b", "http://c.d"], "speculate": 2, "draft_depth": 2,
    "speculate_always": True,
}  # fmt: skip
KEPT: dict[str, tuple[str, Any]] = {
    "api_key": ("api_keys", ("secret",)), "served_model_name": ("name", "x"),
    "max_body_bytes": ("max_body", 4096),
    "cors_origin": ("cors_origins", ("http://a.b", "http://c.d")),
}  # fmt: skip
OF_REPLICAS = {"replicas", "autoscale", "upscale_seconds", "downscale_seconds", "drain_seconds"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", list(OPTIONS))
def test_every_option_is_an_argument_with_the_same_default_or_refused(name: str) -> None:
    if name in ELSEWHERE:
        assert name not in Settings.model_fields
        with pytest.raises(MorError, match=f"^{name} is no argument .*Ray Serve"):
            read_settings({name: "x"})
    else:
        assert Settings.model_fields[name].default == OPTIONS[name]


@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("model", *ELSEWHERE)])
def test_what_is_given_reaches_the_server(name: str, folder: Path, tmp_path: Path) -> None:
    if name == "chat_template":
        path = tmp_path / "t.jinja"
        path.write_text(TEMPLATE)
        served = read_settings({"model": str(folder), name: str(path)}).served()
        assert (served.chat_template, served.template_from) == (TEMPLATE, str(path))
        with pytest.raises(MorError, match="cannot be read"):
            read_settings({"model": str(folder), name: "/nowhere"}).served()
        return
    value = OTHERS[name]
    # ``serve run`` gives texts, a configuration values.
    for given in (value, value if isinstance(value, list) else str(value)):
        settings = read_settings({"model": str(folder), name: given})
        served = settings.served()
        if name in ENGINE:
            assert served.options[name] == value
        elif name in OF_REPLICAS:
            count = settings.count()
            told = {
                "replicas": count.most, "autoscale": f"{count.least}:{count.most}",
                "upscale_seconds": count.up, "downscale_seconds": count.down,
                "drain_seconds": settings.drain_seconds,
            }  # fmt: skip
            assert told[name] == value
        else:
            field, kept = KEPT.get(name, (name, value))
            assert getattr(served, field) == kept


def test_defaults_are_the_engines_own(folder: Path) -> None:
    served = read_settings({"model": str(folder)}).served()
    alone = Served(folder, "tiny")
    assert served.of_a_replica().api_keys == served.of_a_replica().cors_origins == ()
    for name in ("max_waiting", "max_body", "max_restarts", "playground", "dtype", "chat_template"):
        assert getattr(served, name) == getattr(alone, name)
    served.check()
