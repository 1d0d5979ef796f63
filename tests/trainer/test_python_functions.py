"""Every rule by which the standard library becomes examples, on a library of a few files; then the real counts."""

import platform
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.datafiles import error_of, every_example, make_set_config, texts
from trainer.data import load_data, python_functions
from trainer.data.tables import TrainingSet, identity

# More than 60 characters without a docstring.
BODY = "    first = value + 1\n    second = first * 2\n    return (first, second, value)\n"
SOURCE = "def {name}(value):\n" + BODY.rstrip("\n")


def function(docstring: str, *, name: str = "change", body: str = BODY) -> str:
    return f'def {name}(value):\n    """{docstring}"""\n{body}'


def words(count: int) -> str:
    return " ".join(f"word{number}" for number in range(count)) + "."


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that stands for the standard library."""
    folder = tmp_path / "library"
    folder.mkdir()
    paths = sysconfig.get_paths()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths | {"stdlib": str(folder)})
    return folder


def load(fraction: float = 0.0) -> tuple[TrainingSet, TrainingSet | None]:
    return python_functions.load("functions", make_set_config("python_functions", evaluation_fraction=fraction))


def read(library: Path, **files: str) -> list[dict[str, Any]]:
    """Write modules, by name, and return the examples in them."""
    for name, source in files.items():
        (library / f"{name}.py").write_text(source)
    train, held_out = load()
    assert held_out is None
    return every_example(train)


def queries(library: Path, **files: str) -> list[str]:
    return [example["query"] for example in read(library, **files)]


# Queries


@pytest.mark.parametrize(
    ("docstring", "query"),
    [
        ("Return the value after a change.", "Return the value after a change."),
        ("Return the value, but changed. It is a pair.", "Return the value, but changed."),
        ("Is the value changed here? No! Yes.", "Is the value changed here?"),
        ("Return the value of 3.5 plus it. More.", "Return the value of 3.5 plus it."),
        ("Return the value\n    after a change\n    without an end\n\n    More follows.",
         "Return the value after a change without an end"),
        ("\n    Return the value after a change.\n    ", "Return the value after a change."),
    ],
    ids=["one sentence", "two", "a question", "a dot in a number", "first paragraph over lines", "indented"],
)  # fmt: skip
def test_the_query_is_the_first_sentence_of_the_first_paragraph(docstring: str, query: str, library: Path) -> None:
    assert queries(library, a=function(docstring)) == [query]


@pytest.mark.parametrize(("count", "taken"), [(4, False), (5, True), (40, True), (41, False)])
def test_a_query_has_5_to_40_words(count: int, taken: bool, library: Path) -> None:
    found = queries(library, a=function(words(count)), b=function(words(9)))
    assert found == [*([words(count)] if taken else []), words(9)]


def test_a_query_that_comes_again_is_taken_once_in_the_order_of_the_paths(library: Path) -> None:
    first = function(words(5), name="one") + function(words(5), name="two")
    examples = read(library, b=function(words(5), name="three") + function(words(6)), a=first)
    assert [(example["query"], example["documents"]) for example in examples] == [
        (words(5), [SOURCE.format(name="one")]),
        (words(6), [SOURCE.format(name="change")]),
    ]


# Documents


def test_the_document_is_the_source_without_docstring_and_comments(library: Path) -> None:
    source = function(words(5), body="    # A comment that is long.\n" + BODY)
    [example] = read(library, a="import os\n\n" + source)
    assert example == {
        "query": words(5),
        "query_identity": identity(words(5)),
        "documents": [SOURCE.format(name="change")],
        "document_identities": [identity(SOURCE.format(name="change"))],
        "positives": 1,
        "scores": [],
        "place": f"{library}/a.py:3",
    }


def test_methods_coroutines_and_inner_functions_are_examples_too(library: Path) -> None:
    coroutine = "async " + function(words(6), name="later")
    inner = "\n".join("    " + line for line in function(words(8), name="inner").splitlines())
    method = "class Thing:\n" + "\n".join("    " + line for line in function(words(7), name="act").splitlines()) + "\n"
    outer = function(words(5), name="outer", body=inner + "\n    return inner\n")
    examples = {example["query"]: example["documents"] for example in read(library, a=outer + coroutine + method)}
    assert set(examples) == {words(5), words(6), words(7), words(8)}
    assert examples[words(6)] == ["async " + SOURCE.format(name="later")]
    assert examples[words(7)] == [SOURCE.format(name="act")]
    assert examples[words(8)] == [SOURCE.format(name="inner")]


@pytest.mark.parametrize(("padding", "taken"), [(0, False), (1, True)])
def test_a_document_has_60_characters_at_least(padding: int, taken: bool, library: Path) -> None:
    body = f"    return '{'x' * (27 + padding)}'\n"
    assert len("def change(value):\n" + body.rstrip()) == 59 + padding
    found = queries(library, a=function(words(5), body=body), b=function(words(9)))
    assert found == [*([words(5)] if taken else []), words(9)]


@pytest.mark.parametrize(
    "source",
    [
        function(words(5), name="a_name_that_is_long_enough_for_sixty_characters_by_itself_alone", body=""),
        f"def change(value):\n    # {words(5)}\n{BODY}",
        f"def change(value):\n{BODY}    '''{words(5)}'''\n",
        f'class Change:\n    """{words(5)}"""\n    first = 1\n    second = 2\n    third = "{"x" * 60}"\n',
        function(" "),
    ],
    ids=["docstring alone", "comment", "text at the end", "class", "blank docstring"],
)
def test_what_is_no_documented_function_with_a_body_is_no_example(source: str, library: Path) -> None:
    assert queries(library, a=source, b=function(words(9))) == [words(9)]


# Files


@pytest.mark.parametrize("folder", ["test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo"])
def test_a_left_out_folder_is_left_out_at_every_depth(folder: str, library: Path) -> None:
    for depth, path in enumerate([Path(folder), Path("json", folder), Path(folder, "inner")]):
        (library / path).mkdir(parents=True, exist_ok=True)
        (library / path / "a.py").write_text(function(words(5 + depth)))
    (library / f"{folder}.py").write_text(function(words(20)))
    assert queries(library) == [words(20)]


def test_a_library_below_a_left_out_name_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "site-packages" / "library"
    library.mkdir(parents=True)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    assert queries(library, a=function(words(5))) == [words(5)]


@pytest.mark.parametrize(
    "broken", [b"def change(value:\n", b"x = 1\x00", b"# coding: none-such\nx = 1\n", b"x = '\xe9'\n"]
)
def test_a_file_that_is_no_python_of_this_version_is_skipped(broken: bytes, library: Path) -> None:
    (library / "a.py").write_bytes(broken)
    assert queries(library, b=function(words(5))) == [words(5)]


def test_a_file_that_is_no_module_is_not_read(library: Path) -> None:
    (library / "a.txt").write_text(function(words(5)))
    (library / "a.pyi").write_text(function(words(6)))
    assert queries(library, b=function(words(7))) == [words(7)]


# Holding out

# The MD5 of each path, modulo 100.
BUCKETS = {"a.py": 68, "b.py": 23, "c.py": 57, "e.py": 30, "f.py": 7, "pkg/a.py": 33, "pkg/b.py": 81}


@pytest.mark.parametrize("fraction", [0.07, 0.23, 0.24, 0.33, 0.6])
def test_modules_are_held_out_by_the_md5_of_their_posix_path(fraction: float, library: Path) -> None:
    (library / "pkg").mkdir()
    names = {words(5 + number): name for number, name in enumerate(BUCKETS)}
    for query, name in names.items():
        (library / name).write_text(function(query))
    train, held_out = load(fraction)

    def modules(examples: TrainingSet) -> set[str]:
        return {names[query] for query, _ in texts(examples)}

    expected = {name for name, bucket in BUCKETS.items() if bucket < round(100 * fraction)}
    assert (set() if held_out is None else modules(held_out)) == expected
    assert modules(train) == set(BUCKETS) - expected


def test_a_query_of_a_held_out_module_is_not_trained_on(library: Path) -> None:
    # b.py has bucket 23 and is read first; c.py has 57.
    (library / "b.py").write_text(function(words(5)))
    (library / "c.py").write_text(function(words(5)) + function(words(6)))
    data = load_data(make_set_config("python_functions", evaluation_fraction=0.3))
    [evaluation] = data.evaluation.values()
    assert list(evaluation.queries.values()) == [words(5)]
    assert [query for query, _ in texts(data.sets[0])] == [words(6)]


def test_a_library_of_which_all_is_held_out_leaves_nothing_to_train_on(library: Path) -> None:
    (library / "b.py").write_text(function(words(5)))
    assert error_of(make_set_config("python_functions", evaluation_fraction=0.3)).endswith(
        ": no example is left to train on: give more, or lower data.evaluation_fraction or data.max_empty"
    )


def test_a_library_without_a_documented_function_is_an_error(library: Path) -> None:
    (library / "b.py").write_text("x = 1\n")
    message = error_of(make_set_config("python_functions"))
    assert str(library) in message
    assert "\n" not in message


# Patch releases edit docstrings, so the counts belong to one of them.
@pytest.mark.skipif(
    (platform.python_implementation(), sys.version_info[:3]) != ("CPython", (3, 11, 7)),
    reason="counted on the library of CPython 3.11.7",
)
def test_cpython_3_11_gives_4309_examples_of_which_291_are_held_out() -> None:
    train, held_out = load(0.12)
    assert held_out is not None
    assert (len(train), len(held_out)) == (4309 - 291, 291)
    trained, asked = ({query for query, _ in texts(examples)} for examples in (train, held_out))
    assert (len(trained), len(asked)) == (4309 - 291, 291)
    assert not trained & asked
