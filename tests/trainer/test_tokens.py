"""Texts as tokens: as the encoder makes them, in chunks, and kept on disk for as long as nothing changes."""

import errno
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.modules.transformer import QueryExpansionConfig
from torch import Tensor

from configs.schema import ConfigError
from tests.conftest import ENVIRONMENT
from trainer.data.tokens import Task, TokenizedTexts, TokenTable, _cuts, _cuts_of_rows, tokenized

# Of 1 to 16 words, some twice; in documents of 16 tokens the last does not fit, nor do the longest in queries of 8.
TEXTS = [
    "the dog barks.",
    "what",
    "a cat meows, that swims",
    "fish",
    "",
    "is it the animal",
    "what",
    "which cat is a dog?",
    "the fish of the cat swims " * 3,
]
TASKS: tuple[Task, ...] = ("query", "document")
# More than `datasets` writes at once.
MANY = [f"{'a ' * (number % 3)}cat {number}" for number in range(2100)]


def table_of(texts: Sequence[str]) -> Dataset:
    return Dataset.from_dict({"text": list(texts)})


def transformer_of(encoder: MultiVectorEncoder) -> Transformer:
    return cast(Transformer, encoder[0])


def every(table: TokenTable, chunk_tokens: int = 40) -> TokenizedTexts:
    """All texts that the table has."""
    return table.chunks(np.arange(len(table.table)) if table.rows is None else table.rows, chunk_tokens=chunk_tokens)


def restored(tokens: TokenizedTexts) -> list[list[int]]:
    """The tokens of each text, expansion included, in the order in which the texts were given."""
    rows = []
    for chunk in tokens.chunks:
        used = chunk["attention_mask"].bool()
        if "query_expansion_positions" in chunk:
            used = used | chunk["query_expansion_positions"]
        rows += [ids[mask].tolist() for ids, mask in zip(chunk["input_ids"], used, strict=True)]
    return [rows[position] for position in tokens.order.argsort().tolist()]


def expected(
    encoder: MultiVectorEncoder,
    texts: Sequence[str],
    task: Task,
    *,
    length: int | None = None,
    prefix: str | None = None,
) -> list[list[int]]:
    """The tokens of each text by the tokenizer alone: what is put before it, cut to a length, and of queries filled."""
    length = length or {"query": 8, "document": 16}[task]
    before = (encoder.prompts[task] or "") if prefix is None else prefix
    ids: list[list[int]] = deepcopy(encoder.tokenizer)(
        [before + text for text in texts], truncation=True, max_length=length
    )["input_ids"]
    if task == "query" and transformer_of(encoder).query_expansion:
        ids = [own + [encoder.tokenizer.mask_token_id] * (length - len(own)) for own in ids]
    return ids


# Chunks


def assert_preprocessed(encoder: MultiVectorEncoder, tokens: TokenizedTexts, texts: Sequence[str], task: Task) -> None:
    """Each chunk is what the encoder itself makes of its texts, values, types and padding."""
    assert sorted(tokens.order.tolist()) == list(range(len(texts)))
    start = 0
    for chunk in tokens.chunks:
        stop = start + len(chunk["input_ids"])
        own = [texts[number] for number in tokens.order[start:stop].tolist()]
        features: dict[str, Any] = encoder.preprocess(own, prompt=encoder.prompts[task] or None, task=task)
        assert chunk.keys() == features.keys()
        for name, values in features.items():
            if isinstance(values, Tensor):
                assert chunk[name].dtype == values.dtype
                torch.testing.assert_close(chunk[name], values, rtol=0, atol=0)
            else:
                assert chunk[name] == values
        start = stop
    assert start == len(texts)


@pytest.mark.parametrize("marker", [True, False])
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("chunk_tokens", [1, 30, 1000])
@pytest.mark.parametrize("task", TASKS)
def test_a_chunk_is_what_the_encoder_makes_of_its_texts(
    task: Task, chunk_tokens: int, padding_side: str, marker: bool, encoder: MultiVectorEncoder
) -> None:
    encoder.tokenizer.padding_side = padding_side
    if not marker:
        encoder.prompts[task] = ""
    tokens = every(tokenized(table_of(TEXTS), encoder, task), chunk_tokens)
    assert_preprocessed(encoder, tokens, TEXTS, task)


@pytest.mark.parametrize(
    "expansion",
    [
        None,
        {"strategy": "fixed", "attend": True, "length": 8},
        {"strategy": "fixed", "attend": False, "length": 8},
        {"strategy": "min", "attend": True, "length": 5},
        {"strategy": "min", "attend": False, "length": 5},
    ],
)
def test_queries_of_each_expansion_are_what_the_encoder_makes_of_them(
    expansion: QueryExpansionConfig | None, encoder: MultiVectorEncoder
) -> None:
    transformer = transformer_of(encoder)
    transformer.query_expansion = None
    transformer.query_length = 8
    transformer.query_expansion = expansion
    for chunk_tokens in (1, 20, 1000):
        tokens = every(tokenized(table_of(TEXTS), encoder, "query"), chunk_tokens)
        assert_preprocessed(encoder, tokens, TEXTS, "query")


def test_documents_are_cut_at_their_length_and_queries_are_filled_to_theirs(encoder: MultiVectorEncoder) -> None:
    queries, documents = (tokenized(table_of(TEXTS), encoder, task) for task in TASKS)
    assert queries.lengths.tolist() == [8] * len(TEXTS)
    assert documents.lengths.tolist() == [len(own) for own in expected(encoder, TEXTS, "document")]
    assert (documents.lengths.max(), documents.lengths.min()) == (16, 3)
    assert restored(every(queries)) == expected(encoder, TEXTS, "query")
    assert restored(every(documents)) == expected(encoder, TEXTS, "document")


@pytest.mark.parametrize("prefix", [None, "", "what is "])
@pytest.mark.parametrize("length", [None, 6, 30])
@pytest.mark.parametrize("expands", [True, False])
def test_a_set_has_lengths_and_prefixes_of_its_own(
    expands: bool, length: int | None, prefix: str | None, encoder: MultiVectorEncoder
) -> None:
    if not expands:
        transformer = transformer_of(encoder)
        transformer.query_expansion, transformer.query_length = None, 8
    for task in TASKS:
        table = tokenized(table_of(TEXTS), encoder, task, length=length, prefix=prefix)
        assert restored(every(table)) == expected(encoder, TEXTS, task, length=length, prefix=prefix)


def test_texts_are_taken_by_their_rows_in_any_order_and_any_number_of_times(encoder: MultiVectorEncoder) -> None:
    rows = np.array([8, 2, 2, 0, 8, 5])
    by_all = tokenized(table_of(TEXTS), encoder, "document")
    by_some = tokenized(table_of(TEXTS), encoder, "document", rows=np.array([0, 2, 5, 8]))
    assert (len(by_all.table), len(by_some.table)) == (9, 4)
    for table in (by_all, by_some):
        tokens = table.chunks(rows, chunk_tokens=20)
        assert restored(tokens) == expected(encoder, [TEXTS[row] for row in rows], "document")
        assert table.lengths[table.places(rows)].tolist() == [len(own) for own in restored(tokens)]


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9).map(sorted),
    chunk_tokens=st.integers(1, 100),
)
def test_chunks_keep_the_order_fit_and_cost_the_least_of_all_that_do(lengths: list[int], chunk_tokens: int) -> None:
    def cost(cuts: Sequence[tuple[int, int]]) -> float:
        return sum(lengths[stop - 1] * (stop - start) + chunk_tokens / 16 for start, stop in cuts)

    def fits(start: int, stop: int) -> bool:
        return stop - start == 1 or lengths[stop - 1] * (stop - start) <= chunk_tokens

    def all_cuts() -> Iterator[list[tuple[int, int]]]:
        inner = range(1, len(lengths))
        for count in range(len(lengths)):
            for chosen in combinations(inner, count):
                cuts = list(zip((0, *chosen), (*chosen, len(lengths)), strict=True))
                if all(fits(*cut) for cut in cuts):
                    yield cuts

    found = _cuts(np.array(lengths), chunk_tokens)
    assert [number for start, stop in found for number in range(start, stop)] == list(range(len(lengths)))
    assert all(fits(*cut) for cut in found)
    assert cost(found) == pytest.approx(min(map(cost, all_cuts())), rel=1e-12)


@pytest.mark.parametrize(
    ("lengths", "row_tokens", "cuts"),
    [
        ([3, 4, 5, 5], 12, [(0, 3), (3, 4)]),
        ([3, 4, 5, 5], 11, [(0, 2), (2, 4)]),
        ([3, 4, 5, 5], 17, [(0, 4)]),
        # A text that is longer than a row has one of its own.
        ([3, 4, 30, 31], 12, [(0, 2), (2, 3), (3, 4)]),
        ([30], 1, [(0, 1)]),
    ],
)
def test_a_row_takes_as_many_texts_as_fit(lengths: list[int], row_tokens: int, cuts: list[tuple[int, int]]) -> None:
    assert _cuts_of_rows(np.array(lengths), row_tokens) == cuts


@settings(derandomize=True, database=None, deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    chunk_tokens=st.integers(1, 60),
    pads_left=st.booleans(),
)
def test_chunks_are_sorted_and_restore_to_what_was_given(
    lengths: list[int], chunk_tokens: int, pads_left: bool
) -> None:
    texts = [[100 * row + place + 1 for place in range(length)] for row, length in enumerate(lengths)]
    kept = Dataset.from_dict({"input_ids": texts, "attention_mask": [[1] * length for length in lengths]})
    types = {"input_ids": torch.tensor([[0]]), "attention_mask": torch.tensor([[0]]), "modality": "text"}
    table = TokenTable(kept, None, types, {"input_ids": 7, "attention_mask": 0}, pads_left)
    tokens = every(table, chunk_tokens)
    assert restored(tokens) == texts
    assert tokens.tokens == sum(lengths)
    assert tokens.padded_tokens == sum(chunk["input_ids"].numel() for chunk in tokens.chunks)
    assert [lengths[number] for number in tokens.order.tolist()] == sorted(lengths)
    for chunk in tokens.chunks:
        ids, mask = chunk["input_ids"], chunk["attention_mask"]
        assert len(ids) == 1 or ids.numel() <= chunk_tokens
        assert ids.shape[1] == int(mask.sum(dim=1).max())
        assert set(ids[mask == 0].tolist()) <= {7}
        # All texts at one side.
        assert torch.equal(mask, mask.sort(dim=1, descending=not pads_left).values)
        assert chunk["modality"] == "text"


# What is kept


def refuse_texts(encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this encoder makes tokens of the sample and of no other text."""
    preprocess = encoder.preprocess

    def refuse(texts: list[str], **options: Any) -> Any:
        assert texts == ["a"], "texts are tokenised again"
        return preprocess(texts, **options)

    monkeypatch.setattr(encoder, "preprocess", refuse)


def counted(encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts this encoder was given from here on, call by call, without the sample."""
    counts: list[int] = []
    preprocess = encoder.preprocess

    def count(texts: list[str], **options: Any) -> Any:
        if texts != ["a"]:
            counts.append(len(texts))
        return preprocess(texts, **options)

    monkeypatch.setattr(encoder, "preprocess", count)
    return counts


def kept_files() -> list[Path]:
    """Whatever lies there, without the locks."""
    folder = Path(datasets.config.HF_DATASETS_CACHE, "lateforge-tokens")
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock") if folder.is_dir() else []


@pytest.mark.parametrize("task", TASKS)
def test_tokens_of_an_earlier_run_are_found_again(
    task: Task, encoder: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"length": 7, "prefix": "what ", "rows": np.array([1, 2, 8])}
    another = deepcopy(encoder)
    first = tokenized(table_of(TEXTS), encoder, task, **options)
    # Other objects that are the same, also where the tokenizer has been used for something else.
    another.preprocess(["a cat " * 30, "a dog"], task="document")
    refuse_texts(another, monkeypatch)
    second = tokenized(table_of(TEXTS), another, task, **options)
    assert restored(every(second)) == restored(every(first))
    assert len(kept_files()) == 1


def change_nothing(encoder: MultiVectorEncoder) -> None:
    pass


def change_length(encoder: MultiVectorEncoder) -> None:
    transformer_of(encoder).document_length = 5


def change_prompt(encoder: MultiVectorEncoder) -> None:
    encoder.prompts["document"] = "a "


def change_tokenizer(encoder: MultiVectorEncoder) -> None:
    encoder.tokenizer.add_tokens(["barks."])


def change_truncation(encoder: MultiVectorEncoder) -> None:
    encoder.tokenizer.truncation_side = "left"


def change_options(encoder: MultiVectorEncoder) -> None:
    transformer_of(encoder).processing_kwargs = {"text": {"add_special_tokens": False}}


@pytest.mark.parametrize(
    ("options", "texts", "change"),
    [
        ({"length": 9}, TEXTS, change_nothing),
        ({"prefix": "what "}, TEXTS, change_nothing),
        ({"prefix": ""}, TEXTS, change_nothing),
        ({}, [*TEXTS[:-1], "a dog"], change_nothing),
        ({}, TEXTS[::-1], change_nothing),
        ({}, TEXTS, change_length),
        ({}, TEXTS, change_prompt),
        ({}, TEXTS, change_tokenizer),
        ({}, TEXTS, change_truncation),
        ({}, TEXTS, change_options),
    ],
)
def test_tokens_are_made_anew_where_what_decides_them_changes_and_the_old_ones_stay(
    options: dict[str, Any],
    texts: list[str],
    change: Callable[[MultiVectorEncoder], None],
    encoder: MultiVectorEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = deepcopy(encoder)
    old = restored(every(tokenized(table_of(TEXTS), encoder, "document")))
    change(encoder)
    wanted = one_by_one(deepcopy(encoder), texts, **options)
    counts = counted(encoder, monkeypatch)
    new = restored(every(tokenized(table_of(texts), encoder, "document", **options)))
    assert counts == [len(texts)]
    assert new != old
    assert new == wanted
    refuse_texts(before, monkeypatch)
    assert restored(every(tokenized(table_of(TEXTS), before, "document"))) == old


def one_by_one(
    encoder: MultiVectorEncoder, texts: list[str], *, length: int | None = None, prefix: str | None = None
) -> list[list[int]]:
    """The tokens of documents, from an encoder that is given these options."""
    transformer = transformer_of(encoder)
    transformer.document_length = length or transformer.document_length
    prompt = encoder.prompts["document"] if prefix is None else prefix
    made = [encoder.preprocess([text], prompt=prompt or None, task="document")["input_ids"] for text in texts]
    return [ids[0].tolist() for ids in made]


def test_tokens_of_other_rows_of_the_same_texts_are_others(encoder: MultiVectorEncoder) -> None:
    for rows in ([0, 1], [2, 8], [0, 1, 2]):
        table = tokenized(table_of(TEXTS), encoder, "document", rows=np.array(rows))
        assert restored(every(table)) == expected(encoder, [TEXTS[row] for row in rows], "document")
    assert len(kept_files()) == 3


def test_queries_and_documents_of_the_same_texts_lie_apart(encoder: MultiVectorEncoder) -> None:
    for _ in range(2):
        for task in TASKS:
            assert restored(every(tokenized(table_of(TEXTS), encoder, task))) == expected(encoder, TEXTS, task)


# Files that are not whole


def batch_ends(data: bytes) -> list[int]:
    """Where in a stream of Arrow the schema and each batch ends."""
    source = pa.BufferReader(data)
    reader = pa.ipc.MessageReader.open_stream(source)
    ends: list[int] = []
    while True:
        try:
            reader.read_next_message()
        except StopIteration:
            return ends
        ends.append(source.tell())


def damaged(data: bytes) -> dict[str, bytes]:
    ends = batch_ends(data)
    assert len(ends) == 1 + 3, "a schema and three batches"
    half = len(data) // 2
    return {
        "empty": b"",
        "a_byte": data[:1],
        "half": data[:half],
        "without_its_end": data[:-100],
        "schema_alone": data[: ends[0]],
        "first_batch": data[: ends[1]],
        "but_the_last_batch": data[: ends[2]],
        "half_in_zeros": data[:half] + bytes(len(data) - half),
        "all_in_zeros": bytes(len(data)),
        "no_arrow": b"x" * len(data),
    }


@pytest.mark.parametrize(
    "damage",
    [
        "empty",
        "a_byte",
        "half",
        "without_its_end",
        "schema_alone",
        "first_batch",
        "but_the_last_batch",
        "half_in_zeros",
        "all_in_zeros",
        "no_arrow",
    ],
)
def test_a_file_that_is_not_whole_is_written_anew(damage: str, encoder: MultiVectorEncoder) -> None:
    table = table_of(MANY)
    whole = tokenized(table, encoder, "document").lengths.tolist()
    [path] = kept_files()
    data = path.read_bytes()
    path.unlink()  # the file is still mapped
    path.write_bytes(damaged(data)[damage])
    again = tokenized(table, encoder, "document")
    assert again.lengths.tolist() == whole
    rows = np.array([0, 999, 1000, 2099])
    assert restored(again.chunks(rows, chunk_tokens=100)) == expected(encoder, [MANY[row] for row in rows], "document")
    assert path.read_bytes() == data


@contextmanager
def writing_fails(method: str, call: int, error: BaseException) -> Iterator[None]:
    """The writer's method raises the error the so-manieth time."""
    calls = iter(range(1, 100))
    write = getattr(ArrowWriter, method)

    def fail(writer: ArrowWriter, *arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise error
        return write(writer, *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ArrowWriter, method, fail)
        yield


def disk_is_full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("method", "call"), [("write_table", 1), ("write_table", 3), ("finalize", 1)])
def test_a_disk_that_is_full_is_named_and_leaves_nothing_to_read(
    method: str, call: int, encoder: MultiVectorEncoder
) -> None:
    table = table_of(MANY)
    with writing_fails(method, call, disk_is_full()), pytest.raises(ConfigError) as caught:
        tokenized(table, encoder, "document")
    folder = Path(datasets.config.HF_DATASETS_CACHE, "lateforge-tokens")
    assert str(caught.value) == (
        f"the tokens cannot be kept in {folder} ([Errno 28] No space left on device): free some space, or name another "
        "folder with HF_DATASETS_CACHE"
    )
    assert kept_files() == []
    rows = np.array([0, 1500])
    tokens = tokenized(table, encoder, "document").chunks(rows, chunk_tokens=100)
    assert restored(tokens) == expected(encoder, [MANY[row] for row in rows], "document")


def test_who_stops_it_leaves_nothing_to_read(encoder: MultiVectorEncoder) -> None:
    table = table_of(MANY)
    with writing_fails("write_table", 2, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        tokenized(table, encoder, "document")
    assert kept_files() == []
    assert len(tokenized(table, encoder, "document").lengths) == len(MANY)


def test_a_folder_that_cannot_be_made_is_named(
    encoder: MultiVectorEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(ConfigError) as caught:
        tokenized(table_of(TEXTS), encoder, "document")
    message = str(caught.value)
    assert message.startswith(f"the tokens cannot be kept in {tmp_path}/file/lateforge-tokens ([Errno ")
    assert message.endswith("): free some space, or name another folder with HF_DATASETS_CACHE")


# The encoder


def settings_of(encoder: MultiVectorEncoder) -> Any:
    transformer = transformer_of(encoder)
    return (
        transformer.query_length,
        transformer.document_length,
        transformer.query_expansion,
        transformer.can_flatten_inputs,
        transformer.max_seq_length,
        dict(encoder.prompts),
        encoder.tokenizer.padding_side,
        {task: encoder.preprocess(TEXTS, prompt=encoder.prompts[task], task=task)["input_ids"].tolist()
         for task in TASKS},
    )  # fmt: skip


@pytest.mark.parametrize("flattens", [True, False])
@pytest.mark.parametrize("expands", [True, False])
@pytest.mark.parametrize("length", [None, 5, 20])
def test_the_encoder_is_as_it_was(
    length: int | None, expands: bool, flattens: bool, encoder: MultiVectorEncoder
) -> None:
    transformer = transformer_of(encoder)
    if not expands:
        transformer.query_expansion, transformer.query_length = None, 8
    before = settings_of(encoder)
    transformer.can_flatten_inputs = flattens
    for task in TASKS:
        tokenized(table_of(TEXTS), encoder, task, length=length, prefix="what ")
        assert transformer.can_flatten_inputs == flattens
        with writing_fails("write_table", 1, disk_is_full()), pytest.raises(ConfigError):
            tokenized(table_of([*TEXTS, "another"]), encoder, task, length=length)
        assert transformer.can_flatten_inputs == flattens
    transformer.can_flatten_inputs = before[3]
    assert settings_of(encoder) == before


# Processes

PROGRAM = """
import json, pickle, sys, time
from pathlib import Path
import datasets
import numpy as np
from datasets import Dataset
from trainer.data.tokens import tokenized
folder = Path(sys.argv[1])
datasets.disable_progress_bars()
encoder, texts = pickle.loads((folder / "encoder").read_bytes())
counts, preprocess = [], encoder.preprocess
def counted(batch, **options):
    if batch != ["a"]:
        counts.append(len(batch))
    return preprocess(batch, **options)
encoder.preprocess = counted
(folder / "ready").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
table = tokenized(Dataset.from_dict({"text": texts}), encoder, "document")
print(json.dumps([sum(counts), table.table["input_ids"][:]]))
"""


def test_processes_that_tokenise_the_same_texts_at_once_both_get_them_and_one_makes_them(
    encoder: MultiVectorEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "encoder").write_bytes(pickle.dumps((encoder, MANY)))
    other = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=os.environ | ENVIRONMENT | {"HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wanted, counts = expected(encoder, MANY, "document"), counted(encoder, monkeypatch)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        assert other.poll() is None, other.communicate()
        time.sleep(0.001)
    (tmp_path / "go").touch()
    own = tokenized(table_of(MANY), encoder, "document").table["input_ids"][:]
    output, errors = other.communicate(timeout=60)
    assert other.returncode == 0, errors
    count, others = json.loads(output)
    assert own == others == wanted
    assert sorted([sum(counts), count]) == [0, len(MANY)]
