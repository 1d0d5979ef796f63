"""Random weights and texts of published sizes."""

from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer

from scripts.made_workload import SIZES, made_pairs, write_backbone


def test_pairs_are_as_long_as_ms_marcos() -> None:
    pairs = list(islice(made_pairs(), 1200))
    queries, passages = ([len(text.split()) for text in texts] for texts in zip(*pairs, strict=True))
    assert [sum(each) / len(each) for each in (queries, passages)] == pytest.approx([6, 56], rel=0.06)
    assert min(passages) < 25 < 120 < max(passages)
    assert pairs == list(islice(made_pairs(), 1200))


# Layers of attention and feed-forward, without embeddings; ModernBERT-base has 149 M with those of 50,368 tokens.
@pytest.mark.parametrize(("size", "millions"), [("random_minilm", 10.6), ("random_modernbert_base", 110)])
def test_weights_are_of_the_size_and_every_word_is_known(size: str, millions: float, tmp_path: Path) -> None:
    write_backbone(tmp_path / "model", size)
    model = AutoModel.from_pretrained(tmp_path / "model")
    layers = [each for name, each in model.named_parameters() if "embeddings" not in name and "pooler" not in name]
    assert sum(each.numel() for each in layers) / 1e6 == pytest.approx(millions, rel=0.01)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == SIZES[size].vocab_size > len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    texts = [passage for _, passage in islice(made_pairs(), 100)]
    encoded = tokenizer(texts)
    assert set(encoded) == {"input_ids", "attention_mask"}
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in encoded["input_ids"]]
    assert all("[UNK]" not in each for each in tokens)
    words = sum(len(text.split()) for text in texts)
    assert 1.2 < sum(map(len, tokens)) / words < 1.6
