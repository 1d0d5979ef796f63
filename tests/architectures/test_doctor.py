"""diagnose and describe_modules: the exact words on heads whose facts are worked out by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from architectures.doctor import describe_modules, diagnose
from architectures.factory import build_encoder
from configs.schema import HeadLayer, Norm, Side
from tests.architectures.conftest import backbone_config, head_config, head_layer
from tests.checkpoints import Checkpoint

Diagnose = Callable[..., dict[str, str]]

PYLATE, STANFORD = "PyLate 1.6", "Stanford ColBERT 0.2"
NO_LINEAR = f"stanford no (its head is no linear map, and {STANFORD} has one bias-free linear layer)"
SEVERAL = (
    f"stanford no (its head is one linear map in several layers, and {STANFORD} has one layer: "
    "fold=true writes it as one)"
)
WITH_BIAS = f"stanford no (its head has a bias, and {STANFORD} has one bias-free linear layer)"


def dense_alone(extras: str) -> str:
    return "; ".join(
        f"{name} no (layer 0 of the head is {extras}, and {library} has Dense layers alone)"
        for name, library in (("pylate", PYLATE), ("stanford", STANFORD))
    )


@pytest.fixture
def diagnosed(tiny_bert: Path) -> Diagnose:
    """The facts of a head of these layers on a BERT 32 wide."""

    def diagnose_head(*layers: HeadLayer) -> dict[str, str]:
        torch.manual_seed(0)
        return diagnose(build_encoder(backbone_config(tiny_bert), head_config(*layers, keep="none")))

    return diagnose_head


def test_one_bias_free_layer_is_linear_and_every_library_holds_it(diagnosed: Diagnose) -> None:
    assert diagnosed(head_layer(128)) == {
        "head": "32 -> 128, 4,096 parameters; linear",
        "residuals": "none",
        # 2 bytes for each of 128 numbers; 2 bits for each and 4 bytes.
        "index": "256 MB per million tokens at float16, 36 MB at 2 bits with 4 bytes for the centroid",
        "exports": "sentence_transformers yes; pylate yes; stanford yes",
    }


def test_mlp_residual_is_not_linear_and_its_residual_is_a_learned_map(diagnosed: Diagnose) -> None:
    layers = [head_layer(64, bias=True, activation="gelu", residual=True), head_layer(128)]
    assert diagnosed(*layers) == {
        # 32 * 64 twice, 64, and 64 * 128.
        "head": "32 -> 64 -> 128, 12,352 parameters; not linear",
        "residuals": "layer 0 adds a learned 32 -> 64 map of its input, not the input",
        "index": "256 MB per million tokens at float16, 36 MB at 2 bits with 4 bytes for the centroid",
        "exports": f"sentence_transformers yes; pylate yes; {NO_LINEAR}",
    }


def test_ettins_tip_is_one_linear_map_in_disguise(diagnosed: Diagnose) -> None:
    assert diagnosed(head_layer(64, residual=True), head_layer(32)) == {
        # 32 * 64 twice and 64 * 32, where 32 * 32 would do.
        "head": "32 -> 64 -> 32, 6,144 parameters; linear in disguise: it folds to one 32 -> 32 matrix of "
        "1,024 parameters, 6 times fewer",
        "residuals": "layer 0 adds a learned 32 -> 64 map of its input, not the input",
        "index": "64 MB per million tokens at float16, 12 MB at 2 bits with 4 bytes for the centroid",
        "exports": f"sentence_transformers yes; pylate yes; {SEVERAL}",
    }


def test_a_bias_is_said_and_kept_by_a_fold(diagnosed: Diagnose) -> None:
    one = diagnosed(head_layer(96, bias=True))
    assert one["head"] == "32 -> 96, 3,168 parameters; linear with a bias"
    assert one["index"] == "192 MB per million tokens at float16, 28 MB at 2 bits with 4 bytes for the centroid"
    assert one["exports"] == f"sentence_transformers yes; pylate yes; {WITH_BIAS}"
    two = diagnosed(head_layer(64, bias=True), head_layer(32))
    assert two["head"] == (
        "32 -> 64 -> 32, 4,160 parameters; linear with a bias in disguise: it folds to one 32 -> 32 matrix of "
        "1,056 parameters, 3.94 times fewer"
    )


def test_a_bottleneck_is_said_by_the_rank_of_its_fold(diagnosed: Diagnose) -> None:
    # No fewer parameters: 32 * 64 fold 32 * 4 and 4 * 64.
    assert diagnosed(head_layer(4), head_layer(64))["head"] == (
        "32 -> 4 -> 64, 384 parameters; linear in disguise: it folds to one 32 -> 64 matrix of rank 4 of "
        "2,048 parameters"
    )


def test_a_layer_that_adds_its_input_folds_to_as_many_parameters(diagnosed: Diagnose) -> None:
    assert diagnosed(head_layer(32, residual=True))["head"] == (
        "32 -> 32, 1,024 parameters; linear in disguise: it folds to one 32 -> 32 matrix of 1,024 parameters"
    )


def test_a_gated_layer_is_said_and_asks_for_trust(diagnosed: Diagnose) -> None:
    assert diagnosed(head_layer(32, activation="sigmoid", gated=True), head_layer(128)) == {
        "head": "32 -> 32 -> 128, 6,144 parameters; not linear",
        "residuals": "none",
        "index": "256 MB per million tokens at float16, 36 MB at 2 bits with 4 bytes for the centroid",
        "exports": f"sentence_transformers with trust_remote_code; {dense_alone('gated')}",
    }


def test_a_normalised_layer_without_activation_is_not_linear(diagnosed: Diagnose) -> None:
    facts = diagnosed(head_layer(32, residual=True, norm=Norm.layer_norm))
    # 32 * 32 and two vectors of the norm.
    assert facts["head"] == "32 -> 32, 1,088 parameters; not linear"
    assert facts["residuals"] == "layer 0 adds its input"
    refusals = dense_alone("normalised before by LayerNorm")
    assert facts["exports"] == f"sentence_transformers with trust_remote_code; {refusals}"


def test_dropout_alone_leaves_a_layer_linear_and_every_library_holds_it(diagnosed: Diagnose) -> None:
    facts = diagnosed(head_layer(128, dropout=0.1))
    assert facts["head"] == "32 -> 128, 4,096 parameters; linear"
    assert facts["exports"] == "sentence_transformers yes; pylate yes; stanford yes"


def test_every_residual_is_named_with_its_layer(diagnosed: Diagnose) -> None:
    layers = [head_layer(64), head_layer(64, activation="relu", residual=True), head_layer(16, residual=True)]
    assert diagnosed(*layers)["residuals"] == (
        "layer 1 adds its input, layer 2 adds a learned 64 -> 16 map of its input, not the input"
    )


def test_prompts_of_words_are_the_obstacle_of_other_libraries(embeddinggemma: Path) -> None:
    facts = diagnose(build_encoder(backbone_config(embeddinggemma), head_config()))
    assert facts["exports"] == "sentence_transformers yes; " + "; ".join(
        f"{name} no (the prefix 'what is : ' of a query is several tokens, and {library} puts one token before a text)"
        for name, library in (("pylate", PYLATE), ("stanford", STANFORD))
    )


def test_a_stanford_colbert_is_one_linear_layer(stanford: Checkpoint) -> None:
    facts = diagnose(build_encoder(backbone_config(stanford.folder), head_config()))
    assert facts == {
        "head": "32 -> 24, 768 parameters; linear",
        "residuals": "none",
        "index": "48 MB per million tokens at float16, 10 MB at 2 bits with 4 bytes for the centroid",
        "exports": "sentence_transformers yes; pylate yes; stanford yes",
    }


def test_a_diagnosis_changes_nothing(tiny_bert: Path) -> None:
    layers = [head_layer(64, bias=True, dropout=0.5), head_layer(32, residual=True)]
    encoder = build_encoder(backbone_config(tiny_bert), head_config(*layers, keep="none"))
    modules, before = list(encoder), {name: value.clone() for name, value in encoder.state_dict().items()}
    diagnose(encoder)
    assert all(one is other for one, other in zip(encoder, modules, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


# --- Modules ---------------------------------------------------------------------------------------------------------


def test_every_module_is_described_with_its_parameters(tiny_bert: Path) -> None:
    layers = [
        head_layer(64, bias=True, activation="gelu", residual=True),
        head_layer(64, activation="silu", residual=True, norm=Norm.rms_norm, gated=True, dropout=0.1),
        head_layer(8),
    ]
    encoder = build_encoder(backbone_config(tiny_bert), head_config(*layers, keep="none"))
    backbone, *others = describe_modules(encoder)
    assert backbone == ("Transformer", "BertModel, 32 wide", sum(value.numel() for value in encoder[0].parameters()))
    extras = "normalised before by RMSNorm and gated and trained with dropout 0.1"
    assert others == [
        ("Dense", "32 -> 64, GELU, bias, residual over a learned map", 32 * 64 + 64 + 32 * 64),
        ("Projection", f"64 -> 64, SiLU, no bias, {extras}, residual", 2 * 64 * 64 + 64),
        ("Dense", "64 -> 8, Identity, no bias", 512),
        ("MultiVectorMask", "32 tokens not scored in a document", 0),
        ("Normalize", "unit length", 0),
    ]


@pytest.mark.parametrize(
    ("skiplist", "sides", "expected"),
    [
        ([], [Side.document], "scores every token"),
        (["cat"], [Side.query], "1 tokens not scored in a query"),
        (["cat", ","], [Side.query, Side.document], "2 tokens not scored in a query and document"),
    ],
)
def test_the_mask_says_how_many_tokens_it_leaves_out_and_where(
    tiny_bert: Path, skiplist: list[str], sides: list[Side], expected: str
) -> None:
    backbone = backbone_config(tiny_bert, skiplist=skiplist, skiplist_sides=sides)
    assert ("MultiVectorMask", expected, 0) in describe_modules(build_encoder(backbone, head_config()))
