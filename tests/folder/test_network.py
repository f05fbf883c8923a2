"""A network read without Transformers' model is, to the last bit, that of ``from_pretrained``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mor.config import MoRConfig
from mor.engine import Engine, SamplingParams
from mor.engine.opening import load_servable
from mor.folder.network import is_plain, load_network
from mor.folder.tokenizer import load_tokenizer
from mor.hf.load import load_model
from mor.model.servable import ServedNetwork
from mor.ops.alignment import CACHE_LINE
from mor.run_files import SHIPPED
from tests.media_models import image_model
from tests.strategies import configs, make_model, random_ids, small_config

# What a server of texts runs before its first answer, in a process that is the command `mor`.
SERVE = """
import sys
sys.modules["mor_command"] = sys
from pathlib import Path
import mor.server.serve
from mor.cli.serve import serve
mor.server.serve.serve_on = lambda server, *rest: print(type(server).__name__)
serve(Path(sys.argv[1]), port=0)
heavy = ("transformers.modeling_utils", "transformers.models", "torch._dynamo", "mor.hf.modeling")
print([name for name in heavy if name in sys.modules])
"""


@given(configs(), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=25)
def test_the_same_tensors(config: MoRConfig, dtype: torch.dtype) -> None:
    with TemporaryDirectory() as folder:
        make_model(config).save_pretrained(folder)
        wanted, found = load_model(folder, dtype), load_network(folder, dtype)
    plain, read = wanted.model.state_dict(), found.model.state_dict()
    assert list(plain) == list(read)
    for name, tensor in plain.items():
        assert tensor.dtype == read[name].dtype, name
        assert torch.equal(tensor, read[name]), name
        assert read[name].data_ptr() % CACHE_LINE == 0, name
    tied = found.model.lm_head.weight is found.model.embed_tokens.weight
    assert tied == config.tie_word_embeddings
    assert len(list(found.model.parameters())) == len(list(wanted.model.parameters()))
    assert not found.training
    assert (found.dtype, found.device) == (wanted.dtype, wanted.device)
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()


@pytest.mark.parametrize("router", ["fixed", "expert_choice", "threshold", "token_choice"])
def test_an_engine_writes_the_same(router: str, tmp_path: Path) -> None:
    make_model(small_config(router, eos_token_id=5)).save_pretrained(tmp_path)
    prompt, asked = random_ids(3, 1, 11)[0].tolist(), SamplingParams(max_tokens=24, temperature=0)
    written = [
        [one.completions[0].token_ids for one in Engine(model).generate([prompt], asked)]
        for model in (load_model(tmp_path), load_network(tmp_path))
    ]
    assert written[0] == written[1]


def test_shards_and_files_of_torch(tmp_path: Path) -> None:
    made = make_model(small_config("threshold"))
    made.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    made.save_pretrained(tmp_path / "torch")
    content = load_file(tmp_path / "torch" / "model.safetensors")
    torch.save(content, tmp_path / "torch" / "pytorch_model.bin")
    (tmp_path / "torch" / "model.safetensors").unlink()
    for folder in ("shards", "torch"):
        read = load_network(tmp_path / folder).model.state_dict()
        for name, tensor in made.model.state_dict().items():
            assert torch.equal(tensor, read[name]), name


def test_what_reads_images_keeps_its_class(tmp_path: Path) -> None:
    image_model().save_pretrained(tmp_path)
    assert not is_plain(tmp_path)
    assert type(load_servable(tmp_path)).__name__ == "MoRForConditionalGeneration"
    text = tmp_path / "text"
    make_model(small_config("fixed")).save_pretrained(text)
    assert isinstance(load_servable(text), ServedNetwork)


def test_a_tokenizer_is_the_one_of_auto_tokenizer() -> None:
    plain, found = (
        AutoTokenizer.from_pretrained(SHIPPED / "prose"),
        load_tokenizer(SHIPPED / "prose"),
    )
    assert type(plain) is type(found)
    assert plain.get_vocab() == found.get_vocab()
    assert plain.special_tokens_map == found.special_tokens_map
    assert plain.init_kwargs == found.init_kwargs
    text = "To be, or\n not  to be.<|endoftext|>\u00e9"
    assert plain(text).input_ids == found(text).input_ids


def test_a_server_of_texts_does_without_modelling_code() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(SHIPPED / "prose")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["DrainingServer", "[]"]
