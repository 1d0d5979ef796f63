"""Projection against its formula written out in float64, and saved models that carry its file."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn

import architectures.projection
from architectures.factory import build_encoder
from architectures.heads import head_of
from architectures.projection import Projection
from configs.schema import Activation, ConfigError, Norm
from tests.architectures.conftest import Copy, backbone_config, head_config, head_layer

DOCUMENTS = ["the cat meows, a dog barks!", "fish"]
SOURCE = Path(architectures.projection.__file__)

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def projection(
    in_features: int = 6,
    out_features: int = 4,
    *,
    bias: bool = True,
    activation: str = "SiLU",
    norm: str = "none",
    gated: bool = False,
    dropout: float = 0.0,
    use_residual: bool = False,
) -> Projection:
    """A layer in float64 whose every weight is drawn, those of its norm too."""
    layer = Projection(
        in_features,
        out_features,
        bias=bias,
        activation=activation,
        norm=norm,
        gated=gated,
        dropout=dropout,
        use_residual=use_residual,
    ).double()
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


# --- The formula -----------------------------------------------------------------------------------------------------


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def silu_slope(x: Tensor) -> Tensor:
    share = 1 / (1 + torch.exp(-x))
    return share * (1 + x * (1 - share))


def normalized_by_hand(x: Tensor, norm: str, weights: Tensors) -> Tensor:
    if norm == "LayerNorm":
        centred = x - x.mean(dim=-1, keepdim=True)
        spread = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return centred / spread * weights["normalization.weight"] + weights["normalization.bias"]
    if norm == "RMSNorm":
        # torch's epsilon where none is given: that of the precision.
        spread = (x.square().mean(dim=-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
        return x / spread * weights["normalization.weight"]
    return x


def by_hand(x: Tensor, norm: str, weights: Tensors, *, gated: bool, residual: bool) -> Tensor:
    """residual(x) + silu(linear(norm(x))) * gate(norm(x)), with the weights that there are."""
    normalized = normalized_by_hand(x, norm, weights)
    out = silu(normalized @ weights["linear.weight"].T + weights.get("linear.bias", 0))
    if gated:
        out = out * (normalized @ weights["gate.weight"].T + weights.get("gate.bias", 0))
    if residual:
        out = out + (x @ weights["residual.weight"].T if "residual.weight" in weights else x)
    return out


@pytest.mark.parametrize(
    ("norm", "gated", "residual", "bias"),
    [
        (norm.value, gated, residual, bias)
        for norm, gated, residual, bias in itertools.product(
            Norm, [False, True], [None, "learned map", "own width"], [False, True]
        )
    ],
)
def test_a_layer_is_its_formula_in_value_and_gradient(norm: str, gated: bool, residual: str | None, bias: bool) -> None:
    in_features = 4 if residual == "own width" else 6
    layer = projection(in_features, 4, bias=bias, norm=norm, gated=gated, use_residual=residual is not None)
    weights: Tensors = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    expected_names = {"linear.weight"} | ({"linear.bias"} if bias else set())
    expected_names |= {"gate.weight"} if gated else set()
    expected_names |= {"gate.bias"} if gated and bias else set()
    expected_names |= {"residual.weight"} if residual == "learned map" else set()
    expected_names |= {"normalization.weight"} if norm != "none" else set()
    expected_names |= {"normalization.bias"} if norm == "LayerNorm" else set()
    assert weights.keys() == expected_names

    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    ours, hand = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = layer({"token_embeddings": ours})["token_embeddings"]
    expected = by_hand(hand, norm, weights, gated=gated, residual=residual is not None)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)

    upstream = torch.randn_like(outputs)
    outputs.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, hand.grad, rtol=1e-11, atol=1e-11)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-11, atol=1e-11)


def test_the_gradient_of_a_gated_layer_is_the_product_rule() -> None:
    layer = projection(gated=True)
    weights = {name: value.detach() for name, value in layer.named_parameters()}
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    layer({"token_embeddings": x})["token_embeddings"].sum().backward()
    linear = x.detach() @ weights["linear.weight"].T + weights["linear.bias"]
    gate = x.detach() @ weights["gate.weight"].T + weights["gate.bias"]
    expected = (silu_slope(linear) * gate) @ weights["linear.weight"] + silu(linear) @ weights["gate.weight"]
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", Activation)
def test_every_activation_of_the_table_may_be_gated(activation: Activation) -> None:
    layer = projection(activation=activation.value, gated=True)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    outputs = layer({"token_embeddings": x})["token_embeddings"]
    module: nn.Module = getattr(nn, activation.value)()
    torch.testing.assert_close(outputs, module(layer.linear(x)) * layer.gate(x), rtol=0, atol=0)


def test_a_layer_replaces_the_token_embeddings_and_says_its_width() -> None:
    layer = projection()
    mask = torch.ones(2, 3)
    features = {"token_embeddings": torch.randn(2, 3, 6, dtype=torch.float64), "attention_mask": mask}
    outputs = layer(features, task="query")
    assert outputs is features
    assert outputs["attention_mask"] is mask
    assert outputs["token_embeddings"].shape == (2, 3, layer.get_embedding_dimension()) == (2, 3, 4)


# --- Dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_is_off_outside_of_training() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with_dropout, without = (projection(gated=True, dropout=share).eval() for share in (0.5, 0.0))
    outputs = [layer({"token_embeddings": x})["token_embeddings"] for layer in (with_dropout, without)]
    assert torch.equal(*outputs)


def test_in_training_dropout_takes_its_share_of_the_output_and_none_of_the_residual() -> None:
    layer = projection(6, 6, gated=True, dropout=0.25, use_residual=True)
    x = torch.randn(500, 6, dtype=torch.float64)
    kept_whole = layer.eval()({"token_embeddings": x})["token_embeddings"] - x
    trained = layer.train()({"token_embeddings": x})["token_embeddings"] - x
    dropped = trained.abs() < 1e-12
    # What stays is scaled, so that its mean stays.
    torch.testing.assert_close(trained[~dropped], kept_whole[~dropped] / 0.75, rtol=1e-9, atol=1e-9)
    assert abs(dropped.double().mean().item() - 0.25) < 0.03  # 3,000 draws: four standard deviations


def test_another_seed_drops_others() -> None:
    layer = projection(dropout=0.5).train()
    x = torch.randn(50, 6, dtype=torch.float64)

    def train(seed: int) -> Tensor:
        torch.manual_seed(seed)
        outputs: Tensor = layer({"token_embeddings": x})["token_embeddings"]
        return outputs

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))


# --- Saved models ----------------------------------------------------------------------------------------------------

HEAD = head_config(
    head_layer(24, bias=True, activation="silu", residual=True, norm=Norm.layer_norm, gated=True, dropout=0.25),
    head_layer(24, activation="gelu", residual=True, norm=Norm.rms_norm, dropout=0.1),
    head_layer(8),
    keep="none",
)


@pytest.fixture(scope="module")
def original(tiny_bert: Path) -> MultiVectorEncoder:
    torch.manual_seed(0)
    backbone = backbone_config(tiny_bert, query_length=8)
    encoder = build_encoder(backbone, HEAD).eval()
    for layer in head_of(encoder):
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return encoder


@pytest.fixture(scope="module")
def saved(original: MultiVectorEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    original.save_pretrained(str(folder), create_model_card=False)
    return folder


def stock(folder: Path) -> MultiVectorEncoder:
    return MultiVectorEncoder(str(folder), device="cpu", local_files_only=True, trust_remote_code=True)


def ours(folder: Path) -> MultiVectorEncoder:
    return build_encoder(backbone_config(folder), head_config())


def vectors(encoder: MultiVectorEncoder) -> list[Tensor]:
    return [*encoder.encode_document(DOCUMENTS), *encoder.encode_query(["what is a cat?"])]


def assert_equal(encoder: MultiVectorEncoder, original: MultiVectorEncoder) -> None:
    assert all(torch.equal(one, other) for one, other in zip(vectors(encoder), vectors(original), strict=True))


LOADERS = pytest.mark.parametrize("load", [stock, ours], ids=["stock", "ours"])
Load = Callable[[Path], MultiVectorEncoder]


def test_a_saved_model_carries_the_file_and_names_its_class_there(saved: Path) -> None:
    assert (saved / "projection.py").read_bytes() == SOURCE.read_bytes()
    kinds = [module["type"] for module in json.loads((saved / "modules.json").read_text())]
    assert kinds[1:4] == ["projection.Projection"] * 2 + ["sentence_transformers.base.modules.dense.Dense"]
    assert json.loads((saved / "1_Projection" / "config.json").read_text()) == {
        "in_features": 32,
        "out_features": 24,
        "bias": True,
        "activation": "SiLU",
        "norm": "LayerNorm",
        "gated": True,
        "dropout": 0.25,
        "use_residual": True,
    }
    assert load_file(saved / "2_Projection" / "model.safetensors").keys() == {
        "linear.weight",
        "normalization.weight",
    }


def test_the_file_imports_nothing_of_lateforge() -> None:
    imports = [line for line in SOURCE.read_text().splitlines() if line.startswith(("import ", "from "))]
    packages = {line.split()[1].split(".")[0] for line in imports}
    assert packages == {"shutil", "pathlib", "typing", "sentence_transformers", "torch"}


@pytest.mark.usefixtures("own_module_cache")
def test_the_stock_class_gives_the_same_vectors_from_the_file_in_the_folder(
    saved: Path, original: MultiVectorEncoder
) -> None:
    loaded = stock(saved)
    assert_equal(loaded, original)
    layer = loaded[1]
    assert type(layer).__name__ == "Projection"
    assert not isinstance(layer, Projection)
    assert layer.dropout == 0.25


def test_the_stock_class_refuses_it_where_the_folder_is_not_trusted(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"references the module class 'projection\.Projection'"):
        MultiVectorEncoder(str(saved), device="cpu", local_files_only=True)


@pytest.mark.parametrize("trust", [False, True])
def test_our_loader_never_runs_the_file_in_the_folder(
    saved: Path, original: MultiVectorEncoder, copy: Copy, trust: bool
) -> None:
    folder = copy(saved)
    (folder / "projection.py").write_text("raise RuntimeError('this file was run')\n")
    loaded = build_encoder(backbone_config(folder, trust_remote_code=trust), head_config())
    assert isinstance(loaded[1], Projection)
    assert_equal(loaded, original)
    assert loaded[1].dropout == 0.25


def test_our_loader_needs_no_file_in_the_folder_and_saves_one(
    saved: Path, original: MultiVectorEncoder, copy: Copy, tmp_path: Path
) -> None:
    folder = copy(saved)
    (folder / "projection.py").unlink()
    loaded = ours(folder)
    loaded.save_pretrained(str(tmp_path / "again"), create_model_card=False)
    assert (tmp_path / "again" / "projection.py").read_bytes() == SOURCE.read_bytes()


@pytest.mark.usefixtures("own_module_cache")
@LOADERS
def test_a_loaded_model_can_be_saved_and_loaded_again(
    saved: Path, original: MultiVectorEncoder, tmp_path: Path, load: Load
) -> None:
    load(saved).save_pretrained(str(tmp_path / "again"), create_model_card=False)
    again = load(tmp_path / "again")
    assert_equal(again, original)
    again.save_pretrained(str(tmp_path / "third"), create_model_card=False)
    for name in ("projection.py", "modules.json", "1_Projection/config.json"):
        assert (tmp_path / "third" / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.usefixtures("own_module_cache")
@LOADERS
def test_a_loaded_model_can_be_saved_where_it_was_loaded_from(
    saved: Path, original: MultiVectorEncoder, copy: Copy, load: Load
) -> None:
    folder = copy(saved)
    load(folder).save_pretrained(str(folder), create_model_card=False)
    assert_equal(load(folder), original)


def test_pickled_weights_of_a_layer_of_our_own_are_refused_and_read_where_they_are_allowed(
    saved: Path, original: MultiVectorEncoder, copy: Copy
) -> None:
    folder = copy(saved)
    for name in ("1_Projection", "2_Projection"):
        torch.save(load_file(folder / name / "model.safetensors"), folder / name / "pytorch_model.bin")
        (folder / name / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has its weights in a pickle, 1_Projection/pytorch_model\.bin, and none in"):
        ours(folder)
    assert_equal(build_encoder(backbone_config(folder, allow_pickle=True), head_config()), original)
