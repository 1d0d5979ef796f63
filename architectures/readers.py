"""Read an export as its own library does, where that library cannot be installed beside this one.

PyLate 1.6 and Stanford's ColBERT 0.2 insert the id of the marker behind the first token, where the encoder tokenises it
with the text, and fill queries by themselves. These readers follow them step by step, over transformers alone, so that
an export that they would read otherwise is found. `scripts/check_peers.py` holds the libraries themselves against it.
"""

import json
import string
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from architectures.export import Format

Read = Callable[..., list[Tensor]]
"""Takes texts and `task`, query or document; returns the unit-length vectors (tokens, width) of each text's tokens."""


def read_export(folder: Path, layout: Format, *, trust_remote_code: bool = False) -> Read:
    """Load an export in float32 on the CPU.

    trust_remote_code: whether the backbone, or our own module in the folder, may run the folder's code.
    """
    if layout is Format.sentence_transformers:
        encoder = MultiVectorEncoder(
            str(folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": torch.float32},
        ).eval()
        return lambda texts, *, task: vectors_of(encoder, texts, task=task)
    return _read_inserting(folder, layout, trust_remote_code=trust_remote_code)


def vectors_of(encoder: MultiVectorEncoder, texts: list[str], *, task: str) -> list[Tensor]:
    """What an encoder gives: unit-length vectors (tokens, width) of each text, of the tokens that are scored."""
    encode = encoder.encode_query if task == "query" else encoder.encode_document
    return list(encode(texts))


def _read_inserting(folder: Path, layout: Format, *, trust_remote_code: bool) -> Read:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
    if layout is Format.pylate:
        saved = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
        lengths = {"query": saved["query_length"], "document": saved["document_length"]}
        markers = {"query": saved["query_prefix"], "document": saved["document_prefix"]}
        fills, attends = saved["do_query_expansion"], saved["attend_to_expansion_tokens"]
        skipped = [tokenizer.convert_tokens_to_ids(word) for word in saved["skiplist_words"]]
        layers = [_dense(folder / entry["path"]) for entry in _modules(folder) if entry["type"].endswith(".Dense")]
    else:
        metadata = json.loads((folder / "artifact.metadata").read_text(encoding="utf-8"))
        lengths = {"query": metadata["query_maxlen"], "document": metadata["doc_maxlen"]}
        markers = {"query": metadata["query_token_id"], "document": metadata["doc_token_id"]}
        fills, attends = True, metadata["attend_to_mask_tokens"]
        marks = string.punctuation if metadata["mask_punctuation"] else ""
        skipped = [tokenizer.encode(mark, add_special_tokens=False)[0] for mark in marks]
        weight = load_file(folder / "model.safetensors")["linear.weight"]
        layers = [lambda x: F.linear(x, weight)]

    def read(texts: list[str], *, task: str) -> list[Tensor]:
        return [read_one(text, task) for text in texts]

    @torch.inference_mode()
    def read_one(text: str, task: str) -> Tensor:
        marker = tokenizer.convert_tokens_to_ids(markers[task]) if markers[task] else None
        ids = tokenizer(text, truncation=True, max_length=lengths[task] - (marker is not None))["input_ids"]
        if marker is not None:
            ids.insert(1, marker)
        attended = [1] * len(ids)
        scored = [task == "query" or token not in skipped for token in ids]
        if task == "query" and fills:
            more = lengths["query"] - len(ids)
            ids += [_filler(tokenizer)] * more
            attended += [int(attends)] * more
            scored += [True] * more
        if layout is Format.stanford:
            scored = [score and token != tokenizer.pad_token_id for token, score in zip(ids, scored, strict=True)]
        vectors = model(input_ids=torch.tensor([ids]), attention_mask=torch.tensor([attended])).last_hidden_state
        for layer in layers:
            vectors = layer(vectors)
        return F.normalize(vectors[0][torch.tensor(scored)], dim=-1)

    return read


def _filler(tokenizer: PreTrainedTokenizerBase) -> int:
    token = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.eos_token_id
    assert isinstance(token, int), "an expansion has a token"
    return token


def _modules(folder: Path) -> list[dict[str, str]]:
    modules: list[dict[str, str]] = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    return modules


def _dense(folder: Path) -> Callable[[Tensor], Tensor]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    activation = getattr(nn, config["activation_function"].split(".")[-1])()

    def layer(x: Tensor) -> Tensor:
        out: Tensor = activation(F.linear(x, weights["linear.weight"], weights.get("linear.bias")))
        if not config["use_residual"]:
            return out
        return out + (F.linear(x, weights["residual.weight"]) if "residual.weight" in weights else x)

    return layer
