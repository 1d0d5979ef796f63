"""The checkpoints that these tests load, copies of them to damage, and configs without the command line."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Activation, Attention, BackboneConfig, HeadConfig, HeadLayer
from tests.checkpoints import (
    embeddinggemma,
    gemma,
    modernbert,
    pylate,
    pylate_without_type,
    sentence_bert,
    stanford,
    xlm_roberta,
)

__all__ = [
    "embeddinggemma",
    "gemma",
    "modernbert",
    "pylate",
    "pylate_without_type",
    "sentence_bert",
    "stanford",
    "xlm_roberta",
]

Copy = Callable[[Path], Path]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """Makes a copy of a checkpoint that a test may damage."""

    def copy_folder(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"{len(list(tmp_path.iterdir()))}_{folder.name}"))

    return copy_folder


@pytest.fixture
def own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code in models that stock classes are told to trust is copied here, not into the user's folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    kept = [path for path in sys.path if not Path(path, "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", kept)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


def backbone_config(name: str | Path, **keys: Any) -> BackboneConfig:
    """What configs/backbone/checkpoint.yaml states: everything is the checkpoint's, or PyLate's."""
    nothing: dict[str, Any] = {
        "revision": None,
        "sha256": None,
        "trust_remote_code": False,
        "allow_pickle": False,
        "attention": Attention.sdpa,
        "dropout": None,
        "query_length": None,
        "document_length": None,
        "query_prefix": None,
        "document_prefix": None,
        "expansion": None,
        "attend_to_expansion": None,
        "skiplist": None,
        "skiplist_sides": None,
    }
    return BackboneConfig(name=str(name), **{**nothing, **keys})


def head_config(
    *layers: HeadLayer, keep: str = "all", embedding_size: int | None = None, seed: int | None = None
) -> HeadConfig:
    """What configs/head/default.yaml states, with layers to append."""
    return HeadConfig(keep=keep, embedding_size=embedding_size, seed=seed, layers=list(layers))


def head_layer(
    out_features: int, *, bias: bool = False, activation: str = "identity", residual: bool = False, **extras: Any
) -> HeadLayer:
    return HeadLayer(
        bias=bias, activation=Activation[activation], residual=residual, out_features=out_features, **extras
    )


def edit(path: Path, *without: str, **changes: object) -> None:
    """Change, add and leave out keys of a JSON object in a file."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in without}))
