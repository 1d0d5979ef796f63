"""Configs of single sets, tiny files of rows, and what reading them gives."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from configs.schema import Config, ConfigError, DataConfig, parse_config
from tests.conftest import ROOT
from trainer.data import load_data
from trainer.data.tables import TrainingSet, identity

# Keys without which a member is no config yet.
NEEDED = {
    "python_functions": (),
    "stanford": ("data.path=unused", "data.queries_path=unused", "data.documents_path=unused"),
}


def make_set_config(member: str, **changes: Any) -> DataConfig:
    """What a member of configs/data says, nothing held out, and these keys changed."""
    return replace(_member(member), **{"evaluation_fraction": 0.0, **changes})


@cache
def _member(member: str) -> DataConfig:
    ConfigStore.instance().store("schema", Config)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        overrides = ["name=test", f"data={member}", *NEEDED.get(member, ("data.path=unused",))]
        return parse_config(compose("train", overrides)).data


def json_lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(folder: Path, **files: Sequence[Any]) -> None:
    """Write JSON lines, by name."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_bytes(json_lines(*rows))


def train_set(config: DataConfig) -> TrainingSet:
    """The one set that is trained on."""
    [examples] = load_data(config).sets
    return examples


def error_of(config: DataConfig) -> str:
    """The message of the ConfigError that reading ends in."""
    with pytest.raises(ConfigError) as caught:
        load_data(config)
    return str(caught.value)


def every_example(examples: TrainingSet) -> list[dict[str, Any]]:
    return [examples.example(row) for row in range(len(examples))]


def texts(examples: TrainingSet) -> list[tuple[str, list[str]]]:
    return [(example["query"], example["documents"]) for example in every_example(examples)]


def with_scores(examples: TrainingSet) -> list[tuple[str, list[str], list[float]]]:
    return [(example["query"], example["documents"], example["scores"]) for example in every_example(examples)]


def as_example(
    place: str, query: str, documents: list[str], *, positives: int = 1, scores: Sequence[float] = ()
) -> dict[str, Any]:
    """What `TrainingSet.example` gives of these texts."""
    return {
        "query": query,
        "query_identity": identity(query),
        "documents": documents,
        "document_identities": [identity(text) for text in documents],
        "positives": positives,
        "scores": list(scores),
        "place": place,
    }
