"""``lm_eval --model local-completions`` against a live server equals its own ``hf`` backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.server.live import NAME, Live, model, tokenizer

pytest.importorskip("lm_eval", reason="no lm_eval: pip install 'lm-eval[api]'")
pytest.importorskip("tenacity", reason="lm_eval's API models need it: pip install 'lm-eval[api]'")

CHOICES = [
    ("the king said to the", [" queen", " king", " crown of my lord"]),
    ("thou art", [" the crown", " naïve", " 東京", " x"]),
]
ROLLING = [
    "the king said to the queen: naïve – 東京 🙂🙂",
    "thou art the crown of my lord " * 12,  # longer than the window
]


def instances(kind: str, arguments: list[tuple[str, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=place)  # type: ignore[arg-type]
        for place, one in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def hf() -> Any:
    from lm_eval.models.huggingface import HFLM

    pretrained: Any = model()
    return HFLM(
        pretrained=pretrained, tokenizer=tokenizer(), max_length=100, batch_size=1, device="cpu"
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("tokenized", [True, False], ids=["ids", "texts"])
def test_the_same_numbers_as_hf(live: Live, hf: Any, saved: Path, tokenized: bool) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    served = LocalCompletionsAPI(
        model=NAME,
        base_url=f"{live.url}/v1/completions",
        tokenizer=str(saved),
        tokenized_requests=tokenized,
        max_length=102,
        batch_size=2,
        max_retries=1,
    )  # fmt: skip  (it keeps two tokens of `max_length` free, and `hf` none)
    # Multiple choice is this for each of the choices.
    asked = instances("loglikelihood", [(c, one) for c, many in CHOICES for one in many])
    for own, theirs in zip(served.loglikelihood(asked), hf.loglikelihood(asked), strict=True):
        assert own[0] == pytest.approx(theirs[0], abs=1e-4)
        assert own[1] == theirs[1]
    greedy = served.generate_until(
        instances("generate_until", [("the king", {"until": ["zz"], "max_gen_toks": 8})])  # type: ignore[list-item]
    )
    assert len(greedy) == 1
    rolling = instances("loglikelihood_rolling", [(text,) for text in ROLLING])
    wanted = hf.loglikelihood_rolling(rolling)
    assert served.loglikelihood_rolling(rolling) == pytest.approx(wanted, abs=1e-4)
