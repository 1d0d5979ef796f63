"""Rankings as trec_eval reads them: a line each of query, Q0, document, rank, score and a name."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from configs.schema import ConfigError
from trainer.data.files import lines
from trainer.data.retrieval import RetrievalSet


def read_run(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield place, query and document of each line, in the order of the file. Raises ConfigError for a line that is
    none of a run."""
    for place, line in lines(path):
        cells = line.split()
        if not cells:
            continue
        if len(cells) != 6:
            raise ConfigError(
                f"{place}: {len(cells)} cells, and TREC's runs have 6: query, Q0, document, rank, score, name"
            )
        yield place, cells[0], cells[2]


def with_candidates(retrieval: RetrievalSet, path: Path) -> RetrievalSet:
    """The set in which each query ranks what a run has for it, which may be nothing; a run may have more queries than
    are judged.

    Raises ConfigError where the run names queries or documents that the set does not have, or one twice for a query.
    """
    candidates: dict[str, dict[str, None]] = {query: {} for query in retrieval.queries}
    total, unknown, first = 0, 0, ""
    for place, query, document in read_run(path):
        total += 1
        if (query not in candidates and query not in retrieval.unjudged) or document not in retrieval.corpus:
            side, key = ("document", document) if document not in retrieval.corpus else ("query", query)
            first = first or f"{place}: {side}={key} is not in the set that is ranked"
            unknown += 1
        elif query in candidates:
            if document in candidates[query]:
                raise ConfigError(f"{place}: document={document} stands here again for query={query}: remove one")
            candidates[query][document] = None
    if unknown:
        raise ConfigError(
            f"{first}, and so in {unknown:,} of {total:,} lines: is this a run of these queries over this corpus?"
        )
    if not any(candidates.values()):
        raise ConfigError(f"{path} ranks no document for any of the {len(candidates):,} judged queries")
    return replace(retrieval, candidates={query: list(own) for query, own in candidates.items()})


def write_run(path: Path, rankings: Mapping[str, dict[str, float]], *, name: str) -> None:
    """Write rankings, score by document id, best first, by query id, so that trec_eval has the same order.

    trec_eval sorts by score in float32, which nine digits tell apart, and puts the higher id first where these tie.
    """
    with path.open("w", encoding="utf-8") as file:
        for query in rankings:
            for rank, (document, score) in enumerate(rankings[query].items(), start=1):
                file.write(f"{query} Q0 {document} {rank} {score:.9g} {name}\n")


def unfit_id(retrieval: RetrievalSet) -> str | None:
    """What is wrong with the first id that no line of a run can hold, or None."""
    for side, ids in (("query", retrieval.queries), ("document", retrieval.corpus)):
        for key in ids:
            if key.split() != [key]:
                return f"{side} id {key!r} has a space in it, which no line of a TREC run can hold: rename it"
    return None
