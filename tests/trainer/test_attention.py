"""Attention against torch's, text by text: masks, windows, shared heads, dropout."""

import inspect
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn
from torch.nn.attention import varlen

from trainer.attention import ATTENTION, _varlen, attention, use_own_attention
from trainer.dropout import factors
from trainer.packing import TextBounds, pack

LENGTHS = [3, 1, 7, 5]
BOUNDS = TextBounds(torch.tensor([0, 3, 4, 11, 16], dtype=torch.int32), LENGTHS)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs_but_for_what_is_dropped(masked: bool) -> None:
    torch.manual_seed(2)
    query, key, value = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64).unbind()
    mask = torch.rand(2, 1, 5, 5) > 0.4 if masked else None
    if mask is not None:
        mask[..., 0] = True
    module: Any = nn.Module()
    module.is_causal = False
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(1, 2)
    for nearly_none in (0.0, 1e-9):  # the first is torch's own, the second ours
        ours, _ = attention(module, query, key, value, mask, dropout=nearly_none, scaling=0.3)
        torch.testing.assert_close(ours, expected)
    several = torch.stack(
        [attention(module, query, key, value, mask, dropout=0.2, scaling=0.3)[0] for _ in range(4000)]
    )
    assert not torch.equal(several[0], several[1])
    torch.testing.assert_close(several.mean(dim=0), expected, atol=0.06, rtol=0)


def layer(*, causal: bool = False, groups: int = 1) -> Any:
    module: Any = nn.Module()
    module.is_causal, module.num_key_value_groups = causal, groups
    return module


def by_loops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    causal: bool,
    window: int | None,
    kept: Sequence[Tensor] = (),
) -> Tensor:
    """Each token of each text by itself: (heads, tokens, width) to (tokens, heads, width).

    kept: by what the weights are multiplied, (heads, tokens, tokens) a text.
    """
    groups = len(query) // len(key)
    output = torch.zeros(query.shape[1], len(query), query.shape[2], dtype=query.dtype)
    for text, (first, stop) in enumerate(pairwise(BOUNDS.offsets.tolist())):
        for token in range(first, stop):
            seen = [
                other
                for other in range(first, stop)
                if (not causal or other <= token) and (window is None or abs(other - token) < window)
            ]
            for head in range(len(query)):
                weights = (key[head // groups, seen] @ query[head, token] * scaling).softmax(dim=0)
                if kept:
                    weights = weights * kept[text][head, token - first, [other - first for other in seen]]
                output[token, head] = weights @ value[head // groups, seen]
    return output


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 2, 4, 100])
def test_a_text_of_a_row_sees_itself_alone(window: int | None, causal: bool, groups: int) -> None:
    torch.manual_seed(4)
    query = torch.randn(1, 4, 16, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 4 // groups, 16, 8, dtype=torch.float64)
    ours, _ = attention(
        layer(causal=causal, groups=groups), query, key, value, None, scaling=0.4, bounds=BOUNDS, sliding_window=window
    )
    expected = by_loops(query[0], key[0], value[0], scaling=0.4, causal=causal, window=window)
    torch.testing.assert_close(ours[0], expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_torchs_kernel_is_asked_for_the_same(
    window: int | None, causal: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on a GPU alone: here, what it is documented to do with what it is given, in loops."""
    signature = inspect.signature(varlen.varlen_attn)

    def documented(*given: Any, **named: Any) -> Tensor:
        asked = signature.bind(*given, **named)
        asked.apply_defaults()
        values = asked.arguments
        states = [values[name].transpose(0, 1) for name in ("query", "key", "value")]
        left, right = values["window_size"]
        assert values["cu_seq_q"] is values["cu_seq_k"] is BOUNDS.offsets
        assert values["max_q"] == values["max_k"] == max(LENGTHS)
        assert values["enable_gqa"] == (groups > 1)
        assert right == (0 if causal else left)
        return by_loops(*states, scaling=values["scale"], causal=right == 0, window=None if left < 0 else left + 1)

    monkeypatch.setattr(varlen, "varlen_attn", documented)
    query = torch.randn(1, 4, 16, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 4 // groups, 16, 8, dtype=torch.float64)
    ours = _varlen(query, key, value, BOUNDS, scaling=0.4, causal=causal, window=window)
    expected = by_loops(query[0], key[0], value[0], scaling=0.4, causal=causal, window=window)
    torch.testing.assert_close(ours[0], expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 2])
def test_a_row_drops_weights_of_all_its_texts(window: int | None, causal: bool, groups: int) -> None:
    torch.manual_seed(5)
    query = torch.randn(1, 4, 16, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 4 // groups, 16, 8, dtype=torch.float64)
    torch.manual_seed(6)
    options: dict[str, Any] = {"dropout": 0.3, "scaling": 0.4, "bounds": BOUNDS, "sliding_window": window}
    ours, _ = attention(layer(causal=causal, groups=groups), query, key, value, None, **options)
    torch.manual_seed(6)
    drawn = factors(sum(4 * length**2 for length in LENGTHS), 0.3, torch.float64)
    assert {0.2 < float((part == 0).double().mean()) < 0.4 for part in drawn.chunk(3)} == {True}
    kept = [
        part.view(4, length, length)
        for part, length in zip(drawn.split([4 * length**2 for length in LENGTHS]), LENGTHS, strict=True)
    ]
    expected = by_loops(query[0], key[0], value[0], scaling=0.4, causal=causal, window=window, kept=kept)
    torch.testing.assert_close(ours[0], expected)


def attention_of(encoder: MultiVectorEncoder) -> str:
    transformer: Any = encoder[0]
    return str(transformer.model.config._attn_implementation)


def test_an_encoder_makes_the_same_vectors_with_it(encoder: MultiVectorEncoder) -> None:
    before = encoder.encode_document(["a cat, a dog.", "fish"])
    assert use_own_attention(encoder)
    assert use_own_attention(encoder)  # has it by now
    assert attention_of(encoder) == ATTENTION
    for ours, theirs in zip(encoder.encode_document(["a cat, a dog.", "fish"]), before, strict=True):
        assert torch.equal(ours, theirs)


def test_a_saved_model_says_nothing_of_it(encoder: MultiVectorEncoder, tmp_path: Path) -> None:
    use_own_attention(encoder)
    encoder.save(str(tmp_path / "model"))
    assert ATTENTION not in "".join(path.read_text() for path in (tmp_path / "model").glob("*.json"))
    assert attention_of(MultiVectorEncoder(str(tmp_path / "model"))) == "sdpa"


def test_an_attention_that_was_asked_for_stays(encoder: MultiVectorEncoder) -> None:
    transformer: Any = encoder[0]
    transformer.model.set_attn_implementation("eager")
    assert not use_own_attention(encoder)
    assert attention_of(encoder) == "eager"


def test_torchs_own_attention_refuses_texts_in_one_row(encoder: MultiVectorEncoder) -> None:
    features = pack(encoder.preprocess(["a cat", "fish"], prompt="[D] ", task="document"))
    with pytest.raises(RuntimeError, match="attn_mask dtype"):
        encoder(features, task="document")
