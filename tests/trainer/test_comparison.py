"""Groups of a sweep against means, deviations and tests of the same scores by hand; folders are made, not run."""

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from rich.console import Console
from scipy.stats import permutation_test

from configs.schema import Config, parse_config, save_config
from tests.conftest import ROOT, tiny_overrides
from trainer.comparison import Group, compare_groups, explain_groups, p_text, print_groups, write_groups
from trainer.metrics import write_scores
from trainer.run_folder import SCORES
from trainer.significance import change_interval, holm
from trainer.sweep import Job, job_name, report

Compose = Callable[..., Config]
Scores = dict[str, float]
QUERIES = 40
RESULT = {
    "seconds": 12.5,
    "evaluation_id": 7,
    "head_parameters": 4096,
    "embedding_size": 128,
    "queries_per_second": 10.0,
    "peak_memory_bytes": 2_000_000_000,
}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "head-seed-0123abcd"
    folder.mkdir()
    return folder


def draw(seed: int, shift: float = 0.0) -> Scores:
    """Scores by query: what is hard is so for all."""
    hardness = np.random.default_rng(0).uniform(0.3, 0.6, QUERIES)
    noise = np.random.default_rng(seed).normal(scale=0.05, size=QUERIES)
    return {f"q{number}": float(value) for number, value in enumerate(hardness + noise + shift)}


class Jobs:
    """Leaves jobs in the folder of a sweep as runs and `run_job` do."""

    def __init__(self, sweep: Path, compose_once: Compose) -> None:
        self.sweep, self.compose_once, self.count = sweep, compose_once, 0

    def config(self, overrides: Sequence[str]) -> Config:
        seed = next(int(each.removeprefix("seed=")) for each in overrides if each.startswith("seed="))
        return replace(self.compose_once(*(each for each in overrides if not each.startswith("seed="))), seed=seed)

    def leave(
        self,
        *overrides: str,
        values: Scores | None,
        name: str = "test",
        last: bool = True,
        **result: Any,
    ) -> str:
        """A finished job; last: one of the last command. values: None where it evaluates nothing."""
        config = replace(self.config(overrides), name=name)
        folder = self.sweep / job_name(config)
        folder.mkdir()
        save_config(config, str(folder / "config.yaml"))
        # In the order in which they are left, however fast that is.
        os.utime(folder / "config.yaml", ns=(self.count, self.count))
        after = None if values is None else {"ndcg@10": fmean(values.values())}
        (folder / "result.json").write_text(json.dumps(RESULT | {"after": after} | result))
        if values is not None:
            zeros = dict.fromkeys(values, 0.0)
            write_scores(folder / SCORES, {"ndcg@10": values, "map": zeros})
        typed = list(overrides)
        (self.sweep / f"{folder.name}.log").write_text(
            f"$ accelerate launch /home/me/train.py {' '.join(typed)} 'output_dir='\"'\"'x'\"'\"'' tracker.group=a\n"
        )
        if last:
            report(self.sweep, Job(self.count, folder.name, typed, "finished", 0.5, 12.5))
        self.count += 1
        return folder.name

    def fail(self, *overrides: str, error: str) -> str:
        name = job_name(self.config(overrides))
        report(self.sweep, Job(self.count, name, list(overrides), "failed", None, 1.0, error))
        self.count += 1
        return name


@pytest.fixture(scope="module")
def compose_once(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Compose:
    """The same config, which takes a while to compose, for all seeds and tests."""

    @cache
    def composed(*overrides: str) -> Config:
        ConfigStore.instance().store("schema", Config)
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            tiny = tiny_overrides(tiny_bert, tmp_path_factory.getbasetemp())
            return parse_config(compose("train", [*tiny, *overrides]))

    return composed


@pytest.fixture
def jobs(sweep: Path, compose_once: Compose) -> Jobs:
    return Jobs(sweep, compose_once)


SHIFTS = {"linear": 0.0, "mlp": 0.03, "deep": -0.002}


@dataclass(frozen=True)
class Nine:
    """Three heads with three seeds each, typed as a sweep orders them."""

    sweep: Path
    scores: list[list[Scores]]
    groups: list[Group]


@pytest.fixture(scope="module")
def nine(compose_once: Compose, tmp_path_factory: pytest.TempPathFactory) -> Nine:
    sweep = tmp_path_factory.mktemp("nine")
    jobs = Jobs(sweep, compose_once)
    scores = [[draw(10 * number + seed, shift) for seed in (1, 2, 3)] for number, shift in enumerate(SHIFTS.values())]
    for head, of_seeds in zip(SHIFTS, scores, strict=True):
        for seed, own in enumerate(of_seeds, start=1):
            jobs.leave("trainer.steps=3", f"head={head}", f"seed={seed}", values=own, queries_per_second=10.0 * seed)
    groups, reasons = compare_groups(sweep)
    assert reasons == {}
    return Nine(sweep, scores, groups)


def test_groups_are_the_jobs_that_differ_in_their_seed_alone_as_typed(nine: Nine) -> None:
    groups = nine.groups
    assert [group.name for group in groups] == ["head=linear", "head=mlp", "head=deep"]
    assert [group.seeds for group in groups] == [[1, 2, 3]] * 3
    assert len({name for group in groups for name in group.jobs}) == 9
    for group, values in zip(groups, nine.scores, strict=True):
        assert group.scores == [fmean(own.values()) for own in values]
        assert (group.mean, group.sd) == (fmean(group.scores), stdev(group.scores))
        assert (group.parameters, group.bytes_per_token) == (4096, 256)
        assert (group.queries_per_second, group.peak_memory_bytes) == (20.0, 2_000_000_000)
        assert json.loads((nine.sweep / group.jobs[1] / "result.json").read_text())["queries_per_second"] == 20.0


def test_differences_are_those_of_scores_averaged_over_seeds_by_query(nine: Nine) -> None:
    averaged = [np.mean([list(own.values()) for own in values], axis=0) for values in nine.scores]
    first, *others = nine.groups
    assert [getattr(first, key) for key in ("difference", "low", "high", "p", "p_holm")] == [None] * 5
    for group, values in zip(others, averaged[1:], strict=True):
        differences = values - averaged[0]
        assert group.difference == pytest.approx(differences.mean(), abs=1e-12)
        assert (group.low, group.high) == pytest.approx(change_interval(list(averaged[0]), list(values)))
        drawn = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=9999, rng=1)
        assert group.p == pytest.approx(float(drawn.pvalue), abs=0.015)
    p_values = [group.p for group in others if group.p is not None]
    assert [group.p_holm for group in others] == holm(p_values)
    # The planted difference is found, and that which is none is not.
    assert p_values[0] < 0.001
    assert p_values[1] > 0.05


def test_a_group_against_a_repetition_of_the_first_has_p_1(jobs: Jobs, sweep: Path) -> None:
    for head in ("linear", "mlp"):
        jobs.leave(f"head={head}", "seed=1", values=draw(1))
    again = compare_groups(sweep)[0][1]
    assert (again.difference, again.low, again.high, again.p, again.p_holm) == (0.0, 0.0, 0.0, 1.0, 1.0)


def test_jobs_of_earlier_commands_come_first_and_are_named_by_their_logs(jobs: Jobs, sweep: Path) -> None:
    jobs.leave("head=mlp", "seed=1", values=draw(1), last=False)
    jobs.leave("head=linear", "seed=1", values=draw(2), last=False)
    jobs.leave("head=mlp", "seed=2", values=draw(3), last=False)
    jobs.leave("head=deep", "seed=1", values=draw(4))
    groups, _ = compare_groups(sweep)
    assert [(group.name, group.seeds) for group in groups] == [
        ("head=mlp", [1, 2]),
        ("head=linear", [1]),
        ("head=deep", [1]),
    ]


def test_without_what_was_typed_groups_are_named_by_the_keys_that_differ(jobs: Jobs, sweep: Path) -> None:
    for rate in ("1e-4", "1e-3"):
        for seed in (1, 2):
            jobs.leave(f"optimizer.learning_rate={rate}", f"seed={seed}", values=draw(seed), last=False)
    for log in sweep.glob("*.log"):
        log.unlink()
    assert [group.name for group in compare_groups(sweep)[0]] == [
        "optimizer.learning_rate=0.0001",
        "optimizer.learning_rate=0.001",
    ]


def test_seeds_alone_are_one_group(jobs: Jobs, sweep: Path) -> None:
    for seed in (2, 1):
        jobs.leave(f"seed={seed}", values=draw(seed))
    [group], _ = compare_groups(sweep)
    assert (group.name, group.seeds) == ("all jobs", [1, 2])
    assert list(explain_groups([group]))[1:] == [
        "one row: there is nothing to compare it to; sweep another key, as in head=linear,mlp"
    ]


def test_how_jobs_are_launched_and_shown_makes_no_groups(jobs: Jobs, sweep: Path) -> None:
    jobs.leave("seed=1", values=draw(1))
    jobs.leave("seed=2", "tracker=wandb", "sweep.launch=python", "overwrite=true", values=draw(2), name="other")
    assert [group.seeds for group in compare_groups(sweep)[0]] == [[1, 2]]


def test_what_cannot_be_compared_is_named_and_left_out(jobs: Jobs, sweep: Path) -> None:
    first = jobs.leave("seed=1", values=draw(1))
    failed = jobs.fail("head=mlp", "seed=1", error="no space left")
    silent = jobs.leave("head=mlp", "seed=2", values=None)
    other = {f"q{number}": 0.5 for number in range(2, QUERIES + 1)}
    asked = jobs.leave("head=mlp", "seed=3", values=other)
    texts = jobs.leave("head=mlp", "seed=4", values=draw(4), evaluation_id=8)
    metric = jobs.leave("evaluation.metric=map", "seed=5", values=draw(5))
    twice = jobs.leave("seed=1", values=draw(1), name="another")
    older = jobs.leave("seed=6", values=draw(6))
    (sweep / older / SCORES).unlink()
    broken = jobs.leave("seed=7", values=draw(7))
    (sweep / broken / SCORES).write_text('{"query": "q0", "ndcg@10": NaN}\n')
    begun = jobs.leave("seed=8", values=draw(8), last=False)
    (sweep / begun / "result.json").unlink()
    groups, reasons = compare_groups(sweep)
    assert [group.jobs for group in groups] == [[first]]
    assert reasons == {
        begun: "not finished",
        failed: "failed: no space left",
        silent: "scored on nothing: data.evaluation_fraction, evaluation_split or evaluation_path holds out",
        asked: f"scored on other queries than {first}: 39 queries, 1 that the other lacks, first q40 and none of 2 of "
        "the other's, first q0",
        texts: f"scored on queries of other texts than {first}",
        metric: f"scored by map, {first} by ndcg@10",
        twice: f"the same as {first} but for its name",
        older: f"there is no {sweep / older / SCORES}: an earlier version ran it; rerun={sweep / older} repeats it",
        broken: f"{sweep / broken / SCORES}:1: query=q0 has ndcg@10=nan, which must be a finite number",
    }


def printed(groups: list[Group]) -> list[str]:
    output = io.StringIO()
    print_groups(groups, Console(file=output, width=200, markup=False))
    return [" ".join(line.split()) for line in output.getvalue().splitlines()]


def test_the_table_shows_a_row_a_group(nine: Nine) -> None:
    groups = nine.groups
    header, *lines = printed(groups)
    assert header == ("seeds score sd difference 95 % interval p p, Holm parameters bytes/token queries/s peak memory")
    first, mlp, _ = groups
    cost = "4,096 256 20.0 2.00 GB"
    assert lines[0] == f"head=linear 3 {first.mean:.4f} {first.sd:.4f} {cost}"
    assert lines[1] == (
        f"head=mlp 3 {mlp.mean:.4f} {mlp.sd:.4f} {mlp.difference:+.4f} {mlp.low:+.4f} to {mlp.high:+.4f} "
        f"{p_text(mlp.p)} {p_text(mlp.p_holm)} {cost}"
    )
    assert lines[3:] == [
        "score: evaluation.metric of the last model, mean over seeds",
        "difference: to head=linear, over the queries, each scored by the mean over seeds; interval: paired bootstrap; "
        "p: paired randomisation test, 99,999 drawings; Holm: over 2 of them",
        "interval and p say how other queries might turn out; how other seeds might, sd",
    ]


def test_one_seed_has_no_deviation_and_the_table_says_what_is_missing(jobs: Jobs, sweep: Path) -> None:
    for head in SHIFTS:
        jobs.leave(f"head={head}", "seed=1", values=draw(1))
    groups, _ = compare_groups(sweep)
    assert [group.sd for group in groups] == [None] * 3
    assert printed(groups)[-1] == "one seed a row: nothing is said of other seeds; add seed=1,2,3"
    jobs.leave("head=linear", "seed=2", values=draw(2))
    jobs.leave("head=linear", "seed=3", values=draw(3))
    jobs.leave("head=mlp", "seed=3", values=draw(4))
    assert printed(compare_groups(sweep)[0])[-2:] == [
        "one seed of head=deep: nothing is said of other seeds; add seed=1,2,3",
        "head=mlp has the seeds 1, 3, head=linear 1, 2, 3",
    ]


def test_no_score_is_said(sweep: Path) -> None:
    assert compare_groups(sweep)[0] == []
    assert printed([]) == ["no job has a score to compare"]


def test_a_p_that_is_small_is_not_shown_as_0() -> None:
    assert [p_text(p) for p in (None, 1.0, 0.0312, 1e-4, 1e-5)] == ["", "1.0000", "0.0312", "0.0001", "<0.0001"]


def test_the_csv_holds_every_digit_and_every_seed(nine: Nine, tmp_path: Path) -> None:
    groups = nine.groups
    write_groups(groups, tmp_path / "groups.csv")
    with (tmp_path / "groups.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(asdict(groups[0]))
    assert [row["name"] for row in rows] == ["head=linear", "head=mlp", "head=deep"]
    assert rows[0]["p"] == ""
    for row, group in zip(rows, groups, strict=True):
        assert [float(score) for score in row["scores"].split()] == group.scores
        assert (row["seeds"], row["jobs"]) == ("1 2 3", " ".join(group.jobs))
        assert float(row["sd"]) == group.sd
        assert (float(row["p"]) if row["p"] else None) == group.p
