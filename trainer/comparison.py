"""The groups of a sweep, which differ in their seed alone, against the first of them."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from configs.schema import ConfigError, flat
from trainer.metrics import read_scores
from trainer.run_folder import CONFIG, RESULT, SCORES
from trainer.significance import RESAMPLES, Difference, compare_paired, holm
from trainer.sweep import NOT_HASHED, Job, read_jobs, typed_overrides

# What jobs of a group may have otherwise.
OF_A_JOB = ("seed", "name", *NOT_HASHED)
BYTES_PER_COMPONENT = 2  # float16


@dataclass(frozen=True)
class Group:
    """Jobs of a sweep that differ in their seed alone."""

    name: str
    """The overrides that tell groups apart, as "head=mlp"."""
    seeds: list[int]
    scores: list[float]
    """evaluation.metric of each seed's last model."""
    mean: float
    sd: float | None
    """Over seeds; None for one."""
    difference: float | None
    """To the first group: mean over queries of seed-averaged scores; None for the first."""
    low: float | None
    """95 % paired bootstrap interval of it over the queries."""
    high: float | None
    p: float | None
    """Paired randomisation test over the queries, two-sided."""
    p_holm: float | None
    """Holm-corrected over the groups."""
    parameters: int
    """Of the head."""
    bytes_per_token: int
    """Of the index: width of the vectors x 2 (float16)."""
    queries_per_second: float
    """Of training, mean over seeds."""
    peak_memory_bytes: int | None
    """Of training, largest over seeds, where the run measured it."""
    jobs: list[str]
    """Names of the job folders, by seed."""


@dataclass(frozen=True)
class _Scored:
    """A job and what it left."""

    name: str
    overrides: list[str] | None
    """What was typed for it, where that is known."""
    seed: int
    keys: dict[str, Any]
    """Every key of its config, by dotted name, but those of OF_A_JOB."""
    result: dict[str, Any]
    values: dict[str, float]
    """evaluation.metric by query."""


def compare_groups(sweep: Path) -> tuple[list[Group], dict[str, str]]:
    """Return the groups of the jobs that lie in the folder of a sweep and can be compared, in the order in which they
    were begun, those of the last command last and as it has them; and why other jobs are in no group, by name."""
    jobs, reasons = _scored_jobs(sweep)
    if not jobs:
        return [], reasons
    rows: dict[str, list[_Scored]] = {}
    for job in jobs:
        rows.setdefault(json.dumps(job.keys), []).append(job)
    jobs_of = [sorted(own, key=lambda job: job.seed) for own in rows.values()]
    averaged = [average(*(job.values for job in own)) for own in jobs_of]
    baseline = list(averaged[0].values())
    differences = [compare_paired(baseline, [values[query] for query in averaged[0]]) for values in averaged[1:]]
    corrected = holm([difference.p for difference in differences])
    first, *others = (_group(name, own) for name, own in zip(_names(jobs_of), jobs_of, strict=True))
    compared = map(_compared, others, differences, corrected)
    return [first, *compared], reasons


def average(*values: Mapping[str, float]) -> dict[str, float]:
    """The mean of each query's values, the same queries in all."""
    return {query: fmean(each[query] for each in values) for query in values[0]}


def other_queries(values: Mapping[str, float], others: Mapping[str, float]) -> str | None:
    """How the queries of the one differ from those of the other, in counts and the first id, or None."""
    alone, lacking = ([query for query in one if query not in two] for one, two in ((values, others), (others, values)))
    parts = [f"{len(alone):,} that the other lacks, first {alone[0]}"] if alone else []
    parts += [f"none of {len(lacking):,} of the other's, first {lacking[0]}"] if lacking else []
    return f"{len(values):,} queries, {' and '.join(parts)}" if parts else None


def print_groups(groups: Sequence[Group], console: Console) -> None:
    """Print the groups as a table, and how it is to be read."""
    if not groups:
        console.print("no job has a score to compare")
        return
    cells = group_cells(groups)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", overflow="fold")
    for column in cells:
        table.add_column(column, justify="right")
    for group, *row in zip(groups, *cells.values(), strict=True):
        table.add_row(group.name, *row)
    console.print(table)
    for line in explain_groups(groups):
        console.print(line)


def group_cells(groups: Sequence[Group]) -> dict[str, list[str]]:
    """What a table says of the groups, by column; what is not known is empty."""
    return {
        "seeds": [f"{len(group.seeds)}" for group in groups],
        "score": [f"{group.mean:.4f}" for group in groups],
        "sd": ["" if group.sd is None else f"{group.sd:.4f}" for group in groups],
        "difference": ["" if group.difference is None else f"{group.difference:+.4f}" for group in groups],
        "95 % interval": [
            "" if group.low is None or group.high is None else f"{group.low:+.4f} to {group.high:+.4f}"
            for group in groups
        ],
        "p": [p_text(group.p) for group in groups],
        "p, Holm": [p_text(group.p_holm) for group in groups],
        "parameters": [f"{group.parameters:,}" for group in groups],
        "bytes/token": [f"{group.bytes_per_token:,}" for group in groups],
        "queries/s": [f"{group.queries_per_second:.1f}" for group in groups],
        "peak memory": [
            "" if group.peak_memory_bytes is None else f"{group.peak_memory_bytes / 1e9:.2f} GB" for group in groups
        ],
    }


def explain_groups(groups: Sequence[Group]) -> Iterator[str]:
    """How a table of groups is to be read, and what it lacks, a sentence each."""
    yield "score: evaluation.metric of the last model, mean over seeds"
    if len(groups) > 1:
        yield (
            f"difference: to {groups[0].name}, over the queries, each scored by the mean over seeds; interval: paired "
            f"bootstrap; p: paired randomisation test, {RESAMPLES:,} drawings; Holm: over {len(groups) - 1} of them"
        )
        if any(len(group.seeds) > 1 for group in groups):
            yield "interval and p say how other queries might turn out; how other seeds might, sd"
    else:
        yield "one row: there is nothing to compare it to; sweep another key, as in head=linear,mlp"
    alone = [group.name for group in groups if len(group.seeds) == 1]
    if alone:
        which = "one seed a row" if len(alone) == len(groups) else f"one seed of {', '.join(alone)}"
        yield f"{which}: nothing is said of other seeds; add seed=1,2,3"
    for group in groups[1:]:
        if group.seeds != groups[0].seeds and group.name not in alone:
            yield f"{group.name} has the seeds {_listed(group.seeds)}, {groups[0].name} {_listed(groups[0].seeds)}"


def p_text(p: float | None) -> str:
    """A p as a table shows it: none is 0."""
    return "" if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def write_groups(groups: Sequence[Group], path: Path) -> None:
    """Write the groups as CSV, every digit; what a group has several of stands in one cell, with spaces between."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Group))
        for group in groups:
            writer.writerow(
                " ".join(map(str, value)) if isinstance(value, list) else value for value in asdict(group).values()
            )


def _scored_jobs(sweep: Path) -> tuple[list[_Scored], dict[str, str]]:
    """The jobs that can be compared, and why others cannot, by name."""
    last = {job.job: job for job in read_jobs(sweep)}
    begun = sorted(sweep.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime_ns)
    scored, reasons = list[_Scored](), dict[str, str]()
    for name in (*(path.parent.name for path in begun if path.parent.name not in last), *last):
        try:
            job = _read(sweep / name, last.get(name))
            _check_like(job, scored)
        except ConfigError as error:
            reasons[name] = str(error)
        else:
            scored.append(job)
    return scored, reasons


def _read(folder: Path, job: Job | None) -> _Scored:
    """Raises ConfigError where a job has no score."""
    if not (folder / RESULT).is_file():
        state = job.state if job is not None else "not finished"
        raise ConfigError(f"{state}: {job.error}" if job is not None and job.error else state)
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    if result["after"] is None:
        raise ConfigError("scored on nothing: data.evaluation_fraction, evaluation_split or evaluation_path holds out")
    if not (folder / SCORES).is_file():
        raise ConfigError(f"there is no {folder / SCORES}: an earlier version ran it; rerun={folder} repeats it")
    config = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
    assert isinstance(config, dict)
    values = flat({str(key): value for key, value in config.items()})
    keys = {key: value for key, value in values.items() if key.partition(".")[0] not in OF_A_JOB}
    scores = read_scores(folder / SCORES)[keys["evaluation.metric"]]
    overrides = job.overrides if job is not None else typed_overrides(folder.with_name(f"{folder.name}.log"))
    return _Scored(folder.name, overrides, config["seed"], keys, result, scores)


def _check_like(job: _Scored, scored: Sequence[_Scored]) -> None:
    """Raise ConfigError where a job cannot stand beside those before it."""
    if not scored:
        return
    first = scored[0]
    metric, others = (each.keys["evaluation.metric"] for each in (job, first))
    if metric != others:
        raise ConfigError(f"scored by {metric}, {first.name} by {others}")
    if problem := other_queries(job.values, first.values):
        raise ConfigError(f"scored on other queries than {first.name}: {problem}")
    if job.result["evaluation_id"] != first.result["evaluation_id"]:
        raise ConfigError(f"scored on queries of other texts than {first.name}")
    for other in scored:
        if (job.seed, job.keys) == (other.seed, other.keys):
            raise ConfigError(f"the same as {other.name} but for its name")


def _group(name: str, jobs: Sequence[_Scored]) -> Group:
    scores = [fmean(job.values.values()) for job in jobs]
    peaks = [job.result["peak_memory_bytes"] for job in jobs if job.result["peak_memory_bytes"] is not None]
    return Group(
        name=name,
        seeds=[job.seed for job in jobs],
        scores=scores,
        mean=fmean(scores),
        sd=stdev(scores) if len(scores) > 1 else None,
        difference=None,
        low=None,
        high=None,
        p=None,
        p_holm=None,
        parameters=jobs[0].result["head_parameters"],
        bytes_per_token=BYTES_PER_COMPONENT * jobs[0].result["embedding_size"],
        queries_per_second=fmean(job.result["queries_per_second"] for job in jobs),
        peak_memory_bytes=max(peaks, default=None),
        jobs=[job.name for job in jobs],
    )


def _compared(group: Group, difference: Difference, p_holm: float) -> Group:
    return replace(
        group, difference=difference.mean, low=difference.low, high=difference.high, p=difference.p, p_holm=p_holm
    )


def _names(groups: Sequence[Sequence[_Scored]]) -> list[str]:
    """What was typed for each group and not for all; where that does not tell them apart, the keys that differ."""
    typed = [
        [each for each in next((job.overrides for job in jobs if job.overrides), []) if _key(each) not in OF_A_JOB]
        for jobs in groups
    ]
    if len(groups) == 1:
        return [" ".join(typed[0]) or "all jobs"]
    common = set.intersection(*map(set, typed))
    names = [" ".join(each for each in overrides if each not in common) for overrides in typed]
    if all(names) and len(set(names)) == len(groups):
        return names
    keys = [jobs[0].keys for jobs in groups]
    differing = [key for key in keys[0] | keys[-1] if any(own.get(key) != keys[0].get(key) for own in keys)]
    return [" ".join(f"{key}={own.get(key)}" for key in differing) for own in keys]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition(".")[0]


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
