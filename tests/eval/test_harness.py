"""Few-shot tasks: likelihoods of our model in lm-eval against one by one and against its `hf`."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.config import MoRConfig
from mor.data import DataIndex, PackedDataset, load_tokenizer, packages
from mor.errors import MorError
from mor.eval import calibrate
from mor.eval.harness import sets
from mor.eval.harness.run import choose_tasks, local_tasks, need_harness
from mor.hf.modeling import MoRForCausalLM
from tests.tiny import tiny_fields

TEXTS = [
    ("the king said to thee", " and thou"),
    ("the king", " crown"),
    ("the king", " night"),
    ("", "my lord of night"),
    ("Scene 1. the crown of night and thee, my lord. " * 3, " said"),
    ("of night ", "and"),
]


@pytest.fixture(scope="module")
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


# Tasks ------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package of questions, with two of each kind."""

    def record(text: str, ideal: str) -> str:
        return json.dumps({"input": [{"role": "user", "content": text}], "ideal": ideal})

    quartz = [record("More heat. The ice\n\n A: melts\n B: grows", "A")] * 2
    people = [record("Ann ran. What next? A: rest; B: eat a lot; C: hate, all.", "C")]
    choices = "A. A.One.\nB. B.Two.\nC. Three.\nD. D.Four."
    logic = [record(f"\nPassage: P.Question: Which?\n{choices}\nAnswer: B", "B")]
    cache_dir.mkdir(exist_ok=True)
    path = cache_dir / f"{sets.EVALS[0]}-{sets.EVALS[1]}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, lines in (
            ("quartz/samples.jsonl", quartz),
            ("theory_of_mind/socialiqa/test.jsonl", people),
            ("logiqa/logiqa.jsonl", logic),
        ):
            archive.writestr(f"evals/registry/data/{name}", "\n".join(lines) + "\n")
    monkeypatch.setattr(sets, "EVALS", (*sets.EVALS[:2], packages.digest(path)))
    return path


def test_questions_out_of_the_package(wheel: Path) -> None:
    assert sets.load_quartz(pretrained="x")["test"][1] == {
        "question": "More heat. The ice",
        "choices": ["melts", "grows"],
        "answer": 0,
    }
    assert list(sets.load_socialiqa()["test"]) == [
        {
            "question": "Ann ran. What next?",
            "choices": ["rest", "eat a lot", "hate, all"],
            "answer": 2,
        }
    ]
    # The answer at the end of the text is not shown.
    assert list(sets.load_logiqa()["test"]) == [
        {
            "question": "Passage: P.Question: Which?",
            "choices": ["One.", "Two.", "Three.", "Four."],
            "answer": 1,
        }
    ]


def test_questions_of_another_form_are_refused(wheel: Path) -> None:
    with pytest.raises(MorError, match=r"socialiqa.*: another form of question: 'Ann ran"):
        list(sets._questions("theory_of_mind/socialiqa/test.jsonl", r"quartz"))
    with pytest.raises(MorError, match=r"cannot read none\.jsonl in the archive"):
        list(sets._questions("none.jsonl", ""))


def test_mmlu_questions_that_come_with_lm_eval() -> None:
    pytest.importorskip("lm_eval")
    rows = sets.load_mmlu_dev()["test"]
    assert len(rows) > 270
    assert {len(row["choices"]) for row in rows} == {4}
    assert all("think step by step" not in row["question"] for row in rows)


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("The old king. They bowed to the king.", ("The old king. They bowed to the", "king")),
        ("He saw the old king. The king saw the king.", None),  # the sentence gives it away
        ("He saw the queen. They bowed to the king.", None),
        ("They bowed to the king.", None),
        ("He saw the old king. They bowed to the king, so", None),
        ("", None),
    ],
)
def test_last_words(text: str, row: tuple[str, str] | None) -> None:
    wanted = None if row is None else {"context": row[0], "word": row[1]}
    assert sets.split_last_word(text) == wanted


def test_passages_are_whole_sentences() -> None:
    sentences = [f"Sentence {n} " + "w " * 18 + "end." for n in range(5)]
    pieces = sets.cut_passages(" ".join(sentences), least=40)
    assert pieces == [" ".join(sentences[:2]), " ".join(sentences[2:4])]


def test_held_out_questions_of_a_run(tmp_path: Path) -> None:
    """Through a run folder's recipe; the texts trained on give none."""
    from mor.data import prepare

    source = tmp_path / "text" / "glosses"
    source.mkdir(parents=True)
    for n in range(6):
        entries = [f"word{n}x{i}: the meaning number {n} of {i}; more" for i in range(6)]
        (source / f"{n}.txt").write_text("\n\n".join(entries))
    index = prepare(tmp_path / "text", tmp_path / "data", vocab_size=300, validation_fraction=0.2)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(f"data: {{path: {tmp_path / 'data'}}}\n")
    rows = sets.load_glosses(pretrained=str(run / "model"))["test"]
    assert len(rows) == 6 * index.num_documents("validation")
    for row in rows:
        number, place = row["question"].removeprefix("word").split("x")
        assert row["choices"][row["answer"]] == f"the meaning number {number} of {place}"
        assert len(set(row["choices"])) == 4
    with pytest.raises(MorError, match=r"holds no such question"):
        sets.load_last_words(data=str(tmp_path / "data"))
    with pytest.raises(MorError, match=r"need the prepared data folder: --data DIR"):
        sets.load_glosses(pretrained="elsewhere")


def test_names_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_tasks("local, piqa,piqa") == [*local_tasks(), "piqa"]
    assert "lambada_openai" in choose_tasks("paper")
    with pytest.raises(MorError, match=r"tasks='a,,b' must be names"):
        choose_tasks("a,,b")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MorError, match=r"pip install -e '.\[eval\]'"):
        need_harness()


@pytest.mark.filterwarnings("ignore")
def test_a_task_from_the_command_line(wheel: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from typer.testing import CliRunner

    from mor.cli.app import app

    out = tmp_path / "scores.json"
    command = ["eval", str(folder), "--tasks", "mor_quartz", "--json", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    scores = json.loads(out.read_text())["tasks"]["mor_quartz"]
    assert scores["samples"] == 2
    assert scores["acc"] in (0.0, 1.0)  # both questions are the same
