"""Tasks of known difficulty: right answers, the same documents always, labels on answers alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mor.data import PackedDataset, prepare
from mor.data.tasks import TASKS, open_task, task_tokenizer
from mor.data.tasks.phop import find_hop
from mor.errors import MorError

SOURCES = (
    "task:hops:symbols=5,hops=4",
    "task:hops:symbols=6,hops=3,graph=cycle",
    "task:phop:symbols=3,length=40,hops=4",
    "task:chains:operations=3",
    "task:mano:length=4",
)


def answer_hops(words: list[str], place: int) -> str:
    facts = dict(word.split(">") for word in words if ">" in word)
    symbol, steps = words[place].split("^")
    for _ in range(int(steps)):
        symbol = facts[symbol]
    return symbol


def answer_phop(words: list[str], place: int) -> str:
    at = place - 1
    for _ in range(int(words[place][1:])):
        at = max(i for i in range(at) if words[i] == words[at]) + 1
    return words[at]


def answer_chains(words: list[str], place: int) -> str:
    begin = max(i for i in range(place) if words[i].startswith("len")) + 1
    result, sign = 0, 1
    for word in words[begin:place]:
        if word in "+-":
            sign = 1 if word == "+" else -1
        else:
            result += sign * int(word)
    return str(result % 100)


def answer_mano(words: list[str], place: int) -> str:
    def value(i: int) -> tuple[int, int]:
        if words[i] not in "+-*":
            return int(words[i]), i + 1
        a, after = value(i + 1)
        b, end = value(after)
        return {"+": a + b, "-": a - b, "*": a * b}[words[i]] % 23, end

    begin = max(i for i in range(place) if words[i].startswith("len")) + 1
    result, end = value(begin)
    assert end == place
    return str(result)


ANSWERS = {
    "hops": answer_hops,
    "phop": answer_phop,
    "chains": answer_chains,
    "mano": answer_mano,
}


@pytest.mark.parametrize("source", SOURCES)
@settings(max_examples=20)
@given(number=st.integers(0, 10_000), seed=st.integers(0, 100))
def test_every_answer_is_right_and_every_word_is_known(source: str, number: int, seed: int) -> None:
    task = open_task(f"{source},seed={seed}")
    words = task.text(number).split()
    assert set(words) <= set(task.words())
    assert len(task.words()) == len(set(task.words()))
    places = [i for i, word in enumerate(words) if word in task.queries()]
    assert places
    for place in places:
        assert words[place + 1] == ANSWERS[task.name](words, place)
    assert task.text(number) == open_task(f"{source},seed={seed}").text(number)


@pytest.mark.parametrize("source", SOURCES)
def test_documents_differ_and_difficulties_are_drawn_evenly(source: str) -> None:
    task = open_task(source)
    texts = [task.text(number) for number in range(300)]
    assert len(set(texts)) > 250
    counts: dict[int, int] = {}
    for text in texts:
        for word in text.split():
            if word in task.levels():
                counts[task.levels()[word]] = counts.get(task.levels()[word], 0) + 1
    assert sorted(counts) == list(range(1, max(counts) + 1))
    assert max(counts.values()) < 1.8 * min(counts.values())


def test_a_cycle_goes_through_all_symbols() -> None:
    task = open_task("task:hops:symbols=7,hops=3,graph=cycle")
    for number in range(30):
        facts = dict(w.split(">") for w in task.text(number).split() if ">" in w)
        symbol, seen = "s0", set()
        for _ in range(7):
            symbol = facts[symbol]
            seen.add(symbol)
        assert symbol == "s0"
        assert len(seen) == 7


def test_a_jump_without_a_target_is_told() -> None:
    assert find_hop(np.array([0, 1, 2, 3]), 1) is None
    assert find_hop(np.array([3, 1, 2, 3]), 1) == 1
    assert find_hop(np.array([3, 1, 2, 3]), 2) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("task:leaps", "use one of: hops, phop, chains, mano, formulas"),
        ("task:hops:symbol=8", "did you mean 'symbols'"),
        ("task:hops:symbols=many", "is of type int"),
        ("task:hops:symbols", "is no field=value"),
        ("task:hops:symbols=1", "symbols=1, expected 2 to 64"),
        ("task:hops:skew=-1.0", "skew=-1.0, expected 0 to 8"),
        ("task:hops:graph=tree", "expected 'permutation' or 'cycle'"),
        ("task:phop:length=8", "length=8, expected 64 or more"),
        ("task:chains:documents=0", "documents=0, expected 1 or more"),
    ],
)
def test_a_wrong_task_is_named(source: str, message: str) -> None:
    with pytest.raises(MorError, match=message):
        open_task(source)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.hidden])
def test_prepared_tasks_have_labels_at_answers_alone(name: str, tmp_path: Path) -> None:
    small = {"phop": ",length=40,symbols=2"}.get(name, "")
    source = f"task:{name}:documents=300{small}"
    index = prepare(source, tmp_path / "data", validation_fraction=0.2)
    task = open_task(source)
    tokenizer = task_tokenizer(task)
    assert index.vocab_size == len(task.words()) + 2
    assert index.num_documents("train") + index.num_documents("validation") == 300
    marks = index.task
    assert marks is not None
    assert marks.settings["name"] == name
    dataset = PackedDataset(tmp_path / "data", "train", 20, loss_on="answers")
    everything = PackedDataset(tmp_path / "data", "train", 20)
    queries = torch.tensor(tokenizer.convert_tokens_to_ids(task.queries()))
    answers = 0
    for place in range(len(dataset)):
        row, plain = dataset[place], everything[place]
        ids, labels = row["input_ids"], row["labels"]
        wanted = torch.isin(ids[:-1], queries)
        assert torch.equal(labels[1:] != -100, wanted)
        assert torch.equal(labels[1:][wanted], ids[1:][wanted])
        assert labels[0] == -100
        assert torch.equal(plain["labels"], ids)
        answers += int(wanted.sum())
    assert answers


def test_levels_follow_the_last_mark(tmp_path: Path) -> None:
    index = prepare("task:chains:documents=200", tmp_path / "data", validation_fraction=0.2)
    marks = index.task
    assert marks is not None
    vocabulary = task_tokenizer(open_task("task:chains")).get_vocab()
    text = "+ len2 1 + 2 - 3 = 0 len1 4 + 4 = 8"
    ids = np.array([[vocabulary[word] for word in text.split()]])
    assert marks.level(ids).tolist() == [[0, *[2] * 8, *[1] * 6]]


def test_text_has_no_answers(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(4):
        (text / f"{number}.txt").write_text(f"some words, number {number} " * 30)
    prepare(text, tmp_path / "data", vocab_size=260, validation_fraction=0.3)
    with pytest.raises(MorError, match=r"loss_on is 'answers', but .* prepared from text"):
        PackedDataset(tmp_path / "data", "train", 16, loss_on="answers")


def test_a_task_has_a_vocabulary_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(MorError, match="vocabulary of its own"):
        prepare("task:hops", tmp_path / "data", tokenizer=tmp_path)


def test_a_skew_prefers_short_ways() -> None:
    task = open_task("task:hops:hops=4,skew=1.0")
    asked = [
        int(word.split("^")[1])
        for number in range(500)
        for word in task.text(number).split()
        if "^" in word
    ]
    shares = [asked.count(k) / len(asked) for k in range(1, 5)]
    # 1, 1/2, 1/3 and 1/4 over their sum, 25/12; 4,000 draws.
    for share, weight in zip(shares, (1, 1 / 2, 1 / 3, 1 / 4), strict=True):
        assert abs(share - weight * 12 / 25) < 0.03


@pytest.mark.parametrize("source", SOURCES)
def test_words_are_read_back_with_blanks_between_them(source: str) -> None:
    task = open_task(source)
    tokenizer, text = task_tokenizer(task), task.text(3)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.split())
    assert tokenizer.decode(ids) == text
