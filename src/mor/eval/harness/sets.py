"""Questions that need no hub: out of packages, or made from text that a model was not trained on.

Each function gives `{"test": rows}` for `custom_dataset` of a task in `tasks/`. lm-eval hands over
its metadata, in which `--model_args` (so `pretrained`) and `--metadata` are.
"""

from __future__ import annotations

import json
import random
import re
import zipfile
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mor.data import DataIndex, PackedDataset
from mor.data import load_tokenizer as load_data_tokenizer
from mor.data.packages import fetch_wheel
from mor.errors import MorError
from mor.run_files import RECIPE

EVALS = (
    "evals",
    "3.0.1.post1",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
_QUESTIONS = "evals/registry/data/"
_LETTERS = "ABCDEFGH"

Rows = list[dict[str, Any]]


def load_quartz(**metadata: Any) -> dict[str, Any]:
    """Two-way questions of qualitative physics (QuaRTz)."""
    return _test(_questions("quartz/samples.jsonl", r"(.*)\n\s*A: (.*)\n\s*B: (.*)"))


def load_socialiqa(**metadata: Any) -> dict[str, Any]:
    """Three-way questions about people (Social IQa)."""
    form = r"(.*?) A: (.*); B: (.*); C: (.*?)\.?"
    return _test(_questions("theory_of_mind/socialiqa/test.jsonl", form))


def load_logiqa(**metadata: Any) -> dict[str, Any]:
    """Four-way questions of logic with a passage (LogiQA)."""
    choices = "".join(rf"\n{letter}\. (?:{letter}\.)?(.*?)" for letter in "ABCD")
    # The answer stands in the text as well.
    form = rf"(.*?){choices}(?:\nAnswer:.*)?"
    return _test(_questions("logiqa/logiqa.jsonl", form))


def load_mmlu_dev(**metadata: Any) -> dict[str, Any]:
    """The development questions of MMLU that come with lm-eval; their worked answers left out."""
    folder = resources.files("lm_eval") / "tasks" / "mmlu" / "flan_cot_fewshot"
    prompts = json.loads((folder / "_cot_prompts.json").read_text(encoding="utf-8"))
    rows = []
    for subject in sorted(prompts):
        for block in re.split(r"\n\n(?=Q: )", prompts[subject])[1:]:
            question, _, answer = block.removeprefix("Q: ").partition("\nA: ")
            letter = re.search(r"The answer is \(([A-D])\)", answer)
            parts = re.split(r"\s*\(([A-D])\) ", question)
            if letter and parts[1::2] == list("ABCD"):
                rows.append(_row(parts[0], parts[2::2], letter[1]) | {"subject": subject})
    return _test(rows)


def load_last_words(**metadata: Any) -> dict[str, Any]:
    """Passages of held-out text whose last word was said before: `context` and `word`.

    As in LAMBADA the last sentence alone does not give the word away, and the passage can.
    """
    rows = []
    for paragraphs in _held_out(metadata):
        for text in paragraphs:
            rows += [row for row in map(split_last_word, cut_passages(text)) if row is not None]
    return _test(_some(rows))


def load_glosses(**metadata: Any) -> dict[str, Any]:
    """Held-out dictionary entries: which of four meanings belongs to these words?"""
    draw, rows = random.Random(0), []
    for paragraphs in _held_out(metadata, "glosses/"):
        entries = []
        for text in paragraphs:
            words, _, meaning = text.partition(": ")
            meaning = meaning.split(";")[0].strip()
            if words and len(meaning.split()) >= 3:
                entries.append((words, meaning))
        # A document is of one subject, so a wrong meaning is near the right one.
        meanings = {meaning for _, meaning in entries}
        for words, meaning in entries if len(meanings) >= 4 else []:
            others = draw.sample(sorted(meanings - {meaning}), 3)
            place = draw.randrange(4)
            choices = [*others[:place], meaning, *others[place:]]
            rows.append({"question": words, "choices": choices, "answer": place})
    return _test(_some(rows))


def cut_passages(text: str, least: int = 40) -> list[str]:
    """A paragraph in pieces of whole sentences, each of at least so many words."""
    pieces: list[str] = []
    sentences: list[str] = []
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", text):
        sentences.append(sentence)
        if sum(len(part.split()) for part in sentences) >= least:
            pieces.append(" ".join(sentences))
            sentences = []
    return pieces


def split_last_word(text: str) -> dict[str, Any] | None:
    """The passage without its last word; None where it is no such passage."""
    words = text.split()
    if not words:
        return None
    match = re.fullmatch(r"([A-Za-z]{3,})[.!?]", words[-1]) if len(words) <= 120 else None
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
    if match is None or len(sentences) < 2:
        return None
    before = {re.sub(r"\W", "", word).lower() for word in " ".join(sentences[:-1]).split()}
    inside = {re.sub(r"\W", "", word).lower() for word in sentences[-1].split()[:-1]}
    word = match[1].lower()
    if word not in before or word in inside:
        return None
    return {"context": " ".join(words[:-1]), "word": match[1]}


def _row(question: str, choices: list[str], letter: str) -> dict[str, Any]:
    answer = _LETTERS.find(letter.strip()[:1])
    if not 0 <= answer < len(choices):
        raise MorError(f"the question {question[:60]!r} has no answer {letter!r}")
    return {
        "question": " ".join(question.split()),
        "choices": [" ".join(choice.split()) for choice in choices],
        "answer": answer,
    }


def _questions(name: str, form: str) -> Iterator[dict[str, Any]]:
    """The questions of a file of the package, whose last message has this form."""
    archive = fetch_wheel(*EVALS)
    try:
        with zipfile.ZipFile(archive) as wheel:
            lines = wheel.read(_QUESTIONS + name).decode("utf-8").splitlines()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise MorError(f"cannot read {name} in the archive {archive}: {error}") from error
    for record in map(json.loads, lines):
        text = record["input"][-1]["content"].strip()
        match = re.fullmatch(form, text, re.S)
        if match is None:
            raise MorError(f"{name} in the archive {archive}: another form of question: {text!r}")
        yield _row(match[1], list(match.groups()[1:]), record["ideal"])


def _test(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The rows as lm-eval takes them: a split that is a data set of Hugging Face's."""
    from datasets import Dataset

    return {"test": Dataset.from_list(list(rows))}


def _some(rows: Rows, most: int = 1000) -> Rows:
    if not rows:
        raise MorError(
            "the held-out text of that folder holds no such question; the task is made for data "
            "of `mor data prepare english`, give such a folder with --data DIR"
        )
    return random.Random(0).sample(rows, min(most, len(rows)))


def _held_out(metadata: dict[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """The paragraphs of each held-out document whose name begins with `prefix`."""
    index = DataIndex.load(_data_folder(metadata))
    tokenizer = load_data_tokenizer(index.tokenizer_dir)
    dataset = PackedDataset(index.directory, "validation", 2)
    for name, tokens in dataset.iter_documents():
        if name.startswith(prefix):
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            yield [" ".join(block.split()) for block in text.split("\n\n") if block.strip()]


def _data_folder(metadata: dict[str, Any]) -> Path:
    """`data` of the metadata, or what the run of `pretrained` was trained on."""
    if metadata.get("data"):
        return Path(str(metadata["data"]))
    folder = Path(str(metadata.get("pretrained", "")))
    for place in (folder / RECIPE, folder.parent / RECIPE):
        if place.is_file():
            recipe = yaml.safe_load(place.read_text(encoding="utf-8"))
            path = recipe.get("data", {}).get("path")
            if path and Path(path).is_dir():
                return Path(path)
    raise MorError(
        "questions made from held-out text need the prepared data folder: --data DIR, or with "
        "lm-eval's command --metadata data=DIR"
    )
