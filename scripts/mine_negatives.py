"""Mine hard negatives: documents that a model scores high for a query and that do not answer it.

    python scripts/mine_negatives.py model=outputs/<name>/model data=scifact output=mined.jsonl.gz
    python scripts/mine_negatives.py model=colbertv2 data=pairs data.path=mine.jsonl output=mined.jsonl candidates=bm25
    python train.py data=scored data.path=mined.jsonl.gz data.positive=first loss=contrastive

For each query that is trained on, candidates are scored by MaxSim: candidates=maxsim ranks every document of the data,
exactly, in blocks of `block` whose vectors are held at once, and looks at the best `top`; candidates=bm25 looks at the
`top` of a BM25 ranking. Documents that the data names as answers are left out,
the first `skip` too, and whatever scores above `max_ratio` of the positive, which is likely an answer that nobody has
judged (Moreira et al. 2024, arXiv 2407.15831, section 3). The best `negatives` of the rest are written, one row a query
and positive: query, documents (the positive first), scores (MaxSim, which may teach). The file is there whole or not at
all. Any other argument is one of train.py. The status is 2 where nothing could be mined.
"""

import gzip
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets
import numpy as np
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from sentence_transformers import MultiVectorEncoder

from architectures.layouts import read_checkpoint
from configs.mix import spell_mix
from configs.reference import explain_composition
from configs.schema import ConfigError
from scripts.bm25 import rank_by_bm25
from scripts.models import CONFIGS, compose_config, load_model
from scripts.options import read_options, split_arguments
from trainer.console import make_console
from trainer.data import load_data
from trainer.data.retrieval import RetrievalSet
from trainer.data.tables import TrainingSet, column, identity, values
from trainer.display import print_facts
from trainer.evaluation import BLOCK_DOCUMENTS, rank

Scores = dict[str, dict[str, float]]
"""Score by document id, best first, by query id."""


@dataclass
class Options:
    """What the script takes beside the arguments of train.py."""

    model: str = ""
    output: str = ""
    candidates: str = "maxsim"
    top: int = 100
    """Documents of a query that are looked at, best first."""
    negatives: int = 16
    max_ratio: float = 0.95
    skip: int = 0
    batch_size: int = 32
    """Texts encoded at once."""
    block: int = BLOCK_DOCUMENTS
    """Texts of documents whose vectors are held at once."""
    overwrite: bool = False


def main(arguments: Sequence[str]) -> int:
    """Mine, write the file, and say in figures what was kept and what was dropped."""
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0
    try:
        options, overrides = parse(arguments)
        facts = mine(options, overrides)
    except ConfigError as error:
        print(f"mine_negatives: {error}", file=sys.stderr)
        return 2
    except (HydraException, OmegaConfBaseException) as error:
        print(f"mine_negatives: {explain_composition(error, CONFIGS)}", file=sys.stderr)
        return 2
    print_facts(make_console(), facts)
    return 0


def parse(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The options, and what is left for the config. Raises ConfigError for a value that cannot be."""
    given, overrides = split_arguments(Options, spell_mix(arguments))
    options = read_options(Options, given)
    problems = {
        "model= is missing: give one folder, Hub name or member of configs/backbone": not options.model,
        "data= is missing: give a member of configs/data": not any(each.startswith("data=") for each in overrides),
        f"output={options.output} must end in .jsonl or .jsonl.gz": not options.output.endswith(
            (".jsonl", ".jsonl.gz")
        ),
        f"output={options.output} exists: name another file, or set overwrite=true": (
            Path(options.output).exists() and not options.overwrite
        ),
        f"candidates={options.candidates} must be maxsim or bm25": options.candidates not in ("maxsim", "bm25"),
        f"max_ratio={options.max_ratio} must be above 0": not options.max_ratio > 0,
        f"negatives={options.negatives} must be 1 or more": options.negatives < 1,
        f"batch_size={options.batch_size} must be 1 or more": options.batch_size < 1,
        f"block={options.block} must be 1 or more": options.block < 1,
        f"skip={options.skip} must be 0 or more": options.skip < 0,
        f"top={options.top} must be at least skip={options.skip} and negatives={options.negatives} together": (
            options.top < options.skip + options.negatives
        ),
    }
    for problem, holds in problems.items():
        if holds:
            raise ConfigError(problem)
    return options, overrides


def mine(options: Options, overrides: list[str]) -> dict[str, str]:
    """Write the file, whole or not at all, and return the facts of it."""
    started = time.perf_counter()
    config = compose_config(options.model, *overrides)
    datasets.disable_progress_bars()
    sets = load_data(config.data).sets
    has_head = read_checkpoint(config.backbone).has_head
    # A new head is the one that a run with this seed starts from.
    torch.manual_seed(config.seed)
    encoder = load_model(options.model, *overrides)
    if torch.accelerator.is_available():
        encoder = encoder.to(torch.accelerator.current_accelerator())
    counts = dict.fromkeys(("queries", "positives", "rows", "negatives", "known", "above", "without"), 0)
    target = Path(options.output)
    unfinished = target.with_name(f".{target.name}.unfinished")
    opened = gzip.open if target.suffix == ".gz" else open
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with opened(unfinished, "wt", encoding="utf-8") as file:
            for examples in sets:
                for row in mined_rows(examples, encoder, options, counts):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not counts["rows"]:
            raise ConfigError(f"no negative is left of {counts['queries']} queries: raise max_ratio or top")
        unfinished.replace(target)
    except OSError as error:
        raise ConfigError(f"output={target} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return {
        **({} if has_head else {"head": f"new and untrained, drawn from seed={config.seed}: train it before you mine"}),
        "rows": f"{counts['rows']:,} of {counts['positives']:,} positives of {counts['queries']:,} queries",
        "negatives": f"{counts['negatives'] / counts['rows']:.1f} a row",
        "known positives": f"{counts['known'] / counts['queries']:.2f} a query among the top {options.top}, dropped",
        "above max_ratio": f"{counts['above'] / counts['positives']:.2f} a positive, dropped",
        "without one": (
            f"{counts['positives'] - counts['rows']:,} positives, left out, and with them {counts['without']:,} queries"
        ),
        "seconds": f"{time.perf_counter() - started:.0f}",
        "output": f"{target}: python train.py data=scored data.path={target} data.positive=first ...",
    }


def mined_rows(
    examples: TrainingSet, encoder: MultiVectorEncoder, options: Options, counts: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a set, and count what they are made of.

    A text is named by its identity: the same text is one query, or one document, wherever it stands.
    """
    corpus = texts_by_id(examples.documents, np.arange(len(examples.documents)))
    queries = texts_by_id(examples.queries, examples.named_queries())
    positives: dict[str, list[str]] = {query: [] for query in queries}
    for query, document in zip(*(pairs.tolist() for pairs in examples.known_positives()), strict=True):
        positives[str(query)].append(str(document))

    def scored(candidates: dict[str, list[str]] | None, depth: int) -> Scores:
        asking = queries if candidates is None else {key: queries[key] for key in candidates}
        asked = RetrievalSet(asking, corpus, judgements={}, candidates=candidates).read_as(examples.config)
        if not asked.queries:
            return {}
        [ranking] = rank(
            encoder, asked, batch_size=options.batch_size, widths=(), depth=depth, block_documents=options.block
        ).values()
        return dict(ranking)

    candidates = None
    if options.candidates == "bm25":
        rankings = rank_by_bm25(queries, corpus, depth=options.top, asked="candidates=bm25")
        candidates = {query: list(own) for query, own in rankings.items()}
    found = {query: dict[str, float]() for query in queries} | scored(candidates, options.top)
    # Few positives are not found: to encode them all again would double the time where each document answers a query.
    unfound = {query: [key for key in positives[query] if key not in found[query]] for query in queries}
    unfound = {query: own for query, own in unfound.items() if own}
    answers = scored(unfound, max(map(len, unfound.values()), default=0))
    for query, text in queries.items():
        known, rows_before = set(positives[query]), counts["rows"]
        of_positives = found[query] | answers.get(query, {})
        counts["queries"] += 1
        counts["known"] += len(known & set(found[query]))
        others = {key: score for key, score in found[query].items() if key not in known}
        for positive in positives[query]:
            limit = options.max_ratio * of_positives[positive]
            below = {key: score for key, score in list(others.items())[options.skip :] if score <= limit}
            kept = dict(list(below.items())[: options.negatives])
            counts["positives"] += 1
            counts["above"] += max(0, len(others) - options.skip) - len(below)
            counts["rows"] += bool(kept)
            counts["negatives"] += len(kept)
            if kept:
                documents = [corpus[positive], *(corpus[key] for key in kept)]
                yield {"query": text, "documents": documents, "scores": [of_positives[positive], *kept.values()]}
        counts["without"] += counts["rows"] == rows_before


def texts_by_id(table: datasets.Dataset, rows: "np.ndarray[Any, np.dtype[np.int64]]") -> dict[str, str]:
    """Each different text once, but the empty, by its identity."""
    chosen = table.select(rows)
    texts = dict(zip(map(str, column(chosen, "identity").tolist()), values(chosen, "text"), strict=True))
    texts.pop(str(identity("")), None)
    return texts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
