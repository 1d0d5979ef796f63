"""cut_head: a cut model gives the first components of the whole model's vectors, at unit length, after a save too."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize
from torch import Tensor, nn

from architectures.factory import build_encoder
from architectures.heads import cut_head
from configs.schema import Activation, Config, HeadConfig, HeadLayer

QUERIES = ["what is a cat?", "the dog barks"]
DOCUMENTS = ["the cat meows, a dog barks!", "fish"]

Build = Callable[..., MultiVectorEncoder]


def layer(out_features: int, *, bias: bool = False, activation: str = "identity", residual: bool = False) -> HeadLayer:
    return HeadLayer(bias=bias, activation=Activation[activation], residual=residual, out_features=out_features)


# On a backbone 32 wide.
HEADS = {
    "linear": [layer(48)],
    "bias": [layer(48, bias=True)],
    "mlp_residual": [layer(64, bias=True, activation="gelu", residual=True), layer(48)],
    "gelu last": [layer(48, bias=True, activation="gelu")],
    "learned residual last": [layer(48, bias=True, activation="gelu", residual=True)],
    "residual of equal width last": [layer(32, bias=True, activation="gelu", residual=True)],
    "residual of equal width without bias": [layer(64), layer(64, activation="tanh", residual=True)],
}


@pytest.fixture
def build(make_config: Callable[..., Config]) -> Build:
    """Build with the layers given, after seeding; biases are drawn too."""

    def build_with(*layers: HeadLayer) -> MultiVectorEncoder:
        config = make_config("data=pairs", "data.path=prose.jsonl", "backbone.query_length=12")
        torch.manual_seed(0)
        return build_encoder(
            config.backbone, HeadConfig(keep="none", embedding_size=None, seed=None, layers=list(layers))
        ).eval()

    return build_with


@pytest.mark.parametrize("width", [1, 31])
@pytest.mark.parametrize("layers", HEADS.values(), ids=HEADS)
def test_a_cut_model_gives_the_prefix_of_the_whole_models_vectors_after_a_save(
    build: Build, tmp_path: Path, layers: list[HeadLayer], width: int
) -> None:
    whole = build(*layers)
    cut = copy.deepcopy(whole)
    cut_head(cut, width)
    assert_prefix(save_and_load(cut, tmp_path), whole, width)


@pytest.mark.parametrize("activation", ["gelu", "identity"])
def test_a_learned_residual_stays_learned_where_the_cut_width_is_that_of_its_input(
    build: Build, tmp_path: Path, activation: str
) -> None:
    whole = build(layer(48, bias=True, activation=activation, residual=True))
    cut = copy.deepcopy(whole)
    cut_head(cut, 32)
    assert kinds(cut) == ["Transformer", "Dense", "Dense", "MultiVectorMask", "Normalize"]
    assert_prefix(save_and_load(cut, tmp_path), whole, 32)


@pytest.mark.parametrize("through", [32, 20])
def test_a_cut_model_can_be_cut_again(build: Build, tmp_path: Path, through: int) -> None:
    whole = build(layer(48, bias=True, activation="gelu", residual=True))
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
        cut_head(build(layer(48)), width)


def test_a_model_without_a_dense_layer_is_refused(build: Build) -> None:
    encoder = build(layer(48))
    headless = MultiVectorEncoder(modules=[encoder[0], encoder[2], encoder[3]], device="cpu")
    with pytest.raises(ValueError, match=r"^the model has no Dense layer, and no other can be cut$"):
        cut_head(headless, 8)


def test_an_activation_over_all_components_is_refused(build: Build) -> None:
    encoder = build(layer(48))
    encoder[1].activation_function = nn.Softmax(dim=-1)
    known = "GELU, Identity, LeakyReLU, Mish, ReLU, SiLU, Sigmoid, Tanh"
    with pytest.raises(ValueError, match=rf"^a Dense layer with Softmax cannot be cut, only with {known}$"):
        cut_head(encoder, 8)


@pytest.mark.parametrize(("last", "names"), [([], "MultiVectorMask"), ([nn.Tanh()], "MultiVectorMask, Tanh")])
def test_a_model_that_does_not_end_in_unit_length_is_refused(build: Build, last: list[nn.Module], names: str) -> None:
    encoder = build(layer(48))
    other = MultiVectorEncoder(modules=[*list(encoder)[:-1], *last], device="cpu")
    rule = "only MultiVectorMask and Normalize may follow, and Normalize must"
    with pytest.raises(ValueError, match=rf"^the last Dense layer is followed by {names}: {rule}$"):
        cut_head(other, 8)


def test_normalize_before_the_head_does_not_count(build: Build) -> None:
    encoder = build(layer(48))
    before = Normalize(module_input_name="token_embeddings")
    other = MultiVectorEncoder(modules=[encoder[0], before, encoder[1]], device="cpu")
    with pytest.raises(ValueError, match=r"^the last Dense layer is followed by nothing: "):
        cut_head(other, 8)


def save_and_load(encoder: MultiVectorEncoder, folder: Path) -> MultiVectorEncoder:
    """What the library makes of a saved model, in float64: its numbers are still those of float32."""
    encoder.save_pretrained(str(folder), create_model_card=False)
    return MultiVectorEncoder(str(folder), device="cpu", local_files_only=True).double().eval()


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
