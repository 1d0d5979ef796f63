"""Compare models query by query: is the difference more than chance, and where does it lie?

    python scripts/compare.py runs=[outputs/linear,outputs/mlp]
    python scripts/compare.py runs=[outputs/linear/scores_before.jsonl,outputs/linear] metric=mrr@10
    python scripts/compare.py 'runs=[[outputs/a1,outputs/a2],[outputs/b1,outputs/b2]]' output=comparison.json

A run is a folder of train.py or of scripts/evaluate.py, or a file of scores; in brackets stand several seeds of one
model, whose scores are averaged by query. Each is compared to the first, over the same queries: mean difference, its
95 % paired bootstrap interval, p of a paired randomisation test, Holm's correction where several are compared, wins,
ties and losses. Then come the `queries` (10) that differ most and, where the models and the data can be loaded, what
matched in the query's best judged document: for each token of the query that is scored, the document's token that is
most similar, under both models; of several seeds the first. output= writes all as JSON. The status is 2 where the runs
cannot be compared.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from functools import cache
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets
import torch
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from sentence_transformers import MultiVectorEncoder

from configs.reference import explain_composition
from configs.schema import Config, ConfigError, parse_config
from scripts.models import CONFIGS, build_model, compose_config, load_model
from scripts.options import read_options
from trainer.comparison import average, other_queries, p_text
from trainer.console import make_console
from trainer.data import load_evaluation, named_sets
from trainer.data.retrieval import RetrievalSet
from trainer.data.tokens import Task
from trainer.evaluation import encode
from trainer.metrics import read_scores
from trainer.run_folder import CONFIG, MODEL, RESULT, SCORES
from trainer.significance import compare_paired, holm

# Of a document's text, what is shown.
SHOWN = 300


@dataclass
class Options:
    """What the script takes."""

    runs: str = ""
    metric: str = "ndcg@10"
    queries: int = 10
    """How many are shown."""
    output: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Side:
    """A model that is compared."""

    paths: list[Path]
    """Folders of runs, or files of scores: one, or one a seed."""
    values: dict[str, float]
    """The metric by query, averaged over seeds."""

    @property
    def name(self) -> str:
        return ", ".join(map(str, self.paths))


@dataclass(frozen=True)
class Match:
    """A token of a query that is scored, and the most similar token of a document."""

    token: str
    document_token: str
    similarity: float


def main(arguments: Sequence[str]) -> int:
    """Compare, print, and write what was asked for."""
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0
    try:
        options = parse(arguments)
        sides = read_sides(options)
        datasets.disable_progress_bars()
        comparisons = compare(sides)
        console = make_console()
        print_comparisons(console, options.metric, sides, comparisons)
        inspector = Inspector(sides)
        for side, comparison in zip(sides[1:], comparisons, strict=True):
            comparison["queries"] = inspector.differing(side, most=options.queries)
        for problem in inspector.problems():
            console.print(problem)
        for number, comparison in enumerate(comparisons, start=1):
            print_queries(console, comparison["queries"], names=(letter(0), letter(number)))
        if options.output is not None:
            write(Path(options.output), options, sides, comparisons)
            console.print(f"written: {options.output}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str]) -> Options:
    """Raises ConfigError that names the argument."""
    known = [field.name for field in fields(Options)]
    given = dict(argument.partition("=")[::2] for argument in arguments)
    for key in given:
        if key not in known:
            nearest = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{key} is no key; the nearest is {nearest}, of {', '.join(known)}")
    options = read_options(Options, given)
    if options.queries < 0:
        raise ConfigError(f"queries={options.queries} must be 0 or more")
    if options.output is not None and Path(options.output).exists() and not options.overwrite:
        raise ConfigError(f"output={options.output} exists: name another file, or set overwrite=true")
    return options


def read_sides(options: Options) -> list[Side]:
    """Raises ConfigError where a run has no scores, or others than the first."""
    asked = f"runs={options.runs}"
    try:
        # Every scalar is a text: a folder may have the name of a number.
        given = yaml.load(options.runs, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        given = None
    rows = [row if isinstance(row, list) else [row] for row in given] if isinstance(given, list) else []
    if len(rows) < 2 or not all(row and all(isinstance(path, str) for path in row) for row in rows):
        raise ConfigError(
            f"{asked} must name two runs or more, as in runs=[A,B], or several seeds of each, as in "
            "'runs=[[A1,A2],[B1,B2]]'"
        )
    sides: list[Side] = []
    first: tuple[str, dict[str, float], Any] | None = None
    for row in rows:
        values = []
        for path in map(Path, row):
            own, texts = _values(path, options.metric), _evaluation_id(path)
            name, others, other_texts = first = first or (str(path), own, texts)
            if problem := other_queries(own, others):
                raise ConfigError(f"{asked}: {path} was scored on other queries than {name}: {problem}")
            if texts is not None and other_texts is not None and texts != other_texts:
                raise ConfigError(f"{asked}: {path} was scored on queries of other texts than {name}")
            values.append({query: own[query] for query in others})
        sides.append(Side([Path(path) for path in row], average(*values)))
    return sides


def _values(path: Path, metric: str) -> dict[str, float]:
    file = path / SCORES if path.is_dir() else path
    if not file.is_file():
        below = sorted(found.parent.name for found in path.glob(f"*/{SCORES}")) if path.is_dir() else []
        remedy = f"name one of {', '.join(below)} in it" if below else "give the folder of a run that was scored"
        raise ConfigError(f"runs: there is no {file}: {remedy}")
    values = read_scores(file)
    if metric not in values:
        raise ConfigError(f"metric={metric} is not in {file}, which has {', '.join(values)}")
    return values[metric]


def _evaluation_id(path: Path) -> Any:
    """What tells the texts of the queries, where the run says it."""
    result = _folder(path) / RESULT
    return json.loads(result.read_text(encoding="utf-8")).get("evaluation_id") if result.is_file() else None


def _folder(path: Path) -> Path:
    """Of a run."""
    return path if path.is_dir() else path.parent


def compare(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Each side but the first, against that."""
    first, *others = (list(side.values.values()) for side in sides)
    differences = [compare_paired(first, other) for other in others]
    corrected = holm([difference.p for difference in differences])
    return [
        {
            "difference": difference.mean,
            "low": difference.low,
            "high": difference.high,
            "p": difference.p,
            "p_holm": p_holm,
            "wins": sum(new > old for old, new in zip(first, other, strict=True)),
            "ties": sum(new == old for old, new in zip(first, other, strict=True)),
            "losses": sum(new < old for old, new in zip(first, other, strict=True)),
        }
        for other, difference, p_holm in zip(others, differences, corrected, strict=True)
    ]


class Inspector:
    """Looks up what the scores do not hold: texts, judgements and vectors. What cannot be loaded is said once."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self._first = sides[0]
        self._problems: dict[str, str] = {}
        self._asked: dict[str, tuple[RetrievalSet, str]] | None = None
        for path in dict.fromkeys(path for side in sides for path in side.paths):
            self._asked = self._asked or self._try("no texts", path, lambda path=path: self._texts(path))
        if self._asked is not None:
            self._problems.clear()
        self._encoder = cache(lambda path: self._try("no tokens", path, lambda: load_encoder(path)))

    def problems(self) -> list[str]:
        return list(self._problems.values())

    def differing(self, side: Side, *, most: int) -> list[dict[str, Any]]:
        """The queries that differ most, with what is known of them, the largest difference first."""
        first = self._first
        changes = {query: value - first.values[query] for query, value in side.values.items()}
        rows: list[dict[str, Any]] = []
        for query in sorted((query for query in changes if changes[query]), key=lambda query: -abs(changes[query])):
            if len(rows) == most:
                break
            scores = [first.values[query], side.values[query]]
            row: dict[str, Any] = {"query": query, "scores": scores, "difference": changes[query]}
            rows.append(row)
            if self._asked is None:
                continue
            retrieval, own = self._asked[query]
            grades = retrieval.judgements[own]
            document = max((key for key in grades if key in retrieval.corpus), key=grades.__getitem__)
            texts = retrieval.queries[own], retrieval.corpus[document]
            row |= {"text": texts[0], "document": document, "document_text": texts[1]}
            encoders = [self._encoder(each.paths[0]) for each in (first, side)]
            row["matches"] = [
                None if encoder is None else [asdict(match) for match in matches(encoder, *texts, retrieval)]
                for encoder in encoders
            ]
        return rows

    def _texts(self, path: Path) -> dict[str, tuple[RetrievalSet, str]]:
        """The set that each query is of, and its id there, by its id in the scores."""
        sets, result = named_sets(config_of(path).data), _folder(path) / RESULT
        scored = json.loads(result.read_text(encoding="utf-8")).get("set") if result.is_file() else None
        # An evaluation has scored one set, and a run all that it mixes, with their names before the ids.
        sets = {name: each for name, each in sets.items() if name == scored} or sets
        asked = dict[str, tuple[RetrievalSet, str]]()
        for name, each in sets.items():
            retrieval, _ = load_evaluation(name, each)
            if retrieval is not None:
                named = f"{name}/" if len(sets) > 1 else ""
                asked |= {f"{named}{query}": (retrieval, query) for query in retrieval.judgements}
        if missing := [query for query in self._first.values if query not in asked]:
            raise ConfigError(f"its data has none of {len(missing):,} of the queries, first {missing[0]}")
        return asked

    def _try(self, what: str, path: Path, load: Any) -> Any:
        try:
            return load()
        except ConfigError as error:
            problem = str(error)
        except (HydraException, OmegaConfBaseException) as error:
            problem = explain_composition(error, CONFIGS)
        self._problems[f"{what} {path}"] = f"{what} of {path}: {problem}"
        return None


def config_of(path: Path) -> Config:
    """The config of a training run, or what an evaluation was given as one. Raises ConfigError where there is none."""
    path = _folder(path)
    if (path / CONFIG).is_file():
        composed = OmegaConf.load(path / CONFIG)
        return parse_config(composed)  # type: ignore[arg-type]  # a run's config is no list
    if not (path / RESULT).is_file():
        raise ConfigError(f"it has neither {CONFIG} nor {RESULT}")
    result = json.loads((path / RESULT).read_text(encoding="utf-8"))
    return compose_config(result["model"], *result.get("model_overrides", []), *result["data"])


def load_encoder(path: Path) -> MultiVectorEncoder:
    """The model of a run. Raises ConfigError where it cannot be loaded."""
    if path.is_file() and path.name != SCORES:
        raise ConfigError("no model is beside a file of scores, unless it is the folder's own")
    config, path = config_of(path), _folder(path)
    if (path / CONFIG).is_file():
        trusted = str(config.backbone.trust_remote_code).lower()
        encoder = load_model(str(path / MODEL), f"backbone.trust_remote_code={trusted}")
    else:
        torch.manual_seed(config.seed)  # a new head is the one that was scored
        encoder = build_model(config)
    return encoder.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else encoder


def matches(encoder: MultiVectorEncoder, query: str, document: str, retrieval: RetrievalSet) -> list[Match]:
    """What each token of the query that is scored adds to MaxSim, and the first document token that gives it;
    nothing where no token of the document is scored. retrieval: the set of both, whose prefixes and lengths they have.
    """
    (tokens, vectors), (document_tokens, document_vectors) = (
        _scored(encoder, query, "query", retrieval),
        _scored(encoder, document, "document", retrieval),
    )
    if not document_tokens:
        return []
    similarities, winners = (vectors @ document_vectors.T).max(dim=1)
    return [
        Match(token, document_tokens[winner], similarity)
        for token, winner, similarity in zip(tokens, winners.tolist(), similarities.tolist(), strict=True)
    ]


def _scored(
    encoder: MultiVectorEncoder, text: str, task: Task, retrieval: RetrievalSet
) -> tuple[list[str], torch.Tensor]:
    """The tokens of a text that are scored, and their vectors (tokens, width)."""
    [features] = encode(encoder, [text], retrieval, task, output_value=None)
    mask = features["attention_mask"].bool()
    tokens = encoder.tokenizer.convert_ids_to_tokens(features["input_ids"][mask].tolist())
    return tokens, features["token_embeddings"][mask].float()


def letter(number: int) -> str:
    """A, B, ... as a table calls the sides."""
    return chr(ord("A") + number) if number < 26 else f"run {number + 1}"


def print_comparisons(
    console: Console, metric: str, sides: Sequence[Side], comparisons: Sequence[dict[str, Any]]
) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", metric, f"to {letter(0)}", "95 % interval", "p", "p, Holm", "wins", "ties", "losses"):
        table.add_column(column, justify="right" if column else "left")
    for number, side in enumerate(sides):
        console.print(f"{letter(number)}  {side.name}")
        cells = [letter(number), f"{fmean(side.values.values()):.4f}"]
        if number:
            own = comparisons[number - 1]
            cells += [f"{own['difference']:+.4f}", f"{own['low']:+.4f} to {own['high']:+.4f}"]
            cells += [p_text(own["p"]), p_text(own["p_holm"]), *(f"{own[key]:,}" for key in ("wins", "ties", "losses"))]
        table.add_row(*cells)
    console.print()
    console.print(table)
    console.print(
        f"{len(sides[0].values):,} queries; interval: paired bootstrap; p: paired randomisation test; both over the "
        "queries"
    )
    if all(len(side.paths) == 1 for side in sides):
        console.print("one seed a side: nothing is said of other seeds; compare [[A1,A2],[B1,B2]]")
    console.print()


def print_queries(console: Console, rows: Sequence[dict[str, Any]], *, names: tuple[str, str]) -> None:
    """Print queries that differ, and the tokens that matched. names: of the two sides."""
    for row in rows:
        scores = "  ".join(f"{name} {score:.4f}" for name, score in zip(names, row["scores"], strict=True))
        console.print(f"{row['difference']:+.4f}  {scores}  query {row['query']}  {row.get('text', '')}")
        if "document" not in row:
            continue
        text = " ".join(row["document_text"].split())
        console.print(f"document {row['document']}  {text[:SHOWN]}{' ...' if len(text) > SHOWN else ''}")
        sides = [(name, found) for name, found in zip(names, row["matches"], strict=True) if found is not None]
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, _ in sides:
            for column in (f"{name}: token", "matches", "similarity"):
                table.add_column(column, justify="right" if column == "similarity" else "left")
        for line in zip_longest(*(shorten(found) for _, found in sides)):
            cells = [
                (match["token"], match["document_token"], f"{match['similarity']:.3f}") if match else ("", "", "")
                for match in line
            ]
            table.add_row(*(cell for of_side in cells for cell in of_side))
        if sides:
            sums = [("sum", "", f"{sum(match['similarity'] for match in found):.3f}") for _, found in sides]
            table.add_row(*(cell for of_side in sums for cell in of_side), style="bold")
            console.print(table)
        console.print()


def shorten(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The matches as a table shows them: those of repeated tokens without letters of their own, as the mask tokens that
    fill a query up are, in one line with the sum of what they add."""
    lines: list[dict[str, Any]] = []
    counts = Counter(match["token"] for match in found)
    summed: dict[str, dict[str, Any]] = {}
    for match in found:
        token = match["token"]
        if counts[token] < 2 or not (token.startswith(("[", "<")) and token.endswith(("]", ">"))):
            lines.append(match)
        elif token in summed:
            summed[token]["similarity"] += match["similarity"]
        else:
            summed[token] = match | {"token": f"{counts[token]} {token}", "document_token": ""}
            lines.append(summed[token])
    return lines


def write(path: Path, options: Options, sides: Sequence[Side], comparisons: Sequence[dict[str, Any]]) -> None:
    """Raises ConfigError where the file cannot be written."""
    runs = [{"runs": [str(each) for each in side.paths], "mean": fmean(side.values.values())} for side in sides]
    text = json.dumps(
        {"metric": options.metric, "queries": len(sides[0].values), "runs": runs, "comparisons": comparisons}, indent=2
    )
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output={path} cannot be written: {error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
