"""What several tests need: a tiny backbone on disk, configs without the command line, and the command itself."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from configs.schema import Config, parse_config

ROOT = Path(__file__).parent.parent
# A few words of its own, the alphabet and punctuation: enough to tokenise any lower-case text.
WORDS = ["what", "is", "the", "of", "cat", "dog", "fish", "barks", "meows", "swims", "animal", "that", "which"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, which wait for each other on cores that are busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain BERT of two layers, 32 wide, with 64 positions, as `save_pretrained` leaves one."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny_bert")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    vocabulary += list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make_config(tiny_bert: Path, tmp_path: Path) -> Callable[..., Config]:
    """Compose a config as the command line does, with the tiny backbone and short texts."""

    def make(*overrides: str) -> Config:
        ConfigStore.instance().store("schema", Config)
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return parse_config(compose("train", [*tiny_overrides(tiny_bert, tmp_path), *overrides]))

    return make


def tiny_overrides(tiny_bert: Path, output: Path) -> list[str]:
    """What replaces the default's weights by the tiny ones."""
    return [
        "name=test",
        f"output_dir={output}/run",
        f"backbone.name={tiny_bert}",
        "backbone.sha256=null",
        "backbone.query_length=8",
        "backbone.document_length=16",
    ]


def run_command(
    *arguments: str,
    cwd: Path = ROOT,
    timeout: float = 300,
    before: Callable[[], None] | None = None,
    program: Sequence[str] = (sys.executable, str(ROOT / "train.py")),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Type `python train.py ...`, with the library's network switched off and one thread, since models are tiny.

    before: called in the new process before Python starts; program: what is typed before the arguments.
    """
    return subprocess.run(
        [*program, *arguments],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        preexec_fn=before,
        check=False,
    )


@pytest.fixture
def as_loud_as_before() -> Iterator[None]:
    """Scripts that are called here, and not typed, silence the libraries; the next test hears them again."""
    from transformers.utils import logging as transformers_logging

    logger, verbosity = logging.getLogger("sentence_transformers"), transformers_logging.get_verbosity()
    level = logger.level
    yield
    logger.setLevel(level)
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture
def unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE, which is read once, when the library is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that LATEFORGE_DATA names."""
    folder = os.environ.get("LATEFORGE_DATA")
    if not folder or not Path(folder, "squad_sentences").is_dir():
        pytest.skip("LATEFORGE_DATA names no folder of real data sets")
    return Path(folder).resolve()
