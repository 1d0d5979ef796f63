"""What several tests need: a tiny backbone on disk, configs without the command line, and the command itself."""

import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

import train
from configs.mix import with_sets
from configs.schema import Config, parse_config

ROOT = Path(__file__).parent.parent
# The library's network is switched off, and there is one thread, since models are tiny.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
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
            return parse_config(with_sets(compose("train", [*tiny_overrides(tiny_bert, tmp_path), *overrides])))

    return make


def tiny_overrides(tiny_bert: Path, output: Path) -> list[str]:
    """What replaces the default's weights by the tiny ones."""
    return [
        "name=test",
        "report=false",
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
    """Type `python train.py ...`.

    before: called in the new process before Python starts; program: what is typed before the arguments.
    """
    return subprocess.run(
        [*program, *arguments],
        cwd=cwd,
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        preexec_fn=before,
        check=False,
    )


def type_here(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `run_command` does, in this process, as one of its own takes seconds to import; it is left as it was."""
    from accelerate.state import AcceleratorState

    stdout, stderr = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A process keeps the precision of its first run.
    AcceleratorState._reset_state(reset_partial_state=True)
    with (
        patch.dict(os.environ, ENVIRONMENT | environment),
        patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
        patch("sys.argv", ["train.py", *arguments]),
        loudness_restored(),
        chdir(cwd),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        try:
            status = train.main(list(arguments))
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a mistake gets, without the word before it."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def lines_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a command prints, without spaces that align."""
    return [" ".join(line.split()) for line in done.stdout.splitlines()]


@contextmanager
def loudness_restored() -> Iterator[None]:
    """What is called here silences the libraries; who comes next hears them again."""
    import datasets
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("sentence_transformers")
    level = logger.level
    verbosity, data_verbosity = transformers_logging.get_verbosity(), datasets.logging.get_verbosity()
    try:
        yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
        datasets.logging.set_verbosity(data_verbosity)


@pytest.fixture
def as_loud_as_before() -> Iterator[None]:
    """For scripts that are called here, and not typed."""
    with loudness_restored():
        yield


@pytest.fixture(scope="module")
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What libraries keep of data and of code in models stays out of the user's folder and of other tests."""
    import datasets

    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        # Without the folders of code that another test module has left.
        monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "transformers_modules").is_dir()])
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            monkeypatch.delitem(sys.modules, name)
        yield


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
