"""Few-shot tasks: likelihoods of our model in lm-eval against one by one and against its `hf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mor.errors import MorError

TEXTS = [
    ("the king said to thee", " and thou"),
    ("the king", " crown"),
    ("the king", " night"),
    ("", "my lord of night"),
    ("Scene 1. the crown of night and thee, my lord. " * 3, " said"),
    ("of night ", "and"),
]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    pytest.importorskip("lm_eval")
    from mor.eval.harness.lm import MorLM

    return MorLM(str(folder), batch_size=4)


def test_likelihoods_are_those_of_hf_and_of_one_by_one(folder: Path, ours: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    from mor.eval.harness.lm import MorLM

    asked = requests("loglikelihood", TEXTS)
    single = MorLM(str(folder), batch_size=1)
    theirs = HFLM(pretrained=ours.model, tokenizer=ours.tokenizer, batch_size=3)
    batched = ours.loglikelihood(asked, disable_tqdm=True)
    for other in (single, theirs):
        for mine, wanted in zip(
            batched, other.loglikelihood(asked, disable_tqdm=True), strict=True
        ):
            assert mine[0] == pytest.approx(wanted[0], abs=1e-4)
            assert mine[1] == wanted[1]
    rolled = requests("loglikelihood_rolling", [(text * 9,) for text, _ in TEXTS if text])
    expected = theirs.loglikelihood_rolling(rolled, disable_tqdm=True)
    assert ours.loglikelihood_rolling(rolled, disable_tqdm=True) == pytest.approx(
        expected, abs=1e-3
    )
    ids = ours.tok_encode(TEXTS[4][0])
    depths = ours.model(torch.tensor([ids]), routing="causal", use_cache=False).depths
    assert len(set(depths.flatten().tolist())) > 1  # or nothing was tested of the routing


def test_the_engine_reads_what_requests_share_once(folder: Path, ours: Any) -> None:
    from mor.eval.harness.lm import MorLM

    shots = "the king said to thee and thou my lord of night. " * 3
    texts = [(shots, " crown"), (shots, " night"), (shots, " night"), (shots + "and", " thou")]
    texts += [("the king " * 60, " night of thee"), *TEXTS]  # one that is cut to the length
    asked = requests("loglikelihood", texts)
    served = MorLM(str(folder), engine=True, batch_size=2)
    wanted = ours.loglikelihood(asked, disable_tqdm=True)
    for mine, other in zip(served.loglikelihood(asked, disable_tqdm=True), wanted, strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]
    engine = served._open_engine()
    assert engine.stats.reused_tokens > 0
    rolled = requests("loglikelihood_rolling", [(text * 9,) for text, _ in TEXTS if text])
    assert served.loglikelihood_rolling(rolled, disable_tqdm=True) == pytest.approx(
        ours.loglikelihood_rolling(rolled, disable_tqdm=True), abs=1e-3
    )


def test_weights_of_the_engine_and_generation(folder: Path, ours: Any) -> None:
    from mor.eval.harness.lm import MorLM

    served = MorLM(str(folder), engine=True)
    asked = requests("loglikelihood", TEXTS)
    wanted = [score for score, _ in ours.loglikelihood(asked, disable_tqdm=True)]
    got = [score for score, _ in served.loglikelihood(asked, disable_tqdm=True)]
    assert got == pytest.approx(wanted, abs=1e-4)

    options = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    texts = served.generate_until(requests("generate_until", [("the king", options)]))
    ids = torch.tensor([ours.tok_encode("the king")])
    new = ours.model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    expected = ours.tokenizer.decode(new, skip_special_tokens=True)
    assert texts == [expected.split("\n")[0]]
    with pytest.raises(MorError, match=r"generation option num_beams=4 is not known"):
        served.generate_until(requests("generate_until", [("a", {"num_beams": 4})]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "yes"}, r"engine='yes' must be true or false"),
        ({"quantization": "int8"}, r"quantization='int8' needs engine=true"),
        ({"dtype": "float8"}, r"dtype='float8' is not known"),
        ({"max_length": 65}, r"max_length=65 must be a whole number in 2\.\.64"),
        ({"max_depth": 4}, r"max_depth=4 must be a whole number in 1\.\.3"),
        ({"batch_size": 0}, r"batch_size=0 must be a whole number of at least 1"),
        ({"device": "gpu"}, r"device='gpu' is not here; use cpu"),
    ],
)
def test_wrong_arguments(folder: Path, options: dict[str, Any], message: str) -> None:
    pytest.importorskip("lm_eval")
    from mor.eval.harness.lm import MorLM

    with pytest.raises(MorError, match=message):
        MorLM(str(folder), **options)


def test_a_gpu_that_is_not_there_is_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's command asks for cuda:0 on every machine."""
    pytest.importorskip("lm_eval")
    from mor.eval.harness.devices import choose_device
    from mor.eval.harness.lm import MorLM

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert MorLM(str(folder), device="cuda:0").original.device.type == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert str(choose_device("cuda:1")) == "cuda:1"
    assert str(choose_device(None)) == "cuda"
    with pytest.raises(MorError, match=r"device='cuda:2' is not here; use cpu, cuda or cuda:N"):
        choose_device("cuda:2")


def test_the_name_is_known(ours: Any) -> None:
    from lm_eval.api.registry import get_model

    assert get_model("mor") is type(ours)
