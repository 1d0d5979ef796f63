"""What the trainer's tests share: the tiny encoder, and a cache of its own for the tables that are read."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from sentence_transformers import MultiVectorEncoder

from architectures.factory import build_encoder
from configs.schema import Config
from tests.checkpoints import gemma, modernbert, xlm_roberta

__all__ = ["gemma", "modernbert", "xlm_roberta"]


@pytest.fixture
def encoder(make_config: Callable[..., Config], built: dict[str, MultiVectorEncoder]) -> MultiVectorEncoder:
    """The tiny backbone, a linear head, markers, expansion and a skiplist; queries of 8 and documents of 16 tokens."""
    if not built:
        config = make_config("data=pairs", "data.path=prose.jsonl")  # source code would have no skiplist
        torch.manual_seed(0)
        built["encoder"] = build_encoder(config.backbone, config.head)
    return deepcopy(built["encoder"])


@pytest.fixture(scope="session")
def built() -> dict[str, MultiVectorEncoder]:
    """Where the encoder is kept that every test gets a copy of."""
    return {}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches out of the user's folder, and out of the next test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def new_accelerator_state() -> Iterator[None]:
    """Each test chooses its precision, which the state of a process otherwise keeps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
