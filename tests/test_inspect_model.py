"""scripts/inspect_model.py as it is typed: what it says of a model, and what it refuses in one line."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import MultiVectorEncoder

from configs.schema import Expansion
from scripts import inspect_model
from tests.architectures.test_export import LINEAR, WIDE, make_encoder, transformer_of
from tests.checkpoints import Checkpoint, modernbert, stanford
from tests.conftest import ROOT, run_command

# Fixtures, which pytest finds by their names here.
__all__ = ["modernbert", "stanford"]
PROGRAM = (sys.executable, str(ROOT / "scripts" / "inspect_model.py"))


pytestmark = pytest.mark.usefixtures("as_loud_as_before", "unreachable_hub")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[list[str]], dict[str, str]]:
    """The rows of modules, without their header, and the facts by name."""
    capsys.readouterr()
    assert inspect_model.main(arguments) == 0
    printed, error = capsys.readouterr()
    assert error == ""
    return parse(printed)


def parse(printed: str) -> tuple[list[list[str]], dict[str, str]]:
    modules, table = printed.strip().split("\n\n")
    # A fact that is long goes on below itself.
    joined = re.sub(r"\s*\n\s{2,}", " ", table)
    facts = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in joined.splitlines())
    return [re.split(r"\s{2,}", line.strip()) for line in modules.splitlines()][1:], facts


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert inspect_model.main(arguments) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("inspect_model: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    return error.removeprefix("inspect_model: ").removesuffix("\n")


def test_a_plain_backbone_is_said_to_be_what_a_run_would_make_of_it(
    tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, facts = said(capsys, f"model={tiny_bert}")
    # 102 tokens and the two markers; 64 positions; two layers of 8,544; a head of 32 x 128.
    backbone = (102 + 2 + 64 + 2) * 32 + 64 + 2 * 8_544
    assert rows == [
        ["Transformer", "BertModel, 32 wide", f"{backbone:,}"],
        ["Dense", "32 -> 128, Identity, no bias", "4,096"],
        ["MultiVectorMask", "32 tokens not scored in a document"],
        ["Normalize", "unit length"],
        [f"{backbone + 4096:,}"],
    ]
    apart = {key: facts.pop(key) for key in ("alone or in a batch", "sdpa or eager")}
    assert facts == {
        "checkpoint": f"{tiny_bert}, a plain backbone",
        "head": "32 -> 128, 4,096 parameters; linear",
        "residuals": "none",
        "index": "256 MB per million tokens at float16, 36 MB at 2 bits with 4 bytes for the centroid",
        "exports": "sentence_transformers yes; pylate yes; stanford yes",
        "queries": "at most 32 tokens; filled to 32 with unattended mask tokens; prefix '[Q] '",
        "documents": "at most 64 tokens; prefix '[D] '",
    }
    for value in apart.values():
        found = re.fullmatch(r"vectors at most (\d\.\de[-+]\d\d) apart", value)
        assert found is not None
        # Rounding of float32 numbers below 1.
        assert float(found[1]) < 1e-5


def test_a_saved_model_is_said_with_its_own_head_and_settings_by_the_command(tiny_bert: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"query_length": 12, "document_length": 20, "skiplist": [",", "the"]}
    keys |= {"expansion": Expansion.none, "query_prefix": "[ask] ", "document_prefix": ""}
    encoder = make_encoder(tiny_bert, replace(WIDE, gated=True), LINEAR, **keys)
    folder = tmp_path / "a model"
    encoder.save_pretrained(str(folder), create_model_card=False)
    typed = run_command(f"model={folder}", program=PROGRAM, cwd=tmp_path)
    assert (typed.returncode, typed.stderr) == (0, "")
    rows, facts = parse(typed.stdout)
    assert rows[1:4] == [
        ["Projection", "32 -> 48, GELU, bias, gated, residual over a learned map", "4,704"],
        ["Dense", "48 -> 24, Identity, no bias", "1,152"],
        ["MultiVectorMask", "2 tokens not scored in a document"],
    ]
    reasons = [f"layer 0 of the head is gated, and {name} has Dense layers alone" for name in LIBRARIES]
    assert facts["checkpoint"] == f"{folder}, a sentence-transformers MultiVectorEncoder"
    assert facts["head"] == "32 -> 48 -> 24, 5,856 parameters; not linear"
    assert facts["residuals"] == "layer 0 adds a learned 32 -> 48 map of its input, not the input"
    assert facts["exports"] == (
        f"sentence_transformers with trust_remote_code; pylate no ({reasons[0]}); stanford no ({reasons[1]})"
    )
    assert facts["queries"] == "at most 12 tokens; prefix '[ask] '"
    assert facts["documents"] == "at most 20 tokens"


LIBRARIES = ("PyLate 1.6", "Stanford ColBERT 0.2")


def test_any_argument_of_a_run_changes_the_model(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, facts = said(
        capsys, f"model={tiny_bert}", "head=ettin_mlp", "backbone.document_length=40", "backbone.attention=eager"
    )
    assert [row[:2] for row in rows[1:3]] == [
        ["Dense", "32 -> 64, Identity, no bias, residual over a learned map"],
        ["Dense", "64 -> 32, Identity, no bias"],
    ]
    assert facts["head"] == (
        "32 -> 64 -> 32, 6,144 parameters; linear in disguise: it folds to one 32 -> 32 matrix of 1,024 parameters, "
        "6 times fewer"
    )
    assert facts["documents"] == "at most 40 tokens; prefix '[D] '"
    # It is the attention that the others are compared with.
    assert not [key for key in facts if "eager" in key]


def test_a_preset_brings_its_own_settings_and_takes_another_name(
    modernbert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, facts = said(capsys, "model=modernbert_base", f"backbone.name={modernbert}", "head=linear")
    assert facts["checkpoint"] == f"{modernbert}, a plain backbone"
    assert facts["documents"] == "at most 300 tokens; prefix '[D] '"
    assert facts["head"] == "32 -> 128, 4,096 parameters; linear"


def test_a_checkpoint_of_another_library_is_told_by_its_files(
    stanford: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    _, facts = said(capsys, f"model={stanford.folder}")
    assert facts["checkpoint"] == f"{stanford.folder}, a Stanford ColBERT"
    assert facts["head"] == "32 -> 24, 768 parameters; linear"
    assert facts["queries"] == "at most 12 tokens; filled to 12 with unattended mask tokens; prefix '[unused0]'"


def test_vectors_that_depend_on_the_batch_are_said_to(
    tiny_bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: str) -> MultiVectorEncoder:
        """Attention that sees the padding of a batch."""
        encoder = make_encoder(tiny_bert, LINEAR)
        model = transformer_of(encoder).model
        forward = model.forward
        model.forward = lambda *_, attention_mask, **keys: forward(
            attention_mask=torch.ones_like(attention_mask), **keys
        )
        return encoder

    monkeypatch.setattr(inspect_model, "load_model", load)
    assert inspect_model.main([f"model={tiny_bert}"]) == 1
    _, facts = parse(capsys.readouterr().out)
    found = re.fullmatch(r"vectors at most (\S+) apart", facts["alone or in a batch"])
    assert found is not None
    assert float(found[1]) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "model= is missing: give one folder, Hub name or member of configs/backbone"),
        (["head=linear"], "model= is missing: give one folder, Hub name or member of configs/backbone"),
        (
            ["model=nobody/nothing"],
            "backbone.name=nobody/nothing is neither a folder, an installed package (package:<module>/<folder>) nor a "
            "reachable Hub name (config.json: LocalEntryNotFoundError): check the spelling, the network and HF_TOKEN",
        ),
        (
            ["model=colbertv2"],
            "backbone.name=colbert-ir/colbertv2.0 is neither a folder, an installed package "
            "(package:<module>/<folder>) nor a reachable Hub name (config.json: LocalEntryNotFoundError): check the "
            "spelling, the network and HF_TOKEN",
        ),
        (["model=x", "backbone.nmae=y"], "backbone.nmae is no key; the nearest is backbone.name (README.md lists all)"),
    ],
    ids=["nothing", "no model", "Hub", "preset", "key"],
)
def test_what_cannot_be_loaded_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], line: str) -> None:
    assert refused(capsys, *arguments) == line


def test_an_unknown_head_is_refused_with_those_that_there_are(
    tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, f"model={tiny_bert}", "head=glue")
    assert line.startswith("head=glue")
    assert all(name in line for name in ("linear", "mlp_residual", "study/glu"))


def test_two_models_are_refused(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, f"model={tiny_bert}", "model=bert_base")
    assert line == "model= is given 2 times: give one folder, Hub name or member of configs/backbone"


def test_a_head_that_does_not_fit_is_refused(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, f"model={tiny_bert}", "head.keep=2") == (
        "head.keep=2: the checkpoint has 0 layers of its own: set 0 or less, or all"
    )


def test_help_is_the_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_model.main(["--help"]) == 0
    assert capsys.readouterr().out == f"{inspect_model.__doc__}\n"
