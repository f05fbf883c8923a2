from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mor.config import MoRConfig
from mor.data import DataIndex, PackedDataset, load_tokenizer
from mor.eval import calibrate
from mor.hf.modeling import MoRForCausalLM
from tests.tiny import prepare_tiny, tiny_fields


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder; read only."""
    return prepare_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routed model whose tokens leave at different depths, with its tokenizer."""
    torch.manual_seed(0)
    index = DataIndex.load(data)
    config = MoRConfig(
        **tiny_fields(data, Path("unused"))["model"],
        vocab_size=index.vocab_size,
        eos_token_id=index.eos_token_id,
        add_bos_token=False,
        initializer_range=0.3,
    )
    model = MoRForCausalLM(config).eval()
    calibrate(model, PackedDataset(data, "train", 16))
    out = tmp_path_factory.mktemp("harness") / "model"
    model.save_pretrained(out)
    load_tokenizer(index.tokenizer_dir).save_pretrained(out)
    return out
