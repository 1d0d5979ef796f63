"""The damage of data sets: what each kind does to a file, what is made of what comes of it, and the worker's ends."""

import gzip
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.schema import ConfigError
from scripts import damage_data
from scripts.damage_data import (
    DAMAGES,
    ERROR,
    HANG,
    NO_EFFECT,
    REPAIRED,
    SILENT,
    TRACEBACK,
    VAGUE,
    Damage,
    Failure,
    Loaded,
    Outcome,
    Worker,
    answer,
    judge,
    table,
)

CLEAN = Loaded(frozenset({(1, 2, True, None), (3, 4, True, None)}), 2, frozenset({("a", "b", 1)}), ("old",))
PATH = Path("root/set/train.jsonl.gz")


class Here:
    """A worker in this process."""

    def ask(self, question: Any) -> Any:
        try:
            return damage_data.load(question)
        except ConfigError as error:
            return Failure(ERROR, str(error))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A folder with 300 pairs."""
    folder = tmp_path / "real" / "squad_sentences"
    folder.mkdir(parents=True)
    rows = [{"query": f"what is {number}", "positive": f"the animal {number}"} for number in range(300)]
    (folder / "train.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return folder


def outcomes(source: Path, root: Path) -> dict[str, Outcome]:
    return {each.kind: each for each in damage_data.try_set("squad_sentences", source, root, Here())}  # type: ignore[arg-type]


def test_every_damage_of_pairs_is_found_or_repaired(pairs: Path, tmp_path: Path) -> None:
    before = (pairs / "train.jsonl.gz").read_bytes()
    found = outcomes(pairs, tmp_path / "root")
    assert len(found) == len(DAMAGES["squad_sentences"]) > 20
    assert {each.outcome for each in found.values()} == {ERROR, REPAIRED}, found
    assert found["no JSON in a line"].words.startswith(f"squad_sentences{os.sep}train.jsonl.gz:151 is no JSON")
    assert found["an empty text"].outcome == found["null for a positive"].outcome == REPAIRED
    assert (pairs / "train.jsonl.gz").read_bytes() == before


def test_a_loader_that_says_nothing_or_trains_on_damage_is_found_out(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(place: str, column: str, value: object) -> str:
        return str(value)

    monkeypatch.setattr("trainer.data.pairs.checked_text", careless)
    few = [
        each for each in DAMAGES["squad_sentences"] if each.kind in ("a number for a text", "an array for an object")
    ]
    monkeypatch.setitem(DAMAGES, "squad_sentences", few)
    # Tables that are kept would be those of careful rules.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = outcomes(pairs, tmp_path / "root")
    assert found["a number for a text"].outcome == SILENT
    assert found["a number for a text"].words.startswith("1 damaged pairs are trained on")
    assert found["an array for an object"].outcome == ERROR


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (CLEAN, NO_EFFECT),
        (Loaded(CLEAN.trained, 3, CLEAN.scored, ("old",)), SILENT),
        (Loaded(frozenset(), 2, CLEAN.scored, ("old",)), SILENT),
        (Loaded(CLEAN.trained, 2, frozenset(), ("old",)), SILENT),
        (Loaded(frozenset({(1, 2, True, None)}), 1, CLEAN.scored, ("old", "1 left out")), REPAIRED),
        # A warning is no leave to train on what is damaged.
        (Loaded(frozenset({(1, 5, True, None)}), 1, CLEAN.scored, ("old", "1 left out")), SILENT),
        (Loaded(frozenset({(1, 2, False, None)}), 1, CLEAN.scored, ("old", "1 left out")), SILENT),
        (Failure(ERROR, f"{PATH}:7 is no JSON"), ERROR),
        (Failure(ERROR, f"{PATH}:8 is no JSON"), VAGUE),
        (Failure(ERROR, f"{PATH}:7 is no JSON\nreally"), VAGUE),
        (Failure(TRACEBACK, "KeyError: 1"), TRACEBACK),
        (Failure(HANG, "no answer"), HANG),
    ],
)
def test_what_may_come_of_damage_and_what_may_not(found: Loaded | Failure, expected: str) -> None:
    assert judge(CLEAN, found, PATH, [7], removed=False)[0] == expected


def test_an_error_about_a_whole_file_names_it_or_where_it_was() -> None:
    def outcome(words: str, *, removed: bool) -> str:
        return judge(CLEAN, Failure(ERROR, words), PATH, [], removed=removed)[0]

    assert outcome(f"{PATH} is empty", removed=False) == ERROR
    assert outcome(f"{PATH.parent} is empty", removed=False) == VAGUE
    assert outcome(f"{PATH.parent} has no file train", removed=True) == ERROR


def named(name: str, kind: str) -> Damage:
    return next(each for each in DAMAGES[name] if each.kind == kind)


def test_damage_is_where_it_says() -> None:
    rows = [{"_id": str(number), "text": f"t{number}", "title": "t"} for number in (31715818, 5, 6)]
    content = damage_data.pack([json.dumps(row).encode() for row in rows])

    def damaged(kind: str) -> tuple[list[str], list[int]]:
        new, lines = named("scifact", kind).new(content)
        assert new is not None
        return [line.decode() for line in damage_data.unpack(new)], lines

    after, lines = damaged("null for a text")
    assert lines == [1]
    assert json.loads(after[0]) == {"_id": "31715818", "text": None, "title": None}
    assert after[1:] == [json.dumps(row) for row in rows[1:]]
    assert damaged("an id twice") == ([json.dumps(rows[number]) for number in (0, 1, 2, 1)], [4])
    assert named("scifact", "a file missing").new(content) == (None, [])
    flipped, _ = named("scifact", "a gzip with a byte flipped").new(content)
    assert flipped is not None
    assert sum(one != other for one, other in zip(flipped, content, strict=True)) == 1


def test_damage_of_judgements() -> None:
    content = b"query-id\tcorpus-id\tscore\n1\t2\t1\n3\t4\t2\n"
    assert (
        named("scifact", "qrels: a word for a grade").new(content)[0]
        == content.replace(b"4\t2", b"4\t2")[:-2].replace(b"1\t2\t1", b"1\t2\tgood") + b"2\n"
    )
    assert named("scifact", "qrels: all ids unknown").new(content)[0] == (
        b"query-id\tcorpus-id\tscore\n1\tnobody\t1\n3\tnobody\t2\n"
    )
    assert named("scifact", "qrels: no header").new(content) == (b"1\t2\t1\n3\t4\t2\n", [1, 2])
    twice, lines = named("scifact", "qrels: a judgement twice, another grade").new(content)
    assert (twice, lines) == (content + b"1\t2\t0\n", [4])


def test_every_set_has_20_kinds_or_more_each_once() -> None:
    for name, damages in DAMAGES.items():
        kinds = [each.kind for each in damages]
        assert len(kinds) == len(set(kinds)) >= 20, name


def sleepy(question: str) -> str:
    """What the worker of the next test does."""
    if question == "hang":
        time.sleep(60)
    if question == "die":
        os._exit(3)
    if question == "wrong":
        raise ConfigError("a mistake")
    return question


def test_a_worker_that_hangs_or_dies_is_replaced(tmp_path: Path) -> None:
    with Worker(sleepy, tmp_path, 10) as worker:
        assert worker.ask("one") == "one"
        assert worker.ask("wrong") == Failure(ERROR, "a mistake")
        assert worker.ask("die") == Failure(TRACEBACK, "the process ended with status 3")
        assert worker.ask("two") == "two"
        worker.seconds = 0.1
        assert worker.ask("hang") == Failure(HANG, "no answer in 0.1 s")
        worker.seconds = 10
        assert worker.ask("three") == "three"


def test_an_exception_that_is_not_ours_is_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Connection:
        def __init__(self) -> None:
            self.questions: Iterator[str] = iter(["one"])
            self.answers: list[Any] = []

        def recv(self) -> str:
            try:
                return next(self.questions)
            except StopIteration:
                raise EOFError from None

        def send(self, given: Any) -> None:
            self.answers.append(given)

    connection = Connection()
    for name in ("HF_DATASETS_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    answer(connection, lambda question: {}[question], tmp_path)
    assert connection.answers == [Failure(TRACEBACK, "KeyError: 'one'")]


def test_the_table_the_file_and_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        Outcome(set="lfrqa", kind="one", file="f", outcome=ERROR, words="e"),
        Outcome(set="lfrqa", kind="two", file="f", outcome=REPAIRED, words="w"),
        Outcome(set="medquad", kind="two", file="f", outcome=SILENT, words="s"),
    ]
    assert list(table(found)) == [
        "| damage | lfrqa | medquad |",
        "|---|---|---|",
        "| one | error | - |",
        "| two | repaired | SILENT |",
        "3 damaged sets: 1 error, 1 repaired, 1 SILENT",
    ]

    class Idle(Here):
        def __init__(self, *arguments: object) -> None: ...

        def __enter__(self) -> "Idle":
            return self

        def __exit__(self, *error: object) -> None: ...

    for name in ("lfrqa", "medquad"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("LATEFORGE_DATA", str(tmp_path))
    monkeypatch.setattr(damage_data, "RESULTS", tmp_path / "results" / "damage.json")
    monkeypatch.setattr(damage_data, "Worker", Idle)
    monkeypatch.setattr(damage_data, "try_set", lambda name, *rest: [each for each in found if each.set == name])
    assert damage_data.main(["sets=lfrqa"]) == 0
    assert damage_data.main(["sets=lfrqa,medquad"]) == 1
    written = json.loads((tmp_path / "results" / "damage.json").read_text())
    assert written["counts"] == {ERROR: 1, REPAIRED: 1, SILENT: 1}
    assert written["damages"][2]["words"] == "s"
    assert written["command"] == "python -m scripts.damage_data sets=lfrqa,medquad"
    capsys.readouterr()
    assert damage_data.main(["sets=lfrqa,scifact"]) == 2
    assert "has no scifact: set LATEFORGE_DATA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sets=msmarco", "sets=msmarco: there is no msmarco; the sets are scifact,"),
        ("seconds=0", "seconds=0: the arguments are sets=, names with commas between, and seconds="),
        ("kinds=3", "kinds=3: the arguments are"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert damage_data.main([argument]) == 2
    assert capsys.readouterr().err.startswith(f"damage_data: {message}")
