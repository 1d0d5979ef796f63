"""scripts/export.py as it is typed: what it writes and prints, and what it refuses in one line without writing."""

import errno
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder
from torch import Tensor

from architectures.export import Format, how_to_load, write_layout
from architectures.layouts import Checkpoint
from architectures.readers import read_export, vectors_of
from configs.schema import BackboneConfig, ConfigError, HeadLayer
from scripts import export
from tests.architectures.test_export import LINEAR, WIDE, files_of, make_trained, read_json
from tests.conftest import ROOT, run_command

PROGRAM = (sys.executable, str(ROOT / "scripts" / "export.py"))
NAMES = ["sentence_transformers", "pylate", "stanford"]
QUERY, DOCUMENT = ["what is a cat?"], ["the cat meows, a dog barks!"]
CARD = """---
base_model: someone/backbone
license: mit
tags:
- ColBERT
---

# A model

Trained on text.
"""


pytestmark = pytest.mark.usefixtures("as_loud_as_before", "unreachable_hub")


@pytest.fixture(scope="session")
def saved(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models as runs save them, by their heads: all 24 wide, with cards."""
    heads: dict[str, tuple[HeadLayer, ...]] = {
        "linear": (LINEAR,),
        "gated": (replace(WIDE, gated=True), LINEAR),
        "chain": (replace(WIDE, activation=LINEAR.activation, bias=False), LINEAR),
        "deep": (WIDE, LINEAR),
    }
    folders = {}
    for name, layers in heads.items():
        folders[name] = tmp_path_factory.mktemp(name) / "model"
        encoder = make_trained(tiny_bert, *layers, query_length=12, document_length=30)
        encoder.save_pretrained(str(folders[name]), create_model_card=False)
        (folders[name] / "README.md").write_text(CARD)
    return folders


@pytest.fixture
def model(saved: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the linear one, or of the one that the test names."""
    return Path(shutil.copytree(saved[getattr(request, "param", "linear")], tmp_path / "model"))


def head(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("model", [name], indirect=True)


def below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """The one line of a command that writes nothing into the folder."""
    before = below(folder)
    capsys.readouterr()
    assert export.main(arguments) == 2
    printed, error = capsys.readouterr()
    assert below(folder) == before
    assert printed == ""
    assert error.startswith("export: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    return error.removeprefix("export: ").removesuffix("\n")


def done(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints that does all it was asked."""
    capsys.readouterr()
    assert export.main(arguments) == 0
    printed, error = capsys.readouterr()
    assert error == ""
    return printed


def announced(folder: Path | str, layout: Format, *, trust: bool = False) -> str:
    """The lines about an export, as a pattern: how far it is from the model differs from machine to machine."""
    lines = "".join(f"    {line}\n" for line in how_to_load(layout, str(folder), trust=trust).splitlines())
    said = re.escape(f"{folder}: {layout.value}, scores at most ") + r"\d\.\de[-+]\d\d apart; load it with\n"
    return said + re.escape(lines) + "\n"


def vectors(folder: Path, layout: Format = Format.sentence_transformers) -> list[Tensor]:
    read = read_export(folder, layout)
    return [read(QUERY, task="query")[0], read(DOCUMENT, task="document")[0]]


# --- What it writes --------------------------------------------------------------------------------------------------


def test_the_command_writes_every_layout_beside_the_model_and_says_how_to_load_each(model: Path) -> None:
    before = below(model)
    typed = run_command(f"model={model}", "format=all", program=PROGRAM)
    assert (typed.returncode, typed.stderr) == (0, "")
    folders = {layout: model.with_name(f"model_{layout.name}") for layout in Format}
    assert re.fullmatch("".join(announced(folder, layout) for layout, folder in folders.items()), typed.stdout)
    assert sorted(model.parent.iterdir()) == sorted([model, *folders.values()])
    assert below(model) == before
    expected = vectors(model)
    for layout, folder in folders.items():
        for ours, theirs in zip(expected, vectors(folder, layout), strict=True):
            # Rounding of float32 numbers below 1, summed in another order.
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", list(Format), ids=NAMES)
def test_one_format_writes_that_layout_alone(model: Path, capsys: pytest.CaptureFixture[str], layout: Format) -> None:
    # With the slash that a shell completes a folder's name with.
    printed = done(capsys, f"model={model}/", f"format={layout.name}")
    folder = model.with_name(f"model_{layout.name}")
    assert re.fullmatch(announced(folder, layout), printed)
    assert sorted(model.parent.iterdir()) == [model, folder]
    mark = {"sentence_transformers": "3_Normalize/config.json", "pylate": "1_Dense/config.json"}
    assert mark.get(layout.name, "artifact.metadata") in files_of(folder)


@head("gated")
def test_all_says_which_layouts_cannot_hold_the_model_and_writes_the_others(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = done(capsys, f"model={model}", "format=all")
    folder = model.with_name("model_sentence_transformers")
    reasons = "".join(
        f"format={layout.name} cannot hold {model}: layer 0 of the head is gated, and {layout.value} has Dense layers "
        "alone\n\n"
        for layout in (Format.pylate, Format.stanford)
    )
    assert re.fullmatch(announced(folder, Format.sentence_transformers, trust=True) + re.escape(reasons), printed)
    assert sorted(model.parent.iterdir()) == [model, folder]


def test_the_output_may_lie_in_folders_that_are_not_there_yet(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a" / "b c"
    assert re.fullmatch(
        announced(folder, Format.pylate), done(capsys, f"model={model}", "format=pylate", f"output={folder}")
    )
    assert list(folder.parent.iterdir()) == [folder]
    assert "modules.json" in files_of(folder)


def test_all_into_an_output_writes_a_folder_for_each_layout(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done(capsys, f"model={model}", "format=all", f"output={tmp_path / 'out'}")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize(
    ("name", "folder"), [("someone/model", "someone--model_pylate"), ("colbertv2", "colbertv2_pylate")]
)
def test_a_model_that_is_no_folder_is_written_into_the_folder_where_the_command_is_typed(
    tiny_bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    folder: str,
) -> None:
    asked = []

    def load(name: str, *overrides: str) -> MultiVectorEncoder:
        asked.append(name)
        return make_trained(tiny_bert, LINEAR)

    monkeypatch.setattr(export, "load_model", load)
    monkeypatch.setattr(export, "read_checkpoint", lambda _: SimpleNamespace(has_head=True))
    monkeypatch.chdir(tmp_path)
    assert export.main([f"model={name}", "format=pylate"]) == 0
    assert re.fullmatch(announced(folder, Format.pylate), capsys.readouterr().out)
    assert asked == [name]
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_the_keys_of_a_checkpoint_reach_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def read(backbone: BackboneConfig) -> Checkpoint:
        asked.append((backbone.name, backbone.revision, backbone.trust_remote_code, backbone.allow_pickle))
        raise ConfigError("asked")

    monkeypatch.setattr(export, "read_checkpoint", read)
    for given in ([], ["trust_remote_code=true"], ["revision=1e3", "allow_pickle=true"]):
        assert refused(capsys, tmp_path, "model=someone/model", "format=pylate", *given) == "asked"
    assert asked == [
        ("someone/model", None, False, False),
        ("someone/model", None, True, False),
        ("someone/model", "1e3", False, True),
    ]


@pytest.mark.parametrize("name", ["2026_01", "it's", "a=b"])
def test_names_of_folders_are_taken_as_they_are_typed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(model.rename(tmp_path / name).parent)
    done(capsys, f"model={name}", "format=pylate", f"output=out/{name}")
    monkeypatch.chdir(tmp_path / "out")
    done(capsys, f"model=../{name}", "format=pylate", f"output={name}x")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [name, f"{name}x"]


@pytest.mark.parametrize("name", ["2026_01", "1e3", "on"])
def test_a_name_that_reads_as_a_number_is_taken_as_it_is_typed(name: str) -> None:
    options = export.parse([f"model={name}", "format=pylate", f"output={name}"])
    assert (options.model, options.output) == (name, name)


def test_a_model_stored_in_half_precision_is_exported_in_float32(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = MultiVectorEncoder(str(saved["linear"]), device="cpu", local_files_only=True).half()
    half.save_pretrained(str(tmp_path / "half"), create_model_card=False)
    done(capsys, f"model={tmp_path / 'half'}", "format=all")
    for file in ("half_pylate/1_Dense/model.safetensors", "half_stanford/model.safetensors"):
        assert {tensor.dtype for tensor in load_file(tmp_path / file).values()} == {torch.float32}


def test_what_a_killed_command_left_does_not_get_into_the_export(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = model.with_name("model_pylate.unfinished")
    unfinished.mkdir()
    (unfinished / "left.txt").touch()
    done(capsys, f"model={model}", "format=pylate")
    assert not unfinished.exists()
    assert "left.txt" not in files_of(model.with_name("model_pylate"))


# --- Its card --------------------------------------------------------------------------------------------------------


def test_the_card_of_an_export_keeps_the_metadata_and_the_text_of_the_models_own(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done(capsys, f"model={model}", "format=pylate")
    folder = model.with_name("model_pylate")
    own, card = ModelCard.load(model / "README.md"), ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == own.data.to_dict()
    assert card.data.to_dict() == {"base_model": "someone/backbone", "license": "mit", "tags": ["ColBERT"]}
    said, _, text = card.text.partition("# A model")
    assert text == own.text.partition("# A model")[2]
    lines = how_to_load(Format.pylate, str(folder))
    assert re.fullmatch(
        r"\s*In the layout of PyLate 1\.6; read back, scores over a fixed set of texts are at most \d\.\de-\d\d apart "
        rf"from the model's own\.\n\n```python\n{re.escape(lines)}\n```\n+",
        said,
    )


@pytest.mark.parametrize("own", [None, "# A model\n\n---\n\nwithout metadata\n"], ids=["none", "no metadata"])
def test_a_card_without_metadata_gives_an_export_none(
    model: Path, capsys: pytest.CaptureFixture[str], own: str | None
) -> None:
    (model / "README.md").unlink()
    if own is not None:
        (model / "README.md").write_text(own)
    done(capsys, f"model={model}", "format=stanford")
    card = (model.with_name("model_stanford") / "README.md").read_text()
    assert ModelCard(card).data.to_dict() == {}
    assert card.startswith("In the layout of Stanford ColBERT 0.2;")
    assert card.endswith(own or "```\n")


# --- fold= and width= ------------------------------------------------------------------------------------------------


@head("chain")
def test_two_linear_layers_are_written_as_stanfords_one_where_they_are_folded(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, model.parent, f"model={model}", "format=stanford") == (
        f"format=stanford cannot hold {model}: its head is one linear map in several layers, and Stanford ColBERT 0.2 "
        "has one layer: fold=true writes it as one; formats that work: sentence_transformers, pylate"
    )
    done(capsys, f"model={model}", "format=stanford", "fold=true")
    folder = model.with_name("model_stanford")
    first, second = (load_file(model / f"{index}_Dense" / "model.safetensors") for index in (1, 2))
    map_of_both = second["linear.weight"] @ (first["linear.weight"] + first["residual.weight"])
    # Sums of at most 48 products of float32 numbers below 1, here rounded twice.
    torch.testing.assert_close(load_file(folder / "model.safetensors")["linear.weight"], map_of_both, atol=1e-6, rtol=0)
    for ours, theirs in zip(vectors(model), vectors(folder, Format.stanford), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


@head("deep")
def test_a_head_that_is_not_linear_does_not_fold(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, model.parent, f"model={model}", "format=all", "fold=true") == (
        "only a head without activations, gates and norms folds to one linear map"
    )


@pytest.mark.parametrize("model", ["linear", "gated"], indirect=True)
def test_a_width_keeps_the_first_components_at_unit_length(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done(capsys, f"model={model}", "format=sentence_transformers", "width=8")
    cut = MultiVectorEncoder(
        str(model.with_name("model_sentence_transformers")), device="cpu", local_files_only=True, trust_remote_code=True
    )
    whole = MultiVectorEncoder(str(model), device="cpu", local_files_only=True, trust_remote_code=True)
    assert cut.get_embedding_dimension() == 8
    for task, texts in (("query", QUERY), ("document", DOCUMENT)):
        wide, narrow = (vectors_of(encoder, texts, task=task)[0] for encoder in (whole, cut))
        # One rounding of float32 numbers below 1.
        torch.testing.assert_close(narrow, F.normalize(wide[:, :8], dim=-1), atol=1e-6, rtol=0)


def test_a_model_that_is_cut_fits_every_layout(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done(capsys, f"model={model}", "format=all", "width=8")
    assert read_json(model.with_name("model_pylate") / "1_Dense" / "config.json")["out_features"] == 8
    assert read_json(model.with_name("model_stanford") / "artifact.metadata")["dim"] == 8


def test_the_models_own_width_changes_no_weight(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done(capsys, f"model={model}", "format=sentence_transformers", "width=24")
    folder = model.with_name("model_sentence_transformers")
    for file in ("model.safetensors", "1_Dense/model.safetensors"):
        ours, theirs = load_file(model / file), load_file(folder / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("width", [0, -1, 25])
def test_a_width_that_the_model_does_not_have_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    assert refused(capsys, model.parent, f"model={model}", "format=pylate", f"width={width}") == (
        f"width={width} must be from 1 to 24, the width of the model's vectors"
    )


# --- What it refuses -------------------------------------------------------------------------------------------------

KEYS = "the arguments are model=, format=, output=, fold=, width=, revision=, trust_remote_code=, allow_pickle="


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["format=onnx"], "format=onnx must be one of sentence_transformers, pylate, stanford, all"),
        (["format=PyLate"], "format=PyLate must be one of sentence_transformers, pylate, stanford, all"),
        ([], f"format has no value: set format=...: {KEYS}"),
        (["format=pylate", "widht=8"], f"widht: {KEYS}"),
        (["format=pylate", "fold=maybe"], f"fold: value 'maybe' is not a valid bool (type str): {KEYS}"),
        (["format=pylate", "width=1.5"], f"width=1.5 must be of type integer: {KEYS}"),
        (["format=pylate", "width=wide"], f"width=wide must be of type integer: {KEYS}"),
        (["format=pylate", "pylate"], f"pylate: {KEYS}"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_arguments_that_are_none_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert refused(capsys, model.parent, f"model={model}", *arguments) == line


def test_a_command_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["format=pylate"]):
        assert refused(capsys, tmp_path, *arguments) == f"model has no value: set model=...: {KEYS}"


def test_help_is_the_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert done(capsys, "--help") == f"{export.__doc__}\n"


def test_a_mistake_is_one_line_on_stderr_and_no_traceback(tmp_path: Path) -> None:
    typed = run_command("model=nobody/none", "format=pylate", program=PROGRAM, cwd=tmp_path)
    assert (typed.returncode, typed.stdout) == (2, "")
    assert typed.stderr == (
        "export: backbone.name=nobody/none is neither a folder, an installed package (package:<module>/<folder>) nor a "
        "reachable Hub name (config.json: LocalEntryNotFoundError): check the spelling, the network and HF_TOKEN\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").touch()
    assert refused(capsys, tmp_path, f"model={tmp_path}", "format=pylate") == (
        f"backbone.name={tmp_path} is a folder without config.json: give the folder of a saved model"
    )


def test_a_model_without_a_head_is_refused_and_not_given_a_random_one(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "plain"))
    assert refused(capsys, tmp_path, f"model={folder}", "format=all") == (
        f"model={folder} has no projection head, and a new one is random: train it first"
    )


@pytest.mark.parametrize("file", ["model.safetensors", "1_Dense/model.safetensors"])
def test_a_model_that_is_cut_off_is_refused(model: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    (model / file).write_bytes((model / file).read_bytes()[:20])
    line = refused(capsys, model.parent, f"model={model}", "format=pylate")
    assert line.startswith(f"backbone.name={model} cannot be loaded (")
    assert line.endswith("): is the model complete, and of a kind that transformers knows?")


@head("gated")
@pytest.mark.parametrize("layout", [Format.pylate, Format.stanford], ids=["pylate", "stanford"])
def test_a_layout_that_cannot_hold_the_model_is_refused_with_those_that_can(
    model: Path, capsys: pytest.CaptureFixture[str], layout: Format
) -> None:
    assert refused(capsys, model.parent, f"model={model}", f"format={layout.name}") == (
        f"format={layout.name} cannot hold {model}: layer 0 of the head is gated, and {layout.value} has Dense layers "
        "alone; formats that work: sentence_transformers"
    )


@pytest.mark.parametrize(("kind", "named"), [("folder", True), ("file", False)])
def test_an_output_that_exists_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], kind: str, named: bool
) -> None:
    output = model.with_name("mine" if named else "model_pylate")
    if kind == "folder":
        output.mkdir()
    else:
        output.write_text("mine")
    arguments = [f"output={output}"] if named else []
    assert refused(capsys, model.parent, f"model={model}", "format=pylate", *arguments) == (
        f"output={output} exists: name a new folder"
    )


def test_all_writes_nothing_where_one_of_its_outputs_exists(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = model.with_name("model_stanford")
    output.mkdir()
    assert refused(capsys, model.parent, f"model={model}", "format=all") == f"output={output} exists: name a new folder"


def test_an_output_that_exists_is_refused_before_the_model_is_loaded(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: str) -> MultiVectorEncoder:
        raise AssertionError("minutes, for a large model")

    monkeypatch.setattr(export, "load_model", load)
    line = refused(capsys, model.parent, f"model={model}", "format=pylate", f"output={model}")
    assert line == f"output={model} exists: name a new folder"


# --- What it does not leave ------------------------------------------------------------------------------------------


# Not -1: turned round on both sides, a component adds to a score what it did.
@pytest.mark.parametrize(
    ("layout", "factor"), [(Format.sentence_transformers, 3.0), (Format.pylate, 3.0), (Format.pylate, float("nan"))]
)
def test_an_export_that_scores_otherwise_than_the_model_is_not_left(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, layout: Format, factor: float
) -> None:
    def damaged(encoder: MultiVectorEncoder, layout: Format, folder: Path) -> None:
        write_layout(encoder, layout, folder)
        weights = load_file(folder / "1_Dense" / "model.safetensors")
        weights["linear.weight"][0] *= factor
        save_file(weights, folder / "1_Dense" / "model.safetensors")

    monkeypatch.setattr(export, "write_layout", damaged)
    line = refused(capsys, model.parent, f"model={model}", f"format={layout.name}")
    # Each of 12 cosines changes by 2 at most.
    apart = "nan" if math.isnan(factor) else r"\d\.\de-0[12]|\d\.\de\+0[01]"
    assert re.fullmatch(
        rf"format={layout.name}: read back, scores are ({apart}) apart, above 0\.0001; nothing is left", line
    )


def test_a_setting_that_is_written_otherwise_is_not_left(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(encoder: MultiVectorEncoder, layout: Format, folder: Path) -> None:
        write_layout(encoder, layout, folder)
        metadata = read_json(folder / "artifact.metadata")
        (folder / "artifact.metadata").write_text(json.dumps(metadata | {"attend_to_mask_tokens": True}))

    monkeypatch.setattr(export, "write_layout", damaged)
    line = refused(capsys, model.parent, f"model={model}", "format=stanford")
    assert re.fullmatch(r"format=stanford: read back, scores are \S+ apart, above 0\.0001; nothing is left", line)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"),) * 2,
        (Exception("No space left on device (os error 28)"),) * 2,
    ],
    ids=["OSError", "safetensors", "tokenizers"],
)
def test_a_full_disk_leaves_nothing(
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str | Exception,
) -> None:
    def full(encoder: MultiVectorEncoder, layout: Format, folder: Path) -> None:
        (folder / "modules.json").touch()
        raise error

    monkeypatch.setattr(export, "write_layout", full)
    assert refused(capsys, model.parent, f"model={model}", "format=pylate") == (
        f"output={model}_pylate cannot be written or read back ({reason})"
    )


def test_an_interrupted_export_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(encoder: MultiVectorEncoder, layout: Format, folder: Path) -> None:
        write_layout(encoder, layout, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_layout", interrupted)
    before = below(model.parent)
    with pytest.raises(KeyboardInterrupt):
        export.main([f"model={model}", "format=pylate"])
    assert below(model.parent) == before
