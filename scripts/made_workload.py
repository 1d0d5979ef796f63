"""Backbones of published sizes with random weights, and texts as long as MS MARCO's, for where neither can be had."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from string import ascii_lowercase, punctuation

import numpy as np
import torch
from transformers import AutoModel, BertConfig, BertTokenizer, ModernBertConfig

README = Path(__file__).resolve().parent.parent / "README.md"
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
SIZES = {
    "random_minilm": BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "random_modernbert_base": ModernBertConfig(),
}
# A word of more letters is two tokens, so that a word is 1.3 in the mean, as English is.
WHOLE = 6


def write_backbone(folder: Path, size: str) -> None:
    """Random weights of a size, and a tokenizer that knows the words of `made_pairs`."""
    pieces = {piece for word in words() for piece in ([word] if len(word) <= WHOLE else [word[:4], f"##{word[4:]}"])}
    letters = [*ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase), *punctuation]
    vocabulary = list(dict.fromkeys([*SPECIAL.values(), *letters, *sorted(pieces)]))
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer(
        str(folder / "vocab.txt"), model_max_length=512, model_input_names=["input_ids", "attention_mask"]
    )
    tokenizer.save_pretrained(folder)
    ids = {
        f"{name}_token_id": vocabulary.index(token) for name, token in SPECIAL.items() if name in ("pad", "cls", "sep")
    }
    config = type(SIZES[size])(**(SIZES[size].to_diff_dict() | ids))
    torch.manual_seed(1)
    AutoModel.from_config(config).save_pretrained(folder)


def made_pairs() -> Iterator[tuple[str, str]]:
    """Random words without end: as many as MS MARCO's queries and passages have, 6 and 56 on average."""
    random = np.random.default_rng(1)
    vocabulary = np.array(words())

    def text(mean: float, deviation: float, least: int) -> str:
        # The logarithm of a length is normal.
        length = random.lognormal(np.log(mean) - deviation**2 / 2, deviation)
        return " ".join(random.choice(vocabulary, max(least, round(length))))

    while True:
        yield text(6, 0.4, 2), text(56, 0.45, 8)


@cache
def words() -> list[str]:
    """Those of the README."""
    return sorted(set(re.findall("[a-z]{3,}", README.read_text(encoding="utf-8").lower())))
