"""What the data is, in words and figures, before any weight is loaded: `mode=check`, and in brief every run."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow.compute as pc

from configs.schema import Config
from trainer.data import Data
from trainer.data.retrieval import RetrievalSet, queries_of
from trainer.data.scores import is_one_hot
from trainer.data.tables import IntArray, TrainingSet, column, normalised, sorted_pairs

# Texts of a side of a set that are tokenised, evenly over the data; queries whose scores are looked at.
SAMPLE = 5_000
PERCENTILES = (5, 50, 95, 100)
# More of a side's texts than this that lose their ends is worth a warning.
MUCH_IS_CUT = {"query": 0.05, "document": 0.5}


def data_warnings(sets: Sequence[TrainingSet], evaluation: Mapping[str, RetrievalSet]) -> Iterator[str]:
    """What was left out, what stands twice, and training queries that the evaluation asks as well; in words, each with
    its count."""
    queries = queries_of(evaluation)
    for examples in sets:
        yield from examples.warnings
        repeated = _repeated(examples)
        if repeated:
            yield f"{repeated:,} of {len(examples):,} examples of {examples.name} repeat a query and its positive"
        if asked := _asked(examples, queries):
            yield (
                f"{asked:,} of {len(queries):,} queries of the evaluation are training queries of "
                f"{examples.name}: what they score is no measure"
            )


def _repeated(examples: TrainingSet) -> int:
    """Examples whose query and first positive stand in one before."""
    queries = column(examples.queries, "identity")[column(examples.examples, "query")]
    documents = column(examples.documents, "identity")[examples.first_documents()]
    return len(examples) - len(sorted_pairs(queries, documents)[0])


def _asked(examples: TrainingSet, queries: Sequence[str]) -> int:
    """How many different queries of these are trained on, but for case and spaces."""
    asked = set(map(normalised, queries))
    found: set[str] = set()
    for batch in (
        examples.queries.select_columns("text").select(examples.named_queries()).with_format("arrow").iter(10_000)
    ):
        found.update({normalised(text) for text in batch["text"].to_pylist()} & asked)
    return len(found)


def describe_set(
    config: Config, examples: TrainingSet, tokens: dict[str, IntArray], caps: dict[str, int]
) -> dict[str, str]:
    """The facts of a set, by name. tokens: of a sample of each side's texts; caps: where these are cut."""
    positives = column(examples.examples, "positives")
    others = examples.document_counts - positives
    queries = len(np.unique(column(examples.queries, "identity")[examples.named_queries()]))
    named = examples.named_documents()
    different = len(np.unique(column(examples.documents, "identity")[named]))
    facts = {
        "examples": f"{len(examples):,}, of {queries:,} different queries",
        "documents": f"{len(named):,} of {len(examples.documents):,} named, {different:,} different",
        "a query's": f"{_range(positives)} positives, {_range(others)} others",
    }
    for task, words in (("query", "query tokens"), ("document", "document tokens")):
        own = tokens[task]
        percentiles = np.percentile(own, PERCENTILES).astype(int)
        listed = ", ".join(f"{share} % {value}" for share, value in zip(PERCENTILES, percentiles, strict=True))
        facts[words] = f"{listed}; {caps[task]} cut {(own > caps[task]).mean():.1%} of {len(own):,}"
    if examples.has_teacher:
        facts["scores"] = _scores(config, examples)
    return facts


def length_warnings(name: str, tokens: dict[str, IntArray], caps: dict[str, int]) -> Iterator[str]:
    """Where many texts lose their ends."""
    for task, much in MUCH_IS_CUT.items():
        share = (tokens[task] > caps[task]).mean()
        if share > much:
            yield f"{share:.0%} of {name}'s {task} texts are longer than {task}_length={caps[task]} and are cut"


def sample(examples: TrainingSet, task: str, *, most: int = SAMPLE) -> list[str]:
    """Texts of a side that are trained on, evenly over the data, and no more than `most`."""
    chosen = examples.examples.select(_evenly(examples, most))
    if task == "query":
        return list(examples.queries[chosen["query"]]["text"])
    return list(examples.documents[column(chosen, "documents", lambda lists: pc.list_element(lists, 0))]["text"])


def _evenly(examples: TrainingSet, most: int) -> range:
    return range(0, len(examples), math.ceil(len(examples) / most))


def _range(counts: IntArray) -> str:
    low, high = counts.min(), counts.max()
    return f"{low}" if low == high else f"{low} to {high} (median {np.median(counts):g})"


def _scores(config: Config, examples: TrainingSet) -> str:
    scores = [np.array(own) for own in examples.examples.select(_evenly(examples, SAMPLE))["scores"]]
    every = np.concatenate(scores)
    temperature = config.loss.distillation.teacher_temperature
    one_hot = np.mean([is_one_hot(own, temperature) for own in scores])
    return (
        f"{every.min():g} to {every.max():g}, of a query with a standard deviation of "
        f"{np.median([own.std() for own in scores]):.3g}; {np.mean([np.ptp(own) == 0 for own in scores]):.1%} all the "
        f"same; at teacher_temperature={temperature:g} one document has more than 99 % in {one_hot:.1%}"
    )


def project(
    config: Config,
    data: Data,
    tokens: dict[str, dict[str, IntArray]],
    *,
    steps: int,
    epochs: float,
    seconds_a_token: float,
) -> dict[str, str]:
    """Steps, tokens and time of the run, on one process. tokens: of a sample by side by set, cut; seconds_a_token: of a
    forward pass."""
    per_query = {"query": 0.0, "document": 0.0}
    for examples in data.sets:
        share = len(examples) / data.size
        wanted = examples.config.documents_per_query
        taken = np.minimum(examples.document_counts, wanted) if wanted else examples.document_counts
        own = tokens[examples.name]
        per_query["query"] += share * own["query"].mean()
        per_query["document"] += share * own["document"].mean() * taken.mean()
    queries = steps * config.trainer.batch_size
    total = {task: queries * each for task, each in per_query.items()}
    # Backward costs two forward passes; where activations are not kept, there is one more.
    passes = 3 + (config.trainer.cache_tokens is not None) + config.trainer.gradient_checkpointing
    seconds = passes * sum(total.values()) * seconds_a_token
    times = 2 + (steps - 1) // config.evaluation.every_steps if config.evaluation.every_steps else 2
    scored = (
        times
        * seconds_a_token
        * sum(len(each.corpus) * float(tokens[name]["document"].mean()) for name, each in data.evaluation.items())
    )
    return {
        "steps": f"{steps:,} of {config.trainer.batch_size} queries, {epochs:.2f} epochs",
        "tokens": f"{total['query']:,.0f} of queries, {total['document']:,.0f} of documents, without padding",
        "time": f"about {_minutes(seconds)} of training and {_minutes(scored)} of evaluation in one process here",
    }


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:,.0f} minutes"


def evaluation_size(evaluation: Mapping[str, RetrievalSet]) -> tuple[int, int]:
    """Queries and documents of all sets."""
    return sum(len(each.queries) for each in evaluation.values()), sum(len(each.corpus) for each in evaluation.values())


def describe_evaluation(evaluation: Mapping[str, RetrievalSet]) -> dict[str, str]:
    """What the model is scored on."""
    if not evaluation:
        return {"evaluation": "none"}
    sets = evaluation.values()
    queries, documents = evaluation_size(evaluation)
    judged = sum(len(grades) for each in sets for grades in each.judgements.values())
    without = sum(len(each.queries.keys() - each.judgements) for each in sets)
    return {
        "evaluation": f"{queries:,} queries, {documents:,} documents, {judged:,} judged"
        + (f"; {without:,} queries have none" if without else "")
    }
