"""Texts of one side as tokens: cut and marked once, kept on disk, read from there a batch at a time."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from filelock import FileLock
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer
from torch import Tensor

from architectures.heads import backbone_of
from configs.schema import ConfigError
from trainer.data.tables import IntArray, column

Task = Literal["query", "document"]
# What decides, beside the tokenizer's own files, which tokens a text has.
LIBRARIES = ("sentence-transformers", "transformers", "tokenizers")

END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True)
class TokenizedTexts:
    """Texts of one side as chunks of similar length, so that little is padded."""

    chunks: list[dict[str, Any]]
    """Features for the encoder, shortest texts first."""
    order: Tensor
    """(number of texts,) int64: which of the given texts each row of the concatenated chunks is."""
    tokens: int
    """Tokens that stand for text, markers and expansion."""
    padded_tokens: int
    """Tokens that are computed."""


@dataclass(frozen=True)
class TokenTable:
    """The tokens of the texts of one side."""

    table: Dataset
    """A list of numbers a text for each of the encoder's features."""
    rows: IntArray | None
    """Which texts these are, rising; None where they are all."""
    features: dict[str, Any]
    """The features of one text, for their types and for those that are no list."""
    padding: dict[str, int]
    """What fills a text up to the length of its chunk, by feature."""
    pads_left: bool

    @cached_property
    def lengths(self) -> IntArray:
        """(texts,): tokens of each."""
        return column(self.table, "input_ids", pc.list_value_length)

    def places(self, rows: IntArray) -> IntArray:
        """Where texts, given by their rows, stand in this table."""
        return rows if self.rows is None else np.searchsorted(self.rows, rows)

    def chunks(self, rows: IntArray, *, chunk_tokens: int, without_padding: bool = False) -> TokenizedTexts:
        """Sort texts, given by their rows, by length and cut them into chunks, each of at most chunk_tokens tokens,
        padding included unless it will be taken out, and of one text at least."""
        taken = self.table.with_format("arrow")[self.places(rows)]
        features = {name: _Lists(taken[name]) for name in self.padding}
        lengths = features["input_ids"].lengths
        order = np.argsort(lengths, kind="stable")
        chunks = [
            {
                name: self._padded(features[name], order[start:stop], name) if name in features else value
                for name, value in self.features.items()
            }
            for start, stop in (_cuts_of_rows if without_padding else _cuts)(lengths[order], chunk_tokens)
        ]
        return TokenizedTexts(
            chunks=chunks,
            order=torch.from_numpy(order),
            tokens=int(lengths.sum()),
            padded_tokens=sum(chunk["input_ids"].numel() for chunk in chunks),
        )

    def _padded(self, lists: "_Lists", chosen: IntArray, name: str) -> Tensor:
        lengths = lists.lengths[chosen]
        columns, width = np.arange(lengths.max()), lengths.max()
        is_text = (columns >= (width - lengths)[:, None]) if self.pads_left else (columns < lengths[:, None])
        padded = np.full((len(chosen), width), self.padding[name], dtype=np.int64)
        padded[is_text] = np.concatenate([lists.values[lists.starts[row] : lists.stops[row]] for row in chosen])
        return torch.from_numpy(padded).to(self.features[name].dtype)


def _cuts(lengths: IntArray, chunk_tokens: int) -> list[tuple[int, int]]:
    """Where rising lengths are cut so that the least is padded, within chunk_tokens; a chunk costs a sixteenth of
    chunk_tokens by itself, or there would be one for each length."""
    cost, cuts = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, dtype=np.int64)
    for stop, longest in enumerate(lengths.tolist(), start=1):
        first = max(0, stop - max(1, chunk_tokens // longest))
        costs = cost[first:stop] + longest * np.arange(stop - first, 0, -1)
        cuts[stop] = first + int(costs.argmin())
        cost[stop] = costs.min() + chunk_tokens / 16
    found, stop = [], len(lengths)
    while stop:
        found.append((int(cuts[stop]), stop))
        stop = int(cuts[stop])
    return found[::-1]


def _cuts_of_rows(lengths: IntArray, row_tokens: int) -> list[tuple[int, int]]:
    """Where lengths are cut so that as many as fit stand in a row."""
    starts, tokens = [0], 0
    for place, length in enumerate(lengths.tolist()):
        if tokens + length > row_tokens and place > starts[-1]:
            starts.append(place)
            tokens = 0
        tokens += length
    return list(pairwise([*starts, len(lengths)]))


class _Lists:
    """A column of lists as arrays."""

    def __init__(self, lists: pa.ChunkedArray) -> None:
        self.lengths: IntArray = pc.list_value_length(lists).to_numpy()
        self.values: IntArray = pc.list_flatten(lists).to_numpy()
        self.stops: IntArray = np.cumsum(self.lengths)
        self.starts: IntArray = self.stops - self.lengths


def tokenized(
    texts: Dataset,
    encoder: MultiVectorEncoder,
    task: Task,
    *,
    rows: IntArray | None = None,
    length: int | None = None,
    prefix: str | None = None,
) -> TokenTable:
    """Tokenise texts of one side, or take what an earlier run has kept of them on disk.

    rows: the texts that are needed, rising; length and prefix: in place of the encoder's own. Processes that ask at
    once wait for the first. Raises ConfigError where the tokens cannot be written.
    """
    if rows is not None and len(rows) == len(texts):
        rows = None
    with _side_by_side(encoder) as transformer, at_length(encoder, task, length):
        prompt = encoder.prompts.get(task) if prefix is None else prefix

        def preprocess(batch: list[str]) -> dict[str, Any]:
            features: dict[str, Any] = encoder.preprocess(batch, prompt=prompt or None, task=task)
            return features

        sample = preprocess(["a"])
        named = [name for name, value in sample.items() if isinstance(value, Tensor) and value.dim() == 2]
        path = _kept_at(texts, rows, transformer, [task, prompt])
        table = _kept(path, texts if rows is None else texts.select(rows), preprocess, named)
        tokenizer = transformer.tokenizer
        assert tokenizer is not None, "a backbone of texts has one"
        padding = dict.fromkeys(named, 0) | {"input_ids": int(tokenizer.pad_token_id or 0)}
    return TokenTable(table, rows, sample, padding, pads_left=tokenizer.padding_side == "left")


@contextmanager
def at_length(encoder: MultiVectorEncoder, task: Task, length: int | None) -> Iterator[None]:
    """Let the encoder cut the texts of a side at this length, and fill queries up to it where it expands them; None is
    its own."""
    transformer = backbone_of(encoder)
    kept = transformer.query_length, transformer.document_length, transformer.query_expansion
    try:
        if length is not None and task == "document":
            transformer.document_length = length
        if length is not None and task == "query":
            transformer.query_expansion = None
            transformer.query_length = length
            if expansion := kept[2]:
                transformer.query_expansion = {**expansion, "length": length}
        yield
    finally:
        transformer.query_expansion = None
        transformer.query_length, transformer.document_length, transformer.query_expansion = kept


@contextmanager
def _side_by_side(encoder: MultiVectorEncoder) -> Iterator[Transformer]:
    """The encoder's first module, which does not put its texts into one row meanwhile."""
    transformer = backbone_of(encoder)
    flattens, transformer.can_flatten_inputs = transformer.can_flatten_inputs, False
    try:
        yield transformer
    finally:
        transformer.can_flatten_inputs = flattens


def _kept_at(texts: Dataset, rows: IntArray | None, transformer: Transformer, options: list[Any]) -> Path:
    """The file for these texts, this tokenizer and these lengths: where any is another, the file is."""
    digest = sha256(texts._fingerprint.encode())
    digest.update(b"" if rows is None else rows.tobytes())
    tokenizer = transformer.tokenizer
    assert tokenizer is not None
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(tokenizer.save_pretrained(folder)):
            if Path(file).is_file():
                digest.update(Path(file).read_bytes())
    lengths = transformer.query_length, transformer.document_length, transformer.max_seq_length
    settings = [
        *options,
        *lengths,
        transformer.query_expansion,
        transformer.processing_kwargs,
        [version(library) for library in LIBRARIES],
    ]
    digest.update(json.dumps(settings, default=str).encode())
    digest.update(Path(__file__).read_bytes())
    return Path(datasets.config.HF_DATASETS_CACHE, "lateforge-tokens", f"{digest.hexdigest()[:32]}.arrow")


def _kept(path: Path, texts: Dataset, preprocess: Any, named: list[str]) -> Dataset:
    """The table of a file, which is written where there is none or it is not whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            with suppress(pa.ArrowInvalid, OSError):
                kept = Dataset.from_file(str(path))
                if len(kept) == len(texts) and _ends_whole(path):
                    return kept
            path.unlink(missing_ok=True)  # the power failed while it was written to the disk

            def tokens(batch: dict[str, list[str]]) -> pa.Table:
                return _unpadded(preprocess(batch["text"]), named)

            return texts.map(
                tokens,
                batched=True,
                remove_columns=texts.column_names,
                features=Features({name: List(Value("int32" if name == "input_ids" else "int8")) for name in named}),
                # Written beside it under another name first.
                cache_file_name=str(path),
                load_from_cache_file=False,
                new_fingerprint=path.stem,
            )
    except OSError as error:
        raise ConfigError(
            f"the tokens cannot be kept in {path.parent} ({error}): free some space, or name another folder with "
            "HF_DATASETS_CACHE"
        ) from error


def _ends_whole(path: Path) -> bool:
    """Whether the last bytes are those that end a stream of Arrow's."""
    with path.open("rb") as file:
        file.seek(-len(END), os.SEEK_END)
        return file.read() == END


def _unpadded(features: dict[str, Any], named: list[str]) -> pa.Table:
    """A list for each text of each feature, of the tokens that stand for text, markers and expansion."""
    used = features["attention_mask"].bool()
    if "query_expansion_positions" in features:
        used = used | features["query_expansion_positions"]
    kept, offsets = used.numpy(), np.concatenate([[0], used.sum(dim=1).cumsum(dim=0).numpy()]).astype(np.int32)
    lists = {}
    for name in named:
        values = features[name].numpy()[kept].astype(np.int32 if name == "input_ids" else np.int8)
        lists[name] = pa.ListArray.from_arrays(offsets, values)
    return pa.table(lists)
