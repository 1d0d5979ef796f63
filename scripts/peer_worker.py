"""Encode texts with PyLate or with Stanford's ColBERT: what check_peers.py runs in the environment of the library.

    python scripts/peer_worker.py '{"library": "pylate", "model": ..., "build": null, "texts": ..., "vectors": ...}'

Nothing of lateforge is imported. model: the folder that is read; where `build` is not null, the library first makes a
model as it says and saves it there. texts: a JSON file with lists of "query" and "document"; vectors: the NumPy
archive that receives the vectors of the scored tokens, text after text, the numbers of tokens, and the library's own
scores.
"""

import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# The vectors (tokens, width) of each query and each document, and the scores (queries, documents).
Encoded = tuple[list[Tensor], list[Tensor], Tensor]


def main(task: dict[str, Any]) -> None:
    """Build where that is asked for, read, encode and write."""
    texts = json.loads(Path(task["texts"]).read_text(encoding="utf-8"))
    stanford = task["library"] == "stanford"
    if task["build"] is not None:
        torch.manual_seed(1)
        build: Callable[..., None] = build_stanford if stanford else build_pylate
        build(task["model"], **task["build"])
    encode = encode_stanford if stanford else encode_pylate
    queries, documents, scores = encode(task["model"], texts["query"], texts["document"])
    numpy.savez(
        task["vectors"],
        query_vectors=torch.cat(queries).numpy(),
        query_tokens=[len(vectors) for vectors in queries],
        document_vectors=torch.cat(documents).numpy(),
        document_tokens=[len(vectors) for vectors in documents],
        scores=scores.numpy(),
    )


def build_pylate(
    folder: str, *, backbone: str, layers: Sequence[dict[str, Any]] | None, settings: dict[str, Any]
) -> None:
    """Save a model over a backbone; layers: arguments of each Dense, None for what PyLate itself puts there."""
    models: Any = import_module("pylate.models")
    if layers is None:
        model = models.ColBERT(backbone, device="cpu", **settings)
    else:
        modules = [import_module("sentence_transformers.models").Transformer(backbone)]
        for layer in layers:
            activation = getattr(torch.nn, layer["activation_function"])()
            modules.append(models.Dense(**layer | {"activation_function": activation}))
        model = models.ColBERT(modules=modules, device="cpu", **settings)
    # Like words: transformers draws new rows beside the mean of all, and a wrong marker would hardly be seen.
    markers = model[0].auto_model.get_input_embeddings().weight
    with torch.no_grad():
        markers[-2:].normal_(std=float(markers.std()))
    model.save(folder)


def encode_pylate(folder: str, queries: Sequence[str], documents: Sequence[str]) -> Encoded:
    """Encode as PyLate's users do, without pooling."""
    model = import_module("pylate.models").ColBERT(folder, device="cpu")
    query_vectors, document_vectors = (
        [torch.from_numpy(vectors) for vectors in model.encode(list(texts), is_query=is_query)]
        for texts, is_query in ((queries, True), (documents, False))
    )
    # One document at a time: a document is padded with zeros, which would win over negative similarities.
    padded = pad_sequence(query_vectors, batch_first=True)
    colbert_scores = import_module("pylate.scores").colbert_scores
    scores = [colbert_scores(padded, vectors[None]) for vectors in document_vectors]
    return query_vectors, document_vectors, torch.cat(scores, dim=1)


def build_stanford(folder: str, *, backbone: str, settings: dict[str, Any]) -> None:
    """Save a model with a new linear layer over a backbone."""
    config = import_module("colbert.infra").ColBERTConfig(**settings)
    import_module("colbert.modeling.colbert").ColBERT(name=backbone, colbert_config=config).save(folder)


def encode_stanford(folder: str, queries: Sequence[str], documents: Sequence[str]) -> Encoded:
    """Encode as Stanford's indexer and searcher do on a CPU, in float32."""
    config = import_module("colbert.infra").ColBERTConfig.load_from_checkpoint(folder)
    model = import_module("colbert.modeling.checkpoint").Checkpoint(folder, config, verbose=0)
    if not model.colbert_config.mask_punctuation:
        model.skiplist = {}  # 0.2.22 makes none then, and reads it for every document: an AttributeError
    query_vectors = list(model.queryFromText(list(queries), bsize=32, to_cpu=True))
    (document_vectors,) = model.docFromText(list(documents), bsize=32, keep_dims=False)
    padded = pad_sequence(document_vectors, batch_first=True)
    lengths = torch.tensor([len(vectors) for vectors in document_vectors])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    colbert_score = import_module("colbert.modeling.colbert").colbert_score
    scores = [colbert_score(vectors[None], padded, mask, config=model.colbert_config) for vectors in query_vectors]
    return query_vectors, document_vectors, torch.stack(scores)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
