"""build_head by its keys; fold against products in float64; and cut_head: a cut model gives the first components of the
whole model's vectors, at unit length, after a save too."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize
from torch import Tensor, nn

from architectures.factory import build_encoder
from architectures.heads import (
    HeadModule,
    as_dense,
    build_head,
    cut_head,
    describe_extras,
    fold,
    fold_head,
    head_of,
    is_linear,
    portable,
    replace_head,
)
from architectures.projection import Projection
from configs.schema import ConfigError, HeadLayer, Norm
from tests.architectures.conftest import Copy, backbone_config, edit, head_config, head_layer

QUERIES = ["what is a cat?", "the dog barks"]
DOCUMENTS = ["the cat meows, a dog barks!", "fish"]

Build = Callable[..., MultiVectorEncoder]


# On a backbone 32 wide.
HEADS = {
    "linear": [head_layer(48)],
    "bias": [head_layer(48, bias=True)],
    "mlp_residual": [head_layer(64, bias=True, activation="gelu", residual=True), head_layer(48)],
    "gelu last": [head_layer(48, bias=True, activation="gelu")],
    "learned residual last": [head_layer(48, bias=True, activation="gelu", residual=True)],
    "residual of equal width last": [head_layer(32, bias=True, activation="gelu", residual=True)],
    "residual of equal width without bias": [head_layer(64), head_layer(64, activation="tanh", residual=True)],
}


# With layers of our own, whose code stock classes must be told to trust.
OWN_HEADS = {
    "gated and normalised last": [
        head_layer(64),
        head_layer(48, bias=True, activation="silu", residual=True, gated=True, norm=Norm.rms_norm),
    ],
    "gated before a linear layer": [
        head_layer(64, bias=True, activation="sigmoid", residual=True, gated=True),
        head_layer(48),
    ],
    "dropout last, over its own width": [head_layer(32, bias=True, activation="gelu", residual=True, dropout=0.5)],
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def build(tiny_bert: Path) -> Build:
    """Build with the layers given, after seeding; biases are drawn too."""

    def build_with(*layers: HeadLayer) -> MultiVectorEncoder:
        torch.manual_seed(0)
        backbone = backbone_config(tiny_bert, query_length=12, document_length=16)
        return build_encoder(backbone, head_config(*layers, keep="none")).eval()

    return build_with


def new_head(*layers: HeadLayer, width: int = 32) -> list[HeadModule]:
    torch.manual_seed(0)
    return build_head(head_config(*layers, keep="none"), [], width)


def widths(layers: Sequence[HeadModule]) -> list[tuple[int, int]]:
    return [(layer.linear.in_features, layer.linear.out_features) for layer in layers]


# --- The keys of a head ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "count"), [("all", 3), ("3", 3), ("2", 2), ("1", 1), ("0", 0), ("none", 0)])
def test_keep_takes_the_first_layers_as_they_are_and_the_listed_one_follows(keep: str, count: int) -> None:
    own = new_head(head_layer(64), head_layer(48), head_layer(16))
    layers = build_head(head_config(head_layer(8), keep=keep), own, 32)
    assert len(layers) == count + 1
    assert all(kept is mine for kept, mine in zip(layers, own[:count], strict=False))
    assert widths(layers)[-1] == ([32, 64, 48, 16][count], 8)


def test_keeping_one_layer_of_a_checkpoint_keeps_the_first_with_its_weights(embeddinggemma: Path) -> None:
    (layer,) = head_of(build_encoder(backbone_config(embeddinggemma), head_config(keep="1")))
    assert torch.equal(layer.linear.weight, load_file(embeddinggemma / "2_Dense/model.safetensors")["linear.weight"])


@pytest.mark.parametrize("count", [0, 2])
def test_more_layers_to_keep_than_there_are_are_refused_with_both_numbers(count: int) -> None:
    own = new_head(head_layer(64), head_layer(48))[:count]
    message = f"head.keep=3: the checkpoint has {count} layers of its own: set {count} or less, or all"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build_head(head_config(keep="3"), own, 32)


@pytest.mark.parametrize(
    ("folder", "takes", "gives", "remedy", "left"),
    [("3_Dense", 20, 128, "1", [(32, 128)]), ("2_Dense", 24, 32, "none", [(32, 128)])],
    ids=["between layers", "after the backbone"],
)
def test_kept_layers_that_do_not_fit_are_refused_with_both_widths_and_the_remedy_works(
    embeddinggemma: Path, copy: Copy, folder: str, takes: int, gives: int, remedy: str, left: list[tuple[int, int]]
) -> None:
    found = copy(embeddinggemma)
    weight = load_file(found / folder / "model.safetensors")["linear.weight"]
    save_file({"linear.weight": weight[:, :takes].contiguous()}, found / folder / "model.safetensors")
    edit(found / folder / "config.json", in_features=takes)
    index = int(folder[0]) - 2
    message = (
        f"head.keep=all: layer {index} of the checkpoint's head takes vectors of {takes}, and the one before gives "
        f"{gives}: set head.keep={remedy}"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build_encoder(backbone_config(found), head_config())
    assert widths(head_of(build_encoder(backbone_config(found), head_config(keep=remedy)))) == left


def test_in_features_that_fit_are_taken_and_others_are_refused_with_both_widths() -> None:
    first = head_layer(48, in_features=32)
    assert widths(new_head(first, head_layer(8, in_features=48))) == [(32, 48), (48, 8)]
    message = "head.layers[1].in_features=32, and the one before gives 48: set it to that, or leave it out"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        new_head(first, head_layer(8, in_features=32))


def test_in_features_of_the_first_listed_layer_are_checked_against_the_last_kept() -> None:
    own = new_head(head_layer(64))
    message = r"^head\.layers\[0\]\.in_features=32, and the one before gives 64: "
    with pytest.raises(ConfigError, match=message):
        build_head(head_config(head_layer(8, in_features=32)), own, 32)


@pytest.mark.parametrize(
    ("own", "layers", "size", "expected"),
    [
        # Nothing to go by: PyLate's 128, or what is given.
        ([], [], None, [(32, 128)]),
        ([], [], 48, [(32, 48)]),
        ([], [], 32, [(32, 32)]),
        # PyLate's rule: one more layer only where the last gives another width.
        ([64, 16], [], None, [(32, 64), (64, 16)]),
        ([64, 16], [], 16, [(32, 64), (64, 16)]),
        ([64, 16], [], 128, [(32, 64), (64, 16), (16, 128)]),
        ([64], [24], None, [(32, 64), (64, 24)]),
        ([64], [24], 24, [(32, 64), (64, 24)]),
        ([64], [24], 64, [(32, 64), (64, 24), (24, 64)]),
        ([], [24], 48, [(32, 24), (24, 48)]),
    ],
)
def test_embedding_size_is_the_width_of_the_vectors(
    own: list[int], layers: list[int], size: int | None, expected: list[tuple[int, int]]
) -> None:
    kept = new_head(*map(head_layer, own)) if own else []
    built = build_head(head_config(*map(head_layer, layers), embedding_size=size), kept, 32)
    assert widths(built) == expected
    new = built[len(own) + len(layers) :]
    assert [(layer.bias, type(layer.activation_function), layer.use_residual) for layer in new] == [
        (False, nn.Identity, False)
    ] * len(new)


def test_embedding_size_appends_to_the_dense_layers_of_a_sentence_transformer(embeddinggemma: Path) -> None:
    sizes = {size: head_config(embedding_size=size) for size in (32, 20)}
    built = {size: build_encoder(backbone_config(embeddinggemma), head) for size, head in sizes.items()}
    assert widths(head_of(built[32])) == [(32, 128), (128, 32)]
    assert widths(head_of(built[20])) == [(32, 128), (128, 32), (32, 20)]
    assert built[20].encode_document(["cat"])[0].shape[-1] == 20


def head_weights(seed: int | None, torch_seed: int) -> Tensor:
    torch.manual_seed(torch_seed)
    layers = build_head(head_config(head_layer(24, bias=True), head_layer(8, gated=True), seed=seed), [], 16)
    return torch.cat([parameter.flatten() for layer in layers for parameter in layer.parameters()])


def test_the_seed_of_the_head_alone_decides_its_new_layers() -> None:
    assert torch.equal(head_weights(3, torch_seed=0), head_weights(3, torch_seed=1))
    assert not torch.isclose(head_weights(3, torch_seed=0), head_weights(4, torch_seed=0)).any()


def test_without_a_seed_of_its_own_the_runs_decides_the_new_layers() -> None:
    assert torch.equal(head_weights(None, torch_seed=0), head_weights(None, torch_seed=0))
    assert not torch.isclose(head_weights(None, torch_seed=0), head_weights(None, torch_seed=1)).any()
    assert torch.equal(head_weights(None, torch_seed=3), head_weights(3, torch_seed=0))


def test_the_seed_of_the_head_leaves_the_runs_random_state_as_it_was(tiny_bert: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_head(head_config(head_layer(24), seed=3), [], 16)
    assert torch.equal(torch.get_rng_state(), before)
    # The rows of the markers come after the head.
    encoders = [build_seeded(tiny_bert, seed) for seed in (3, 4)]
    backbones = [dict(encoder[0].named_parameters()) for encoder in encoders]
    assert all(torch.equal(value, backbones[1][name]) for name, value in backbones[0].items())
    one, other = (head_of(encoder)[0].linear.weight for encoder in encoders)
    assert not torch.isclose(one, other).any()


def build_seeded(folder: Path, seed: int) -> MultiVectorEncoder:
    torch.manual_seed(0)
    return build_encoder(backbone_config(folder), head_config(seed=seed))


def test_the_seed_of_the_head_leaves_kept_layers_as_they_are(embeddinggemma: Path) -> None:
    encoder = build_encoder(backbone_config(embeddinggemma), head_config(seed=3))
    stored = load_file(embeddinggemma / "2_Dense/model.safetensors")["linear.weight"]
    assert torch.equal(head_of(encoder)[0].linear.weight, stored)


# --- Linear heads ----------------------------------------------------------------------------------------------------

# Each with the layers that it has, as build_head takes them.
LINEAR_HEADS = {
    "one": [head_layer(8)],
    "bias": [head_layer(8, bias=True)],
    "residual over its own width": [head_layer(12, bias=True, residual=True)],
    "residual over a learned map": [head_layer(8, bias=True, residual=True)],
    "bias in the first alone": [head_layer(20, bias=True), head_layer(8)],
    "bias in the last alone": [head_layer(20), head_layer(8, bias=True)],
    "all at once": [
        head_layer(20, bias=True, residual=True),
        head_layer(20, residual=True),
        head_layer(6, bias=True, residual=True, dropout=0.5),
    ],
    "dropout": [head_layer(8, bias=True, dropout=0.5)],
}


@pytest.mark.parametrize("layers", LINEAR_HEADS.values(), ids=LINEAR_HEADS)
def test_linear_layers_fold_to_the_products_of_their_matrices(layers: list[HeadLayer]) -> None:
    head = [layer.double() for layer in new_head(*layers, width=12)]
    weight, bias = torch.eye(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    for layer in head:
        tensors = layer.state_dict()
        matrix = tensors["linear.weight"]
        if layer.use_residual:
            matrix = matrix + tensors.get("residual.weight", torch.eye(12 if len(layers) == 1 else 20))
        weight, bias = matrix @ weight, matrix @ bias + tensors.get("linear.bias", 0)

    folded, folded_bias = fold(head)

    torch.testing.assert_close(folded, weight, rtol=0, atol=1e-14)
    if any(layer.bias for layer in layers):
        torch.testing.assert_close(folded_bias, bias, rtol=0, atol=1e-14)
    else:
        assert folded_bias is None


@pytest.mark.parametrize("layers", LINEAR_HEADS.values(), ids=LINEAR_HEADS)
def test_a_folded_head_gives_what_its_layers_give(layers: list[HeadLayer]) -> None:
    head = [layer.eval() for layer in new_head(*layers, width=12)]
    x = torch.randn(5, 7, 12)
    outputs = x
    for layer in head:
        outputs = layer({"token_embeddings": outputs})["token_embeddings"]
    # Sums of at most 20 products of float32 numbers near 1.
    torch.testing.assert_close(F.linear(x, *fold(head)), outputs, rtol=1e-5, atol=2e-6)


def test_a_fold_is_rounded_once_to_the_precision_of_the_layers() -> None:
    head = new_head(head_layer(20, bias=True), head_layer(8), width=12)
    exact, exact_bias = fold([copy.deepcopy(layer).bfloat16().double() for layer in head])
    weight, bias = fold([layer.bfloat16() for layer in head])
    assert exact_bias is not None
    assert torch.equal(weight, exact.bfloat16())
    assert bias is not None
    assert torch.equal(bias, exact_bias.bfloat16())


NOT_LINEAR: dict[str, list[HeadLayer]] = {
    "activation": [head_layer(8), head_layer(8, activation="gelu")],
    "activation in the middle": [head_layer(8, activation="relu"), head_layer(8)],
    "gate": [head_layer(8, gated=True)],
    "layer norm": [head_layer(8, norm=Norm.layer_norm)],
    "rms norm": [head_layer(8, norm=Norm.rms_norm)],
    "activation with dropout": [head_layer(8, activation="gelu", dropout=0.1)],
}


@pytest.mark.parametrize("layers", [*NOT_LINEAR.values(), []], ids=[*NOT_LINEAR, "nothing"])
def test_a_head_that_is_no_linear_map_does_not_fold(layers: list[HeadLayer]) -> None:
    head = new_head(*layers, width=12) if layers else []
    assert not layers or not is_linear(head)
    with pytest.raises(ValueError, match=r"^only a head without activations, gates and norms folds to one linear map$"):
        fold(head)


@pytest.mark.parametrize("layers", LINEAR_HEADS.values(), ids=LINEAR_HEADS)
def test_a_head_without_activations_gates_and_norms_is_linear(layers: list[HeadLayer]) -> None:
    assert is_linear(new_head(*layers, width=12))


def test_a_folded_model_scores_the_same_with_one_portable_layer(build: Build, tmp_path: Path) -> None:
    encoder = build(head_layer(64, bias=True, residual=True), head_layer(32), head_layer(32, residual=True))
    before = forward(encoder, DOCUMENTS, "document")[0]
    fold_head(encoder)
    assert kinds(encoder) == ["Transformer", "Dense", "MultiVectorMask", "Normalize"]
    torch.testing.assert_close(forward(encoder, DOCUMENTS, "document")[0], before, rtol=0, atol=1e-6)
    saved = save_and_load(encoder, tmp_path).float()
    torch.testing.assert_close(forward(saved, DOCUMENTS, "document")[0], before, rtol=0, atol=1e-6)


def test_a_model_that_is_not_linear_is_not_folded(build: Build) -> None:
    encoder = build(*HEADS["mlp_residual"])
    with pytest.raises(ValueError, match=r"^only a head without activations, gates and norms folds"):
        fold_head(encoder)
    assert kinds(encoder) == ["Transformer", "Dense", "Dense", "MultiVectorMask", "Normalize"]


# --- Layers of our own, and Dense ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extras", "kind", "words"),
    [
        ({}, Dense, None),
        ({"dropout": 0.25}, Projection, "trained with dropout 0.25"),
        ({"gated": True}, Projection, "gated"),
        ({"norm": Norm.layer_norm}, Projection, "normalised before by LayerNorm"),
        (
            {"norm": Norm.rms_norm, "gated": True, "dropout": 0.1},
            Projection,
            "normalised before by RMSNorm and gated and trained with dropout 0.1",
        ),
    ],
)
def test_a_layer_is_a_dense_unless_it_has_what_no_dense_has(
    extras: dict[str, Any], kind: type, words: str | None
) -> None:
    (layer,) = new_head(head_layer(8, **extras))
    assert type(layer) is kind
    assert portable(layer) is (set(extras) <= {"dropout"})
    if isinstance(layer, Projection):
        assert describe_extras(layer) == words


@pytest.mark.parametrize("out_features", [8, 32], ids=["learned map", "own width"])
@pytest.mark.parametrize("residual", [True, False])
def test_a_layer_with_dropout_alone_is_as_a_dense_the_same_outside_of_training(
    residual: bool, out_features: int
) -> None:
    spec = head_layer(out_features, bias=True, activation="gelu", residual=residual, dropout=0.5)
    (layer,) = new_head(spec)
    dense, x = as_dense(layer), torch.randn(3, 5, 32)
    assert isinstance(dense, Dense)
    assert dense.linear is layer.linear
    outputs = [module.eval()({"token_embeddings": x})["token_embeddings"] for module in (layer, dense)]
    assert torch.equal(*outputs)
    assert dense.state_dict().keys() == layer.state_dict().keys()
    trained = dense.train()({"token_embeddings": x})["token_embeddings"]
    assert torch.equal(trained, outputs[0])


def test_a_dense_is_its_own_dense() -> None:
    (layer,) = new_head(head_layer(8))
    assert as_dense(layer) is layer


def test_a_gated_layer_is_no_dense() -> None:
    (layer,) = new_head(head_layer(8, gated=True, norm=Norm.rms_norm))
    with pytest.raises(ValueError, match=r"^a layer that is normalised before by RMSNorm and gated is no Dense$"):
        as_dense(layer)


@pytest.mark.parametrize("count", [1, 3])
def test_another_head_stands_where_the_old_one_stood(build: Build, count: int) -> None:
    encoder = build(head_layer(64), head_layer(48))
    others = [encoder[0], encoder[3], encoder[4]]
    specs = [head_layer(20, gated=True), head_layer(16), head_layer(8)][:count]
    layers = new_head(*specs)
    replace_head(encoder, layers)
    modules = list(encoder)
    assert [id(module) for module in modules] == [id(module) for module in [others[0], *layers, *others[1:]]]
    assert list(encoder._modules) == [str(index) for index in range(len(modules))]
    assert forward(encoder, DOCUMENTS, "document")[0].shape[-1] == specs[-1].out_features


# --- Cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 31])
@pytest.mark.parametrize("layers", HEADS.values(), ids=HEADS)
def test_a_cut_model_gives_the_prefix_of_the_whole_models_vectors_after_a_save(
    build: Build, tmp_path: Path, layers: list[HeadLayer], width: int
) -> None:
    whole = build(*layers)
    cut = copy.deepcopy(whole)
    cut_head(cut, width)
    assert_prefix(save_and_load(cut, tmp_path), whole, width)


@pytest.mark.usefixtures("own_module_cache")
@pytest.mark.parametrize("width", [1, 31])
@pytest.mark.parametrize("name", OWN_HEADS)
def test_a_cut_model_with_a_layer_of_our_own_gives_the_prefix_too(
    build: Build, tmp_path: Path, name: str, width: int
) -> None:
    whole = build(*OWN_HEADS[name])
    cut = copy.deepcopy(whole)
    cut_head(cut, width)
    assert_prefix(save_and_load(cut, tmp_path / "cut", trust_remote_code=True), whole, width)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        # No row of a gate, norm or residual is cut: a layer that takes the first components follows.
        ("gated and normalised last", ["Dense", "Projection", "Dense"]),
        ("dropout last, over its own width", ["Projection", "Dense"]),
        ("gated before a linear layer", ["Projection", "Dense"]),
    ],
)
def test_a_cut_leaves_layers_of_our_own_as_they_are(build: Build, name: str, head: list[str]) -> None:
    encoder = build(*OWN_HEADS[name])
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    cut_head(encoder, 8)
    assert kinds(encoder) == ["Transformer", *head, "MultiVectorMask", "Normalize"]
    own = [index for index, kind in enumerate(kinds(encoder)) if kind == "Projection"]
    after = {key: value for key, value in encoder.state_dict().items() if int(key.split(".")[0]) in own}
    assert after
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@pytest.mark.parametrize("activation", ["gelu", "identity"])
def test_a_learned_residual_stays_learned_where_the_cut_width_is_that_of_its_input(
    build: Build, tmp_path: Path, activation: str
) -> None:
    whole = build(head_layer(48, bias=True, activation=activation, residual=True))
    cut = copy.deepcopy(whole)
    cut_head(cut, 32)
    assert kinds(cut) == ["Transformer", "Dense", "Dense", "MultiVectorMask", "Normalize"]
    assert_prefix(save_and_load(cut, tmp_path), whole, 32)


@pytest.mark.parametrize("through", [32, 20])
def test_a_cut_model_can_be_cut_again(build: Build, tmp_path: Path, through: int) -> None:
    whole = build(head_layer(48, bias=True, activation="gelu", residual=True))
    cut = copy.deepcopy(whole)
    cut_head(cut, through)
    loaded = save_and_load(cut, tmp_path / "once")
    cut_head(loaded, 8)
    assert_prefix(save_and_load(loaded, tmp_path / "twice"), whole, 8)


def test_only_the_rows_of_the_last_layer_change(build: Build) -> None:
    whole = build(*HEADS["mlp_residual"])
    cut = copy.deepcopy(whole)
    cut_head(cut, 8)
    expected, actual = whole.state_dict(), cut.state_dict()
    expected["2.linear.weight"] = expected["2.linear.weight"][:8]
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_residual_of_equal_width_becomes_the_rows_of_the_identity(build: Build, tmp_path: Path) -> None:
    encoder = build(*HEADS["residual of equal width last"])
    cut_head(encoder, 8)
    dense = save_and_load(encoder, tmp_path)[1]
    assert isinstance(dense, Dense)
    assert torch.equal(dense.state_dict()["residual.weight"], torch.eye(32, dtype=torch.float64)[:8])
    config = json.loads((tmp_path / "1_Dense" / "config.json").read_text())
    assert (config["in_features"], config["out_features"], config["use_residual"]) == (32, 8, True)


def test_a_cut_model_is_made_of_the_librarys_modules_and_says_its_width(build: Build, tmp_path: Path) -> None:
    encoder = build(*HEADS["residual of equal width last"])
    cut_head(encoder, 8)
    assert encoder.get_embedding_dimension() == save_and_load(encoder, tmp_path).get_embedding_dimension() == 8
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)


def test_the_models_own_width_leaves_it_as_it_is(build: Build) -> None:
    encoder = build(*HEADS["residual of equal width last"])
    before = dict(encoder.named_parameters())
    cut_head(encoder, 32)
    after = dict(encoder.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


def test_a_cut_layer_keeps_its_precision(build: Build) -> None:
    for name in ("learned residual last", "residual of equal width last"):
        encoder = build(*HEADS[name]).to(torch.bfloat16)
        cut_head(encoder, 8)
        assert {parameter.dtype for parameter in encoder[1].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("width", [0, -1, 49])
def test_a_width_the_model_does_not_have_is_refused(build: Build, width: int) -> None:
    with pytest.raises(ValueError, match=rf"^width={width} must be from 1 to 48, the width of the model's vectors$"):
        cut_head(build(head_layer(48)), width)


def test_a_model_without_a_dense_layer_is_refused(build: Build) -> None:
    encoder = build(head_layer(48))
    headless = MultiVectorEncoder(modules=[encoder[0], encoder[2], encoder[3]], device="cpu")
    with pytest.raises(ValueError, match=r"^the model has no Dense layer, and no other can be cut$"):
        cut_head(headless, 8)


def test_an_activation_over_all_components_is_refused(build: Build) -> None:
    encoder = build(head_layer(48))
    encoder[1].activation_function = nn.Softmax(dim=-1)
    known = "GELU, Identity, LeakyReLU, Mish, ReLU, SiLU, Sigmoid, Tanh"
    with pytest.raises(ValueError, match=rf"^a Dense layer with Softmax cannot be cut, only with {known}$"):
        cut_head(encoder, 8)


@pytest.mark.parametrize(("last", "names"), [([], "MultiVectorMask"), ([nn.Tanh()], "MultiVectorMask, Tanh")])
def test_a_model_that_does_not_end_in_unit_length_is_refused(build: Build, last: list[nn.Module], names: str) -> None:
    encoder = build(head_layer(48))
    other = MultiVectorEncoder(modules=[*list(encoder)[:-1], *last], device="cpu")
    rule = "only MultiVectorMask and Normalize may follow, and Normalize must"
    with pytest.raises(ValueError, match=rf"^the last Dense layer is followed by {names}: {rule}$"):
        cut_head(other, 8)


def test_normalize_before_the_head_does_not_count(build: Build) -> None:
    encoder = build(head_layer(48))
    before = Normalize(module_input_name="token_embeddings")
    other = MultiVectorEncoder(modules=[encoder[0], before, encoder[1]], device="cpu")
    with pytest.raises(ValueError, match=r"^the last Dense layer is followed by nothing: "):
        cut_head(other, 8)


def save_and_load(encoder: MultiVectorEncoder, folder: Path, *, trust_remote_code: bool = False) -> MultiVectorEncoder:
    """What the library makes of a saved model, in float64: its numbers are still those of float32."""
    encoder.save_pretrained(str(folder), create_model_card=False)
    loaded = MultiVectorEncoder(str(folder), device="cpu", local_files_only=True, trust_remote_code=trust_remote_code)
    return loaded.double().eval()


def assert_prefix(cut: MultiVectorEncoder, whole: MultiVectorEncoder, width: int) -> None:
    """Equal in float64 up to the order of its sums; the whole model's weights are turned into it."""
    for side, texts in (("query", QUERIES), ("document", DOCUMENTS)):
        vectors, mask = forward(cut, texts, side)
        whole_vectors, whole_mask = forward(whole.double(), texts, side)
        assert vectors.shape[-1] == width
        assert torch.equal(mask, whole_mask)
        torch.testing.assert_close(vectors, F.normalize(whole_vectors[..., :width], dim=-1), atol=1e-12, rtol=0)


def forward(encoder: MultiVectorEncoder, texts: list[str], side: str) -> tuple[Tensor, Tensor]:
    features = encoder.preprocess(texts, prompt=encoder.prompts[side], task=side)
    with torch.no_grad():
        output = encoder(features, task=side)
    return output["token_embeddings"], output["attention_mask"]


def kinds(encoder: MultiVectorEncoder) -> list[str]:
    return [type(module).__name__ for module in encoder]
