"""Few-shot tasks: the questions, and the command."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest

from mor.data import packages
from mor.errors import MorError
from mor.eval.harness import sets
from mor.eval.harness.run import choose_tasks, local_tasks, need_harness

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
