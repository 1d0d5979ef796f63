"""A ranking by BM25: candidates for what is mined or ranked again, and what a model must beat."""

import numpy as np

from configs.schema import ConfigError


def rank_by_bm25(
    queries: dict[str, str], corpus: dict[str, str], *, depth: int, asked: str
) -> dict[str, dict[str, float]]:
    """Return score by document id, best first, by query id, of BM25: Lucene's variant by bm25s, k1 0.9, b 0.4, Porter's
    stemmer.

    queries, corpus: text by id; depth: documents of a query at most; asked: the key and value that ask for BM25.
    Documents that share no word with the query are left out, and so is a query without any. Where scores tie the higher
    id is first, as trec_eval has it.
    Raises ConfigError without the extra `mining`, or where the documents have no word.
    """
    try:
        import bm25s
        import Stemmer
    except ImportError as error:
        raise ConfigError(f'{asked} needs {error.name}: pip install -e ".[mining]"') from error

    tokenize = {"stopwords": "en", "stemmer": Stemmer.Stemmer("porter"), "show_progress": False}
    documents = bm25s.tokenize(list(corpus.values()), **tokenize)
    if not any(map(len, documents.ids)):
        raise ConfigError(f"{asked}: no document has a word that BM25 counts")
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(documents, show_progress=False)
    tokens = bm25s.tokenize(list(queries.values()), **tokenize)
    ids = np.array(list(corpus))
    rows, scores = index.retrieve(tokens, k=min(depth, len(corpus)), show_progress=False)
    rankings = {}
    for query, own, of_own in zip(queries, rows, scores, strict=True):
        found = sorted(zip(of_own.tolist(), ids[own].tolist(), strict=True), reverse=True)
        if ranking := {document: score for score, document in found if score > 0}:
            rankings[query] = ranking
    return rankings
