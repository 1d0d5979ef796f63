"""scripts/cut_model.py: what it writes, what it prints, and what it refuses without writing."""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder
from transformers.utils import logging as transformers_logging

from architectures.factory import build_encoder
from configs.schema import Config
from scripts import cut_model
from tests.conftest import run_command

COMMAND = (sys.executable, "-m", "scripts.cut_model")


@pytest.fixture(autouse=True)
def _as_loud_as_before() -> Iterator[None]:
    logger, verbosity = logging.getLogger("sentence_transformers"), transformers_logging.get_verbosity()
    level = logger.level
    yield
    logger.setLevel(level)
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture
def model(make_config: Callable[..., Config], tmp_path: Path) -> Path:
    """A saved model, 128 wide."""
    config = make_config("data=pairs", "data.path=prose.jsonl", "head=mlp_residual")
    torch.manual_seed(0)
    folder = tmp_path / "model"
    build_encoder(config.backbone, config.head).save_pretrained(str(folder))
    return folder


def refused(capsys: pytest.CaptureFixture[str], model: Path, width: object, output: Path) -> str:
    """The one line of a command that writes nothing."""
    before = {path: path.stat().st_mtime_ns for path in output.parent.rglob("*")}
    capsys.readouterr()
    assert cut_model.main([str(model), str(width), str(output)]) == 2
    assert {path: path.stat().st_mtime_ns for path in output.parent.rglob("*")} == before
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("cut_model: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    return error.removeprefix("cut_model: ").removesuffix("\n")


def test_the_command_writes_a_model_of_the_width_and_says_how_to_load_it(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "model_64"
    done = run_command(str(model), "64", str(output), program=COMMAND)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{output}: 64 of 128 components, that is 128 of 256 bytes per token vector in float16\n"
        f"load it with sentence_transformers.MultiVectorEncoder('{output}')\n"
    )
    whole, cut = (MultiVectorEncoder(str(path), device="cpu", local_files_only=True) for path in (model, output))
    for wide, narrow in (
        (whole.encode_query("what is a cat?"), cut.encode_query("what is a cat?")),
        (whole.encode_document("the cat meows, a dog barks!"), cut.encode_document("the cat meows, a dog barks!")),
    ):
        # One rounding of float32 numbers below 1.
        torch.testing.assert_close(narrow, F.normalize(wide[:, :64], dim=-1), atol=1e-6, rtol=0)


def test_all_but_the_last_layer_and_the_card_is_as_it_was(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "cut"
    assert cut_model.main([str(model), "64", str(output)]) == 0
    files = sorted(path.relative_to(model) for path in model.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(output) for path in output.rglob("*") if path.is_file())
    changed = {file.as_posix() for file in files if (model / file).read_bytes() != (output / file).read_bytes()}
    # The library notes in the tokenizer's file whether it was loaded offline.
    assert changed - {"tokenizer_config.json"} == {"README.md", "2_Dense/config.json", "2_Dense/model.safetensors"}
    card = (output / "README.md").read_text()
    assert "- **Output Dimensionality:** 64 dimensions" in card
    assert "'out_features': 128" not in card


def test_a_model_stored_in_half_precision_is_cut_in_float32(model: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    MultiVectorEncoder(str(model), device="cpu", local_files_only=True).half().save_pretrained(str(half))
    assert cut_model.main([str(half), "64", str(tmp_path / "cut")]) == 0
    for file in ("model.safetensors", "2_Dense/model.safetensors"):
        assert {tensor.dtype for tensor in load_file(tmp_path / "cut" / file).values()} == {torch.float32}


def test_an_output_that_exists_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, model, 64, model) == f"{model} exists: name a new folder"


@pytest.mark.parametrize("width", [0, -1, 129])
def test_a_width_the_model_does_not_have_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    expected = f"width={width} must be from 1 to 128, the width of the model's vectors"
    assert refused(capsys, model, width, tmp_path / "cut") == expected


@pytest.mark.parametrize("width", ["1.5", "wide"])
def test_a_width_that_is_no_number_of_components_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], width: str
) -> None:
    assert refused(capsys, model, width, tmp_path / "cut") == f"width={width} is not a whole number"


@pytest.mark.parametrize("name", ["nothing", "model/model.safetensors", "model/1_Dense"])
def test_what_is_no_folder_of_a_model_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    expected = f"{tmp_path / name} is not the folder of a saved model: it has no modules.json"
    assert refused(capsys, tmp_path / name, 64, tmp_path / "cut") == expected


@pytest.mark.parametrize("file", ["model.safetensors", "2_Dense/model.safetensors", "2_Dense/config.json"])
@pytest.mark.parametrize("bytes_left", [None, 20])
def test_a_model_with_a_file_missing_or_cut_off_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, bytes_left: int | None
) -> None:
    path = model / file
    if bytes_left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:bytes_left])
    error = refused(capsys, model, 64, tmp_path / "cut")
    assert error.startswith(f"{model} cannot be loaded (")
    assert error.endswith("): is the model complete?")


def test_a_model_without_a_head_is_refused_and_not_given_a_random_one(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "plain"))
    (folder / "modules.json").write_text(
        '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]'
    )
    assert refused(capsys, folder, 64, tmp_path / "cut") == f"{folder} has no Dense layer that could be cut"


def test_nothing_is_left_where_the_write_fails(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(encoder: MultiVectorEncoder, path: str) -> None:
        Path(path, "modules.json").touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(MultiVectorEncoder, "save_pretrained", full)
    output = tmp_path / "below" / "cut"
    output.parent.mkdir()
    assert refused(capsys, model, 64, output) == f"{output} cannot be written (no space left on device)"
