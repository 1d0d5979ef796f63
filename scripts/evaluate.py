"""Score a model: rank the whole corpus for every query, exactly, or re-rank a run.

    python scripts/evaluate.py model=outputs/<name>/model data=beir data.path=scifact data.split=test output_dir=scores
    python scripts/evaluate.py model=colbertv2 data=scifact,nfcorpus output_dir=scores
    python scripts/evaluate.py model=colbertv2 data=scifact candidates=bm25.trec output_dir=reranked
    python scripts/evaluate.py model=colbertv2 benchmark=beir sets=scifact,fiqa output_dir=beir
    python scripts/evaluate.py model=bm25 data=scifact output_dir=bm25
    accelerate launch --multi_gpu scripts/evaluate.py model=outputs/<name>/model benchmark=nanobeir output_dir=nano

model= is a folder, a Hub name or a member of configs/backbone, or bm25 (pip install -e ".[mining]"), whose run.trec may
be ranked again by another; keys of data, backbone and head are those of train.py.
What is scored is what a run with these keys is scored on, of data.mix each set by itself. Of a BEIR folder
data.evaluation_split names the judgements, and data.split alone does as well, since nothing is trained on.
benchmark=beir or nanobeir takes the public sets, or those of sets=, from folders of their names under data.root, else
from the Hub, and puts nDCG@10 beside published figures (scripts/benchmarks.yaml). Prompts of a model that its files do
not hold are data.query_prefix='"[Q] search_query: "' and data.document_prefix=. candidates= is a TREC run whose
documents are ranked again.

batch_size=32 texts are encoded at once, and the vectors of block=512 texts of documents are held at once;
device=cpu or cuda, else the accelerator that there is; precision=float32, bf16 or fp16. Into output_dir, of several
sets into output_dir/<set>, go run.trec (1,000 documents a query), scores.jsonl (each query's metrics) and result.json;
overwrite=true replaces them. The same files come from any number of processes with as many threads each. The results
are printed as a table, and in the last line as JSON, by set where there are several. The status is 2 where a set could
not be scored.
"""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets
import torch
from accelerate import Accelerator
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from sentence_transformers import MultiVectorEncoder

from architectures.layouts import read_checkpoint
from configs.mix import spell_mix
from configs.reference import explain_composition
from configs.schema import Config, ConfigError, DataFormat, Metric, Precision, SetConfig, assignment
from scripts.bm25 import rank_by_bm25
from scripts.models import CONFIGS, build_model, compose_config
from scripts.options import read_options, split_arguments
from trainer.console import fail, make_console
from trainer.data import load_evaluation
from trainer.data.files import find
from trainer.data.retrieval import RetrievalSet
from trainer.data.trec import unfit_id, with_candidates, write_run
from trainer.display import counting, print_facts
from trainer.environment import versions
from trainer.evaluation import BLOCK_DOCUMENTS, Ranking, rank
from trainer.metrics import DEPTH, means, score_rankings, write_scores
from trainer.plan import build_accelerator

# What model= names where no model is asked for.
BM25 = "bm25"
BENCHMARKS = Path(__file__).with_name("benchmarks.yaml")
RUN, SCORES, RESULT = "run.trec", "scores.jsonl", "result.json"
UNFINISHED = ".unfinished"
# Parts of a config that an evaluation reads.
READ = ("backbone", "head", "data", "seed")
# Keys of data that a benchmark leaves open.
OF_BENCHMARKS = tuple(
    f"data.{name}" for name in ("root", "query_prefix", "document_prefix", "query_length", "document_length")
)


@dataclass
class Options:
    """What the script takes beside keys of data, backbone and head."""

    model: str = ""
    output_dir: str = ""
    candidates: str | None = None
    benchmark: str | None = None
    sets: str | None = None
    """Names of a benchmark's sets, with commas between."""
    batch_size: int = 32
    block: int = BLOCK_DOCUMENTS
    device: str | None = None
    precision: Precision = Precision.float32
    overwrite: bool = False


@dataclass(frozen=True)
class Job:
    """One set that is scored."""

    name: str
    data: list[str]
    """The keys of data, as on the command line of train.py."""
    model: list[str]
    """Other keys of that command line: those of the model."""
    config: Config
    set: SetConfig
    folder: Path


def main(arguments: Sequence[str]) -> int:
    """Score the sets one after the other; one that cannot be scored leaves the others."""
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0
    try:
        options, overrides = parse(list(arguments))
        jobs = compose_jobs(options, overrides)
        check(options, jobs)
        datasets.disable_progress_bars()
        accelerator = build_accelerator(jobs[0].config, on_cpu=options.device == "cpu", program="scripts/evaluate.py")
        command = shlex.join(["python", "scripts/evaluate.py", *arguments])
        return score_all(options, jobs, accelerator, command=command)
    except ConfigError as error:
        return fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return fail(explain_composition(error, CONFIGS))


def parse(arguments: list[str]) -> tuple[Options, list[str]]:
    """The options, and what is left for the config. Raises ConfigError for a value that cannot be."""
    given, overrides = split_arguments(Options, spell_mix(arguments))
    options = read_options(Options, {key: None if value == "null" else value for key, value in given.items()})
    chosen = [override for override in overrides if override.startswith("data=")]
    problems = {
        "model= is missing: give one folder, Hub name or member of configs/backbone": not options.model,
        "output_dir= is missing: give the folder that the scores go to": not options.output_dir,
        "data= is missing: give a member of configs/data, or a benchmark=": not chosen and options.benchmark is None,
        f"{' '.join(chosen)}: give benchmark= or data= and this once, with commas between sets": (
            len(chosen) + (options.benchmark is not None) > 1
        ),
        f"sets={options.sets} are those of a benchmark: give benchmark= as well": (
            options.sets is not None and options.benchmark is None
        ),
        f"batch_size={options.batch_size} must be 1 or more": options.batch_size < 1,
        f"block={options.block} must be 1 or more": options.block < 1,
        f"device={options.device} must be cpu or cuda": options.device not in (None, "cpu", "cuda"),
        "device=cuda: this machine has no GPU that torch can use: leave it out, or give device=cpu": (
            options.device == "cuda" and not torch.cuda.is_available()
        ),
        "model=bm25 ranks the whole corpus: leave candidates= out": (
            options.model == BM25 and options.candidates is not None
        ),
        "precision=fp16 needs a GPU: use float32 or bf16": (
            options.precision is Precision.fp16 and (options.device == "cpu" or not torch.cuda.is_available())
        ),
    }
    for problem, holds in problems.items():
        if holds:
            raise ConfigError(problem)
    return options, overrides


def compose_jobs(options: Options, overrides: list[str]) -> list[Job]:
    """The sets that are scored. Raises ConfigError for a key that there is not, or that has no effect."""
    read_nowhere = {field.name for field in fields(Config)} - set(READ)
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        if key.partition(".")[0] in read_nowhere:
            raise ConfigError(f"{override} has no effect on a score: give keys of {', '.join(READ)}")
    of_data = [override for override in overrides if override.lstrip("+").startswith("data.")]
    sets = benchmark_sets(options, of_data) if options.benchmark is not None else {}
    for chosen in overrides:
        if chosen.startswith("data="):
            sets |= {name: [f"data={name}", *of_data] for name in chosen.removeprefix("data=").split(",")}
    other = [override for override in overrides if not override.lstrip("+").startswith(("data=", "data."))]
    composed = list[tuple[str, list[str], Config, SetConfig]]()
    for name, data in sets.items():
        config = compose_config(options.model, f"trainer.precision={options.precision.name}", *other, *data)
        typed = [override.partition("=")[0] for override in data]
        if config.data.format is DataFormat.beir and "data.split" in typed and "data.evaluation_split" not in typed:
            data = [override.replace("data.split=", "data.evaluation_split=", 1) for override in data]
            config.data = replace(config.data, evaluation_split=config.data.split)
        composed += [(own, data, config, each) for own, each in (config.data.sets or {name: config.data}).items()]
    folder = Path(options.output_dir)
    jobs = [
        Job(name, data, other, config, each, folder / name if len(composed) > 1 else folder)
        for name, data, config, each in composed
    ]
    if options.candidates is not None and len(jobs) > 1:
        raise ConfigError(f"candidates={options.candidates} is a run for one set, and {len(jobs)} are scored: name one")
    return jobs


def benchmarks() -> dict[str, Any]:
    """What scripts/benchmarks.yaml says, by benchmark."""
    read = OmegaConf.to_container(OmegaConf.load(BENCHMARKS))
    assert isinstance(read, dict)
    return {str(name): benchmark for name, benchmark in read.items()}


def benchmark_sets(options: Options, of_data: list[str]) -> dict[str, list[str]]:
    """The keys of data of each set that a benchmark names, by its name; of_data: those that were typed."""
    known = benchmarks()
    if options.benchmark not in known:
        raise ConfigError(_nearest("benchmark", str(options.benchmark), list(known)))
    benchmark = known[options.benchmark]
    if typed := [override for override in of_data if override.partition("=")[0] not in OF_BENCHMARKS]:
        raise ConfigError(
            f"{' '.join(typed)}: benchmark={options.benchmark} says what its sets are: give of data only "
            f"{', '.join(OF_BENCHMARKS)}, or the set by data= and not as part of a benchmark"
        )
    root = compose_config(options.model, "data=beir", "data.path=none", *of_data).data.root
    found = {}
    for name in options.sets.split(",") if options.sets else benchmark["sets"]:
        if name not in benchmark["sets"]:
            raise ConfigError(_nearest("sets", name, benchmark["sets"]))
        path = name if Path(root, name).is_dir() else benchmark["hub"].format(name=name)
        found[name] = [
            *("data=beir", assignment("data.path", path), f"data.evaluation_split={benchmark['split']}"),
            *(["data.ignore_identical_ids=true"] if name in benchmark["ignore_identical_ids"] else []),
            *of_data,
        ]
    return found


def _nearest(key: str, given: str, known: list[str]) -> str:
    nearest = get_close_matches(given, known, n=1, cutoff=0.0)[0]
    return f"{key}={given} is none; the nearest is {nearest}, of {', '.join(known)}"


def check(options: Options, jobs: list[Job]) -> None:
    """Raise ConfigError where an output folder may not be written, or where candidates are not there."""
    for job in jobs:
        asked = f"output_dir={job.folder}"
        if job.folder.exists() and not job.folder.is_dir():
            raise ConfigError(f"{asked} is a file: name a folder")
        if (job.folder / "config.yaml").exists():
            raise ConfigError(f"{asked} is the folder of a training run: name another one")
        held = [name for name in (RESULT, RUN, SCORES) if (job.folder / name).exists()]
        if held and not options.overwrite:
            raise ConfigError(f"{asked} holds a result ({', '.join(held)}): name another folder, or set overwrite=true")
    if options.candidates is not None:
        find("candidates", options.candidates, jobs[0].config.data.root)


def score_all(options: Options, jobs: list[Job], accelerator: Accelerator, *, command: str) -> int:
    """Score each set and print what came of all. Every process calls it."""
    console = make_console(main=accelerator.is_main_process)
    results: dict[str, dict[str, Any]] = {}
    built: Config | None = None
    for job in jobs:
        try:
            if built is None or (built.backbone, built.head) != (job.config.backbone, job.config.head):
                encoder = None if options.model == BM25 else load(job.config, accelerator, console)
                built = job.config
            if result := score(encoder, job, options, accelerator, console, command=command):
                results[job.name] = result
        except ConfigError as error:
            if len(jobs) == 1 or built is None:  # without its model, no set can be scored
                raise
            if accelerator.is_main_process:
                print(f"error: {job.name}: {error}", file=sys.stderr)
    if results:
        print_results(console, options, results)
        print(json.dumps(results if len(jobs) > 1 else results[jobs[0].name]))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0 if len(results) == len(jobs) or not accelerator.is_main_process else 2


def load(config: Config, accelerator: Accelerator, console: Console) -> MultiVectorEncoder:
    """Build the model on its device, and say what it is."""
    checkpoint = read_checkpoint(config.backbone)
    torch.manual_seed(config.seed)  # a new head is the one that a run with this seed starts from
    encoder = build_model(config).to(accelerator.device)
    is_new = not checkpoint.has_head or config.head.layers or config.head.keep != "all"
    facts = {
        "model": f"{config.backbone.name}, {checkpoint.layout.value}",
        **({"head": f"new and untrained, drawn from seed={config.seed}"} if is_new else {}),
        "width": f"{encoder.get_embedding_dimension()}",
        "precision": f"{config.trainer.precision.name} on {accelerator.device.type}",
        "processes": f"{accelerator.num_processes}",
    }
    print_facts(console, facts)
    return encoder


def score(
    encoder: MultiVectorEncoder | None,
    job: Job,
    options: Options,
    accelerator: Accelerator,
    console: Console,
    *,
    command: str,
) -> dict[str, Any] | None:
    """Rank a set, write what came of it, and return what result.json holds, on the main process.

    encoder: None is BM25, by which the main process ranks alone. What is raised before the ranking is raised on every
    process, or they would wait for each other.
    """
    retrieval, warnings = load_evaluation(job.name, job.set)
    if retrieval is None:
        raise ConfigError(
            f"{job.name} has no example to score on: set data.evaluation_split, data.evaluation_path or "
            "data.evaluation_fraction"
        )
    if problem := unfit_id(retrieval):
        raise ConfigError(problem)
    if options.candidates is not None:
        retrieval = with_candidates(retrieval, find("candidates", options.candidates, job.config.data.root))
        assert retrieval.candidates is not None
        if without := sum(not own for own in retrieval.candidates.values()):
            warnings.append(f"{without:,} of {len(retrieval.queries):,} queries have no candidate and score 0")
    with _errors(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    for warning in warnings:
        console.print(f"warning: {warning}")
    started = time.perf_counter()
    ranking: Mapping[str, dict[str, float]] = {}
    if encoder is None and accelerator.is_main_process:
        ranking = rank_by_bm25(retrieval.queries, retrieval.corpus, depth=DEPTH + 1, asked=f"model={BM25}")
        ranking = {query: _without_itself(query, own, retrieval) for query, own in ranking.items()}
    elif encoder is not None:
        ranking = rank_by_model(encoder, job, retrieval, options, accelerator, console)
    seconds = time.perf_counter() - started
    if not accelerator.is_main_process:
        return None
    values = score_rankings(retrieval.judgements, ranking)
    queries = len(retrieval.queries)
    documents = len(retrieval.corpus if retrieval.candidates is None else set().union(*retrieval.candidates.values()))
    result = {
        "model": options.model,
        "model_overrides": job.model,
        "data": job.data,
        "set": job.name,
        "candidates": options.candidates,
        **means(values),
        "queries": queries,
        "documents": documents,
        "documents_per_second": documents / seconds,
        "queries_per_second": queries / seconds,
        "seconds": seconds,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "precision": options.precision.name,
        "versions": versions(),
        "command": command,
    }
    with _written(job.folder) as folder:
        write_run(folder / RUN, ranking, name="lateforge")
        write_scores(folder / SCORES, values)
        (folder / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def rank_by_model(
    encoder: MultiVectorEncoder,
    job: Job,
    retrieval: RetrievalSet,
    options: Options,
    accelerator: Accelerator,
    console: Console,
) -> Ranking:
    """Every process calls it."""
    with accelerator.autocast(), counting(console, f"{job.name}: documents ranked", line_seconds=10) as ranked:
        [ranking] = rank(
            encoder,
            retrieval,
            batch_size=options.batch_size,
            widths=(),
            block_documents=options.block,
            progress=ranked,
        ).values()
    return ranking


def _without_itself(query: str, ranking: dict[str, float], retrieval: RetrievalSet) -> dict[str, float]:
    """The best documents, without that of the query's own id where the set says so."""
    kept = [key for key in ranking if key != query or not retrieval.ignore_identical_ids][:DEPTH]
    return {key: ranking[key] for key in kept}


@contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files take their places once all are whole; result.json, the last, says so."""
    unfinished = folder / UNFINISHED
    with _errors(folder):
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            yield unfinished
            (folder / RESULT).unlink(missing_ok=True)
            for name in (RUN, SCORES, RESULT):
                (unfinished / name).replace(folder / name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"output_dir={folder} cannot be written ({error}): name another folder") from error


def print_results(console: Console, options: Options, results: dict[str, dict[str, Any]]) -> None:
    """Print the metrics of each set and, of a benchmark, published figures beside them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    metrics = [metric.name for metric in Metric]
    for column in ("", "queries", "documents", *metrics, "documents/s"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        scores = (f"{result[metric]:.4f}" for metric in metrics)
        speed = f"{result['documents_per_second']:,.1f}"
        table.add_row(name, f"{result['queries']:,}", f"{result['documents']:,}", *scores, speed)
    if len(results) > 1:
        scores = (f"{fmean(result[metric] for result in results.values()):.4f}" for metric in metrics)
        table.add_row("mean", "", "", *scores, "", style="bold")
    console.print(table)
    console.print()
    if options.benchmark is not None:
        print_published(console, benchmarks()[options.benchmark], options.model, results)


def print_published(
    console: Console, benchmark: dict[str, Any], model: str, results: dict[str, dict[str, Any]]
) -> None:
    """Print nDCG@10, times 100, beside each published model's, with the difference to it."""
    ours = {name: 100 * result["ndcg@10"] for name, result in results.items()}
    is_whole = set(ours) == set(benchmark["sets"])
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("100 x ndcg@10")
    for column in (model, *benchmark["published"]):
        table.add_column(column, justify="right", overflow="fold")

    def cell(score: float, figure: float | None) -> str:
        return "" if figure is None else f"{figure:.2f} ({score - figure:+.2f})"

    for name, score in ours.items():
        figures = (figures.get(name) for figures in benchmark["published"].values())
        table.add_row(name, f"{score:.2f}", *(cell(score, figure) for figure in figures))
    of_models = []
    for figures in benchmark["published"].values():
        common = [name for name in ours if name in figures]
        mean = figures.get("mean") if is_whole else None
        if len(common) == len(ours):
            mean = fmean(figures[name] for name in common)
        of_models.append(mean)
    score = fmean(ours.values())
    table.add_row("mean", f"{score:.2f}", *(cell(score, figure) for figure in of_models), style="bold")
    console.print(table)
    console.print("published figures, and in brackets how far this model is above them")
    if not is_whole:
        console.print(f"means are over these {len(ours)} of {len(benchmark['sets'])} sets")
    console.print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
