"""``MoRForConditionalGeneration``: images at their places, saved and loaded, through every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from mor import ConfigError, MoRForCausalLM, MoRForConditionalGeneration
from mor.engine import EmbeddedPrompt, Engine
from mor.hf.load import load_model
from tests.engine.oracle import greedy
from tests.media_models import (
    PATCHES,
    image_config,
    image_model,
    image_processor,
    image_tokenizer,
    picture,
    pixels_of,
)
from tests.strategies import make_model, small_config

NEW = 5
TEXTS = ["<image>a picture", "of <image> and <image>the digit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image-text")
    image_model().save_pretrained(path)
    image_processor().save_pretrained(path)
    return path


def write(model: Any, inputs: Any, **options: Any) -> list[list[int]]:
    """New tokens of each row."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    whole = model.generate(**inputs, **settings | options)
    return whole[:, inputs["input_ids"].shape[1] :].tolist()


def asked(texts: Any, images: Any) -> Any:
    return image_processor()(
        text=texts, images=images, return_tensors="pt", padding=True, padding_side="left"
    )


def test_the_processor_lays_patches_where_the_texts_say() -> None:
    found = asked(TEXTS, [[picture(1)], [picture(2), picture(3)]])
    places = found["input_ids"] == image_tokenizer().convert_tokens_to_ids("<image>")
    assert places.sum(1).tolist() == [PATCHES, 2 * PATCHES]
    assert found["attention_mask"][0].sum() < found["attention_mask"][1].sum()
    wanted = torch.stack([pixels_of(seed) for seed in (1, 2, 3)])
    torch.testing.assert_close(found["pixel_values"], wanted)
    flat = asked(TEXTS, [picture(1), picture(2), picture(3)])
    assert torch.equal(flat["pixel_values"], found["pixel_values"])
    alone = image_processor()(text="a picture", return_tensors="pt")
    assert set(alone) == {"input_ids", "attention_mask"}
    assert set(image_processor()(images=picture(1), return_tensors="pt")) == {"pixel_values"}


@pytest.mark.parametrize(("texts", "images"), [("a", 1), ("<image>", 0), ("<image><image>", 1)])
def test_texts_and_images_must_fit(texts: str, images: int) -> None:
    with pytest.raises(ValueError, match=r"times, and there are \d images"):
        image_processor()(text=texts, images=[picture(1)] * images)
    with pytest.raises(ValueError, match="give text, images"):
        image_processor()()


@pytest.mark.parametrize("router", ["threshold", "expert_choice"])
def test_answers_are_the_same_cached_or_not_alone_or_padded_and_from_the_engine(
    router: str,
) -> None:
    model = image_model(router)
    images = [[picture(1)], [picture(2), picture(3)]]
    batch = write(model, asked(TEXTS, images))
    engine = Engine(model, max_num_seqs=2, prefill_chunk=5, page_size=4)
    for text, own, wanted in zip(TEXTS, images, batch, strict=True):
        one = asked(text, own)
        assert write(model, one) == [wanted]
        ids = one["input_ids"]
        if len(own) == 1:
            assert write(model, one, use_cache=False) == [wanted]
        with torch.no_grad():
            features = model.get_image_features(one["pixel_values"]).flatten(0, 1)
        places = (ids[0] == model.config.image_token_id).nonzero()[:, 0].tolist()
        prompt = EmbeddedPrompt(ids[0].tolist(), features, places)
        (output,) = engine.generate(prompt, greedy(NEW, ignore_eos=True))
        assert list(output.completions[0].token_ids) == wanted
        assert len(set(output.completions[0].prompt_depths)) > 1


def test_beams_and_samples_of_a_row_see_its_own_images() -> None:
    model, images = image_model(), [[picture(1)], [picture(2), picture(3)]]
    rows = write(model, asked(TEXTS, images), num_beams=2, num_return_sequences=2)
    for number, text in enumerate(TEXTS):
        alone = write(model, asked(text, images[number]), num_beams=2, num_return_sequences=2)
        assert rows[2 * number : 2 * number + 2] == alone


def test_the_forward_is_that_of_the_embeddings_and_text_alone_is_the_language_model() -> None:
    model = image_model()
    one = asked(TEXTS[0], picture(1))
    with torch.no_grad():
        embeds = model.embed_prompt(one["input_ids"], one["pixel_values"])
        whole = model(**one).logits
        assert torch.equal(whole, model(inputs_embeds=embeds).logits)
        moved = torch.stack([pixels_of(2)])
        assert not torch.equal(whole, model(one["input_ids"], moved).logits)
        ids = torch.tensor([[5, 6, 7]])
        plain = MoRForCausalLM(image_config(image_token_id=None, image_size=None)).double().eval()
        plain.model.load_state_dict(model.model.state_dict())
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_the_loss_reaches_the_image_part() -> None:
    model = MoRForConditionalGeneration(image_config())
    one = asked(TEXTS[0], picture(1))
    labels = one["input_ids"].masked_fill(one["input_ids"] == model.config.image_token_id, -100)
    model.train()
    model(**one, labels=labels).loss.backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.any())
        for parameter in model.image_prefix.parameters()
    )


def test_a_folder_gives_back_model_and_processor(folder: Path) -> None:
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(loaded) is MoRForConditionalGeneration
    mine = image_model().state_dict()
    assert all(torch.equal(mine[name], value) for name, value in loaded.state_dict().items())
    processor: Any = AutoProcessor.from_pretrained(folder)
    one = processor(text=TEXTS[0], images=picture(1), return_tensors="pt")
    assert write(loaded.eval(), one) == write(image_model(), one)
    assert type(load_model(folder)) is MoRForConditionalGeneration
    with pytest.raises(ConfigError, match="image_token_id"):
        AutoModelForImageTextToText.from_config(small_config("threshold"))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    MoRForConditionalGeneration(image_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.model.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_language_model_becomes_one_that_reads_images(tmp_path: Path) -> None:
    plain = MoRForCausalLM(image_config(image_token_id=None, image_size=None, patch_size=None))
    plain.save_pretrained(tmp_path)
    tokenizer = image_tokenizer.__wrapped__()  # no processor has put its name on it
    tokenizer.save_pretrained(tmp_path)
    loaded, info = MoRForConditionalGeneration.from_pretrained(
        tmp_path, config=image_config(), output_loading_info=True
    )
    assert all(name.startswith("image_prefix.") for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert torch.equal(loaded.model.block[0].state_dict()["mlp.up_proj.weight"],
                       plain.model.block[0].state_dict()["mlp.up_proj.weight"])  # fmt: skip
    # A folder of text has no image processor, and AutoProcessor gives its tokenizer.
    assert AutoProcessor.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_the_pipeline_takes_pictures_in_calls_and_in_chats(folder: Path) -> None:
    pipe: Any = pipeline("image-text-to-text", model=str(folder))
    told = pipe(images=picture(1), text="<image>a", max_new_tokens=4, return_full_text=False)
    turn = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "a"}]
    chat = pipe(text=[{"role": "user", "content": turn}], max_new_tokens=4)
    assert chat[0]["generated_text"][-1]["content"] == told[0]["generated_text"]


def test_what_does_not_fit_is_named() -> None:
    model, one = image_model(), asked(TEXTS[0], picture(1))
    two = {**one, "pixel_values": one["pixel_values"].repeat(2, 1, 1, 1)}
    with pytest.raises(ValueError, match="2 images of 8 patches each, which takes 16 places"):
        model(**two)
    with pytest.raises(ValueError, match="2 images"):
        model.generate(**two)
    with pytest.raises(ValueError, match=r"takes \[B, 1, 8, 16\]"):
        model(one["input_ids"], torch.zeros(1, 3, 8, 16))
    with pytest.raises(ValueError, match="go with input_ids"):
        model(pixel_values=one["pixel_values"])
    with pytest.raises(ValueError, match="need input_ids"):
        model.generate(pixel_values=one["pixel_values"])
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
        model.generate(**one, prompt_lookup_num_tokens=2)
    with pytest.raises(TypeError, match="pixel_value'; did you mean 'pixel_values'"):
        model(one["input_ids"], pixel_value=one["pixel_values"])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"image_token_id": 100_000}, "image_token_id=100000"),
        ({"image_token_id": -1}, "image_token_id=-1"),
        ({"image_size": None}, "image_size=None"),
        ({"patch_size": 3}, "patch_size=3 must divide"),
        ({"num_channels": 0}, "num_channels=0"),
        ({"max_position_embeddings": 4}, "less than the 8 patches"),
        ({"modality": "image", "num_labels": 3}, "is for models of text"),
    ],
)
def test_configurations_that_cannot_be_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        image_config(**fields)


def test_a_plain_model_refuses_pictures_by_name() -> None:
    model = make_model(small_config("threshold"), 1)
    with pytest.raises(TypeError, match="pixel_values"):
        model(torch.tensor([[1, 2]]), pixel_values=torch.zeros(1, 1, 8, 16))
