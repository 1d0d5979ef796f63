"""read_export against tokens written out by hand, and against folders in which one thing is wrong."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from architectures.export import Format
from architectures.readers import read_export, vectors_of
from configs.schema import Expansion, HeadLayer
from tests.architectures.test_export import DEEP, LINEAR, make_trained, read_json, transformer_of, written

PYLATE, STANFORD = Format.pylate, Format.stanford


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def vocabulary(encoder: MultiVectorEncoder) -> dict[str, int]:
    found: dict[str, int] = encoder.tokenizer.get_vocab()
    return found


# --- By hand ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A text, the tokens that are read of it, how many of them attention sees, and the places that are not scored."""

    text: str
    tokens: list[str]
    attended: int
    skipped: tuple[int, ...] = ()


@dataclass(frozen=True)
class Model:
    """A checkpoint, the head and keys that it gets, and what becomes of texts."""

    family: str
    layers: tuple[HeadLayer, ...]
    keys: dict[str, Any]
    queries: list[Written]
    documents: list[Written]


MODELS = {
    # Queries of 8 tokens, filled and cut; documents of 9, cut in front of their last mark.
    "BERT": Model(
        "tiny_bert",
        (LINEAR,),
        {"query_length": 8, "document_length": 9},
        [
            Written("What is a", ["[CLS]", "[Q] ", "what", "is", "a", "[SEP]", "[MASK]", "[MASK]"], 6),
            Written("what is, a cat?!", ["[CLS]", "[Q] ", "what", "is", ",", "a", "cat", "[SEP]"], 8),
            Written("", ["[CLS]", "[Q] ", "[SEP]", *["[MASK]"] * 5], 3),
        ],
        [
            Written("the cat, a dog", ["[CLS]", "[D] ", "the", "cat", ",", "a", "dog", "[SEP]"], 8, (4,)),
            Written(
                "fish! the cat: a dog?", ["[CLS]", "[D] ", "fish", "!", "the", "cat", ":", "a", "[SEP]"], 9, (3, 6)
            ),
            Written("", ["[CLS]", "[D] ", "[SEP]"], 3),
        ],
    ),
    "BERT with a deep head, attended": Model(
        "tiny_bert",
        DEEP,
        {"query_length": 8, "document_length": 9, "attend_to_expansion": True, "skiplist": ["the", ","]},
        [Written("what is a", ["[CLS]", "[Q] ", "what", "is", "a", "[SEP]", "[MASK]", "[MASK]"], 8)],
        [Written("the cat, a dog!", ["[CLS]", "[D] ", "the", "cat", ",", "a", "dog", "!", "[SEP]"], 9, (2, 4))],
    ),
    "BERT without marker and expansion": Model(
        "tiny_bert",
        (LINEAR,),
        {
            "query_length": 6,
            "document_length": 6,
            "expansion": Expansion.none,
            "query_prefix": "",
            "document_prefix": "",
        },
        [
            Written("what is", ["[CLS]", "what", "is", "[SEP]"], 4),
            Written("what is a cat that", ["[CLS]", "what", "is", "a", "cat", "[SEP]"], 6),
        ],
        [Written("the cat, a dog!", ["[CLS]", "the", "cat", ",", "a", "[SEP]"], 6, (3,))],
    ),
    # SentencePiece: a word at the start of the text is as one within it; these marks are two tokens each, and scored.
    "XLM-R": Model(
        "xlm_roberta",
        (LINEAR,),
        {"query_length": 9, "document_length": 8},
        [Written("what is a cat", ["<s>", "[Q] ", "▁what", "▁is", "▁a", "▁cat", "</s>", "<mask>", "<mask>"], 7)],
        [Written("a cat. what is a", ["<s>", "[D] ", "▁a", "▁cat", ".", "▁what", "▁is", "</s>"], 8, (4,))],
    ),
    # Byte pairs: a space before a word is part of it, so that the first word stands without.
    "ModernBERT": Model(
        "modernbert",
        (LINEAR,),
        {"query_length": 8, "document_length": 10},
        [Written("cat a", ["[CLS]", "[Q] ", "cat", "Ġ", "a", "[SEP]", "[MASK]", "[MASK]"], 6)],
        [Written("cat, cat!", ["[CLS]", "[D] ", "cat", ",", "Ġcat", "!", "[SEP]"], 7, (3, 5))],
    ),
    # A marker that the vocabulary held before.
    "Stanford": Model(
        "stanford",
        (),
        {},
        [Written("what is", ["[CLS]", "[unused0]", "what", "is", "[SEP]", *["[MASK]"] * 7], 5)],
        [Written("cat, dog!", ["[CLS]", "[unused1]", "cat", ",", "dog", "!", "[SEP]"], 7, (3, 5))],
    ),
}
# The layouts that hold each.
LAYOUTS = {name: [PYLATE, STANFORD] for name in ("BERT", "ModernBERT", "Stanford")} | {
    name: [PYLATE] for name in ("BERT with a deep head, attended", "BERT without marker and expansion", "XLM-R")
}
CASES = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]


def project(hidden: Tensor, head: list[dict[str, Tensor]]) -> Tensor:
    """Unit-length vectors by the formulas of the layers that these tests have: GELU with a residual, then linear."""
    for weights in head[:-1]:
        out = F.linear(hidden, weights["linear.weight"], weights.get("linear.bias"))
        out = 0.5 * out * (1 + torch.erf(out / math.sqrt(2)))
        residual = weights.get("residual.weight")
        hidden = out + (hidden if residual is None else hidden @ residual.T)
    projected = hidden @ head[-1]["linear.weight"].T
    return projected / projected.square().sum(dim=-1, keepdim=True).sqrt()


@pytest.mark.parametrize(("name", "layout"), CASES, ids=[f"{name}-{layout.name}" for name, layout in CASES])
def test_an_export_is_read_as_the_tokens_by_hand(
    name: str, layout: Format, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = MODELS[name]
    found = request.getfixturevalue(model.family)
    encoder = make_trained(getattr(found, "folder", found), *model.layers, **model.keys)
    folder = written(encoder, layout, tmp_path / "out")
    ids, head = vocabulary(encoder), [layer.state_dict() for layer in list(encoder)[1:-2]]
    # The backbone from a save of its own, in which no layout had a hand.
    transformer_of(encoder).model.save_pretrained(tmp_path / "backbone")
    backbone: nn.Module = AutoModel.from_pretrained(tmp_path / "backbone", attn_implementation="eager").eval()
    read = read_export(folder, layout)
    for task, texts in (("query", model.queries), ("document", model.documents)):
        for text in texts:
            seen = torch.tensor([[1] * text.attended + [0] * (len(text.tokens) - text.attended)])
            tokens = torch.tensor([[ids[token] for token in text.tokens]])
            with torch.no_grad():
                hidden = backbone(input_ids=tokens, attention_mask=seen).last_hidden_state[0]
                expected = project(hidden, head)
            kept = [place for place in range(len(text.tokens)) if place not in text.skipped]
            (actual,) = read([text.text], task=task)
            # Sums of at most 64 products of float32 numbers near 1, in another order.
            torch.testing.assert_close(actual, expected[kept], atol=1e-5, rtol=0)
            # The encoder itself, which tokenises the marker with the text, gives the same.
            torch.testing.assert_close(vectors_of(encoder, [text.text], task=task)[0], actual, atol=1e-5, rtol=0)


def test_the_own_layout_is_read_bit_by_bit_as_the_encoder_writes_it(tiny_bert: Path, tmp_path: Path) -> None:
    encoder = make_trained(tiny_bert, *DEEP, query_length=8)
    read = read_export(written(encoder, Format.sentence_transformers, tmp_path / "out"), Format.sentence_transformers)
    for task, texts in (("query", ["what is a cat?", ""]), ("document", ["the cat, a dog!", "fish"])):
        ours, theirs = vectors_of(encoder, texts, task=task), read(texts, task=task)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_queries_are_filled_with_the_end_token_where_there_is_no_mask_token(tiny_bert: Path, tmp_path: Path) -> None:
    encoder = make_trained(tiny_bert, LINEAR, query_length=10)
    encoder.tokenizer.mask_token, encoder.tokenizer.eos_token = None, "[SEP]"
    folder = written(encoder, PYLATE, tmp_path / "out")
    ids = encoder.preprocess(["what is"], prompt=encoder.prompts["query"], task="query")["input_ids"][0].tolist()
    tokens = ["[CLS]", "[Q] ", "what", "is", "[SEP]", *["[SEP]"] * 5]
    assert ids == [vocabulary(encoder)[token] for token in tokens]
    assert difference(encoder, folder, PYLATE) < 1e-5


def test_a_model_that_pads_with_its_mask_token_keeps_its_expansion_in_stanfords_layout(
    tiny_bert: Path, tmp_path: Path
) -> None:
    # PyLate saves a tokenizer so, and Stanford's ColBERT scores no token that is padding.
    encoder = make_trained(tiny_bert, LINEAR, query_length=10)
    encoder.tokenizer.pad_token = "[MASK]"
    folder = written(encoder, STANFORD, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).pad_token == "[PAD]"
    assert difference(encoder, folder, STANFORD) < 1e-5
    change_json("tokenizer_config.json", pad_token="[MASK]")(folder)
    assert difference(encoder, folder, STANFORD) > 1e-3


# --- What is wrong is seen -------------------------------------------------------------------------------------------

TEXTS = {
    "query": ["what is a cat?", "which animal is a fish that swims and barks", "dog"],
    "document": ["the cat meows, a dog barks!", "the fish swims, the dog barks, the cat meows", "fish"],
}


@pytest.fixture(scope="session")
def pylate_export(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MultiVectorEncoder, Path]:
    """A model with a deep head, and its export in PyLate's layout."""
    encoder = make_trained(tiny_bert, *DEEP, query_length=10, document_length=12)
    return encoder, written(encoder, PYLATE, tmp_path_factory.mktemp("pylate_export"))


@pytest.fixture(scope="session")
def stanford_export(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MultiVectorEncoder, Path]:
    """A model with one linear layer, and its export in Stanford's layout."""
    encoder = make_trained(tiny_bert, LINEAR, query_length=10, document_length=12)
    return encoder, written(encoder, STANFORD, tmp_path_factory.mktemp("stanford_export"))


def change_json(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).write_text(json.dumps(read_json(folder / file) | values))

    return change


def change_weight(file: str, name: str) -> Callable[[Path], None]:
    """Turn round the first component: a factor of all would be gone in vectors of unit length."""

    def change(folder: Path) -> None:
        weights = load_file(folder / file)
        weights[name][0] *= -1
        save_file(weights, folder / file, metadata={"format": "pt"})

    return change


def drop_weight(file: str, name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / file)
        del weights[name]
        save_file(weights, folder / file, metadata={"format": "pt"})

    return change


def difference(encoder: MultiVectorEncoder, folder: Path, layout: Format) -> float:
    """The largest of any vector; infinite where their numbers differ."""
    read, largest = read_export(folder, layout), 0.0
    for task, texts in TEXTS.items():
        for ours, theirs in zip(vectors_of(encoder, texts, task=task), read(texts, task=task), strict=True):
            if ours.shape != theirs.shape:
                return math.inf
            largest = max(largest, float((ours - theirs).abs().max()))
    return largest


SETTINGS, METADATA = "config_sentence_transformers.json", "artifact.metadata"
PYLATE_DAMAGE: dict[str, Callable[[Path], None]] = {
    "another query marker": change_json(SETTINGS, query_prefix="[D] "),
    "another document marker": change_json(SETTINGS, document_prefix="[Q] "),
    "no marker": change_json(SETTINGS, query_prefix=""),
    "a shorter query": change_json(SETTINGS, query_length=9),
    "a longer query": change_json(SETTINGS, query_length=11),
    "a shorter document": change_json(SETTINGS, document_length=11),
    "attended": change_json(SETTINGS, attend_to_expansion_tokens=True),
    "not expanded": change_json(SETTINGS, do_query_expansion=False),
    "no skiplist": change_json(SETTINGS, skiplist_words=[]),
    "another skiplist": change_json(SETTINGS, skiplist_words=[",", "!", "cat"]),
    "another activation": change_json("1_Dense/config.json", activation_function="torch.nn.modules.activation.SiLU"),
    "no residual": change_json("2_Dense/config.json", use_residual=False),
    "no learned residual": change_json("1_Dense/config.json", use_residual=False),
    "another weight": change_weight("2_Dense/model.safetensors", "linear.weight"),
    "another bias": change_weight("1_Dense/model.safetensors", "linear.bias"),
    "another residual weight": change_weight("1_Dense/model.safetensors", "residual.weight"),
    "no bias": drop_weight("1_Dense/model.safetensors", "linear.bias"),
    "another backbone": change_weight("model.safetensors", "encoder.layer.1.output.dense.weight"),
    "another embedding": change_weight("model.safetensors", "embeddings.position_embeddings.weight"),
}
STANFORD_DAMAGE: dict[str, Callable[[Path], None]] = {
    "another query marker": change_json(METADATA, query_token_id="[D] "),
    "another document marker": change_json(METADATA, doc_token_id="[Q] "),
    "a shorter query": change_json(METADATA, query_maxlen=9),
    "a longer query": change_json(METADATA, query_maxlen=11),
    "a shorter document": change_json(METADATA, doc_maxlen=11),
    "attended": change_json(METADATA, attend_to_mask_tokens=True),
    "no skiplist": change_json(METADATA, mask_punctuation=False),
    "another weight": change_weight("model.safetensors", "linear.weight"),
    "another backbone": change_weight("model.safetensors", "bert.encoder.layer.1.output.dense.weight"),
}


# What turns one component of one layer round moves a vector by 1e-3 at least; rounding by 1e-6.
@pytest.mark.parametrize("damage", [None, *PYLATE_DAMAGE])
def test_what_is_wrong_in_a_pylate_folder_is_seen(
    pylate_export: tuple[MultiVectorEncoder, Path], tmp_path: Path, damage: str | None
) -> None:
    encoder, whole = pylate_export
    folder = Path(shutil.copytree(whole, tmp_path / "damaged"))
    if damage is None:
        assert difference(encoder, folder, PYLATE) < 1e-5
    else:
        PYLATE_DAMAGE[damage](folder)
        assert difference(encoder, folder, PYLATE) > 1e-3


@pytest.mark.parametrize("damage", [None, *STANFORD_DAMAGE])
def test_what_is_wrong_in_a_stanford_folder_is_seen(
    stanford_export: tuple[MultiVectorEncoder, Path], tmp_path: Path, damage: str | None
) -> None:
    encoder, whole = stanford_export
    folder = Path(shutil.copytree(whole, tmp_path / "damaged"))
    if damage is None:
        assert difference(encoder, folder, STANFORD) < 1e-5
    else:
        STANFORD_DAMAGE[damage](folder)
        assert difference(encoder, folder, STANFORD) > 1e-3


def test_two_layers_in_the_wrong_order_are_seen(tiny_bert: Path, tmp_path: Path) -> None:
    square = replace(LINEAR, out_features=32)
    encoder = make_trained(tiny_bert, square, square)
    folder = written(encoder, PYLATE, tmp_path / "out")
    modules = read_json(folder / "modules.json")
    modules[1]["path"], modules[2]["path"] = modules[2]["path"], modules[1]["path"]
    (folder / "modules.json").write_text(json.dumps(modules))
    assert difference(encoder, folder, PYLATE) > 1e-3
