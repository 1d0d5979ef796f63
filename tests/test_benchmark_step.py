"""The benchmark of a training step against the peers: that they do the same, and what is said where they do not."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.utils.benchmark import Timer

from architectures.export import Format
from configs.schema import ConfigError
from scripts import benchmark_step as benchmark
from scripts import peer_trainer
from scripts.benchmark_step import OURS, Contest, Loss, Measured, Options
from scripts.peer_environments import PeerError
from tests.conftest import WORDS, type_here
from tests.trainer.made import to_set
from trainer.data import Data
from trainer.data.tables import with_texts
from trainer.phases import PHASES

pytestmark = pytest.mark.usefixtures("own_caches", "as_loud_as_before")

DONE = Measured(
    seconds=[9.0, 1.0, 3.0],
    losses=[2.0, 1.5, 1.0],
    tokens=[90, 100, 110],
    padded_tokens=[100, 150, 150],
    phases={},
    peak_memory_bytes=2**30,
    versions={"torch": "2.13.0"},
)


# Three documents a query, of many lengths.
ROWS: list[dict[str, Any]] = [
    {
        "query": f"what {one} is the {other}",
        "documents": [
            f"the {other}, {one} and {one} is that {other} {one}"[:size],
            f"no {one} is {other}, or {other}",
            f"{other} {size}",
        ],
    }
    for one in WORDS
    for other, size in zip(WORDS, range(12, 40, 2), strict=False)
]


def contest_of(tiny_bert: Path, folder: Path, loss: Loss, *, steps: int) -> Contest:
    options = Options(
        peers=["st"],
        model=str(tiny_bert),
        document_length=16,
        batch_size=4,
        negatives=2,
        loss=loss,
        mini_batch=3,
        warmup=0,
        steps=steps,
    )
    contest = Contest(options, "made", folder)
    rows = ROWS[: steps * options.batch_size]
    if loss is Loss.distillation:
        contest.write("given.jsonl", [row | {"scores": [1.5, -0.5, 0.25]} for row in rows])
    else:
        contest.write("given.jsonl", [benchmark.as_pair(**row) for row in rows])
    contest.write_weights(folder / "off", ["backbone.dropout=0"])
    contest.write_in_order(steps)
    in_order = [json.loads(line) for line in (folder / "in_order.jsonl").read_text().splitlines()]
    assert sorted(each["query"] for each in in_order) == sorted(row["query"] for row in rows)
    assert in_order != rows
    return contest


@pytest.mark.parametrize("loss", Loss)
def test_ours_and_sentence_transformers_lose_the_same_over_20_steps(
    loss: Loss, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_here(command: list[str], problem: str, **_: Any) -> None:
        """In this process, as each of its own would take seconds to import."""
        if command[1] == str(benchmark.TRAINER):
            peer_trainer.main(json.loads(command[2]))
        else:
            assert type_here(*command[2:]).returncode == 0, problem

    monkeypatch.setattr(benchmark, "run", run_here)
    contest = contest_of(tiny_bert, tmp_path, loss, steps=20)
    ours, theirs = (contest.train(trainer, tmp_path / "off", steps=20) for trainer in (OURS, "st"))
    assert benchmark.disagreement(ours, theirs) is None
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-4)
    assert ours.losses[-1] != pytest.approx(ours.losses[0], abs=1e-2)
    assert ours.tokens == theirs.tokens
    assert set(theirs.phases) == {"data", "encode and loss", "backward", "optimizer"}
    assert sum(theirs.phases.values()) == pytest.approx(sum(theirs.seconds) / 20, rel=1e-3)
    saved = yaml.safe_load((tmp_path / "out1" / "run" / "config.yaml").read_text())
    assert saved["loss"]["terms"]["distillation"] == float(loss is Loss.distillation)
    assert saved["trainer"]["cache_tokens"] == (48 if loss is Loss.cached else None)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (replace(DONE, losses=[2.0009, 9.0, 9.0]), None),
        (replace(DONE, losses=[2.002, 1.5, 1.0]), "its loss of the first step is 2.002000, and lateforge's 2.000000"),
        (replace(DONE, losses=[float("nan")] * 3), "its loss of the first step is nan, and lateforge's 2.000000"),
        (
            replace(DONE, tokens=[90, 100, 111]),
            "it read 90, 100, 111 document tokens a step, ",
        ),
    ],
)
def test_a_peer_that_does_something_else_is_found_out(theirs: Measured, message: str | None) -> None:
    assert str(benchmark.disagreement(DONE, theirs)).startswith(str(message))


class Scripted(Contest):
    """A contest whose trainers are not run."""

    def __init__(self, options: Options, folder: Path, measured: dict[str, Measured | str]) -> None:
        super().__init__(options, "made", folder)
        self.measured, self.trained = measured, list[str]()

    def write_weights(self, folder: Path, keys: list[str]) -> int:
        return 4 * 10**9

    def write_examples(self, *, steps: int) -> int:
        return 30

    def train_ours(self, weights: Path, out: Path, steps: int, *, profile: bool = False) -> Measured:
        phases = dict.fromkeys(PHASES, 0.5) if profile else {}
        return replace(self._train(OURS), phases=phases)

    def train_peer(self, trainer: str, weights: Path, out: Path, steps: int) -> Measured:
        return self._train(trainer)

    def _train(self, trainer: str) -> Measured:
        self.trained.append(trainer)
        found = self.measured[trainer]
        if isinstance(found, str):
            raise PeerError(found)
        return found


@pytest.mark.parametrize("rate", [None, 3.24e12])
def test_a_ratio_is_of_a_round_and_a_peer_that_failed_has_none(rate: float | None, tmp_path: Path) -> None:
    slow = replace(DONE, seconds=[1.0, 4.0, 4.0], padded_tokens=[200, 210, 210])
    contest = Scripted(
        Options(warmup=1, steps=2, rounds=2, batch_size=10), tmp_path, {OURS: DONE, "st": slow, "pylate": "no | memory"}
    )
    result, versions = contest.run()
    # First what all agree on; then in turn, without the one that failed; then where the time goes.
    assert contest.trained == [OURS, "st", "pylate", *[OURS, "st"] * 2, OURS]
    assert result["problems"] == {"pylate": "no | memory"}
    assert result["losses_apart"] == {"st": 0.0}
    ours, theirs = (result["trainers"][name] for name in (OURS, "st"))
    assert ours["queries_per_second"] == 10 * 2 / 4
    assert theirs["queries_per_second"] == 10 * 2 / 8
    assert theirs["ratio"] == 2
    assert theirs["document_tokens_per_second"] == 210 / 8
    assert (ours["padded_over_real"], theirs["padded_over_real"]) == (300 / 210, 2)
    assert result["phases"] == dict.fromkeys(PHASES, 0.5)
    assert result["operations"] == 6 * (105 + 30) * 4 * 10**9
    table = benchmark.table(
        {
            "options": {
                **{"precision": "float32", "batch_size": 10, "document_length": 180, "rounds": 2, "steps": 2},
                **{"model": "minilm", "loss": "distillation", "negatives": 3},
            },
            "matrix_rate": rate,
            "versions": versions,
            "sets": {"made": result},
            **{"machine": "a machine", "commit": "0123456789", "date": "2026-11-23", "command": "python ..."},
        }
    )
    assert "| made | lateforge | 5.00 |  | 52 | 1.43 | 1,024 MiB |" in table
    assert "| made | sentence-transformers | 2.50 | 2.00x | 26 | 2.00 | 1,024 MiB |" in table
    assert "| made | PyLate | not compared: no / memory | | | | |" in table
    assert "| backward | 0.500 |" in table
    # Half a step a second.
    assert ("| share of 3 TFLOP/s | 0.50 |" in table) == (rate is not None)
    assert ("share of" in table) == (rate is not None)
    assert "(a machine, float32, minilm, distillation, batches of 10 queries with 4 documents each, of at most" in table


def test_ours_must_not_fail(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="lateforge failed: no memory"):
        Scripted(Options(), tmp_path, {OURS: "lateforge failed: no memory", "st": DONE, "pylate": DONE}).run()


def test_the_table_takes_its_place_in_the_readme(tmp_path: Path) -> None:
    assert benchmark.updated("no region", tmp_path) == "no region"
    readme = f"before\n{benchmark.BEGIN}old\n{benchmark.END}after\n"
    assert benchmark.updated(readme, tmp_path) == f"before\n{benchmark.BEGIN}{benchmark.END}after\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["peers=[stanford]"], "peers=['stanford'] are none: give some of st, pylate"),
        (["device=tpu"], "device=tpu must be cpu or cuda"),
        (["steps=0"], "steps, rounds, agree, batch_size and mini_batch must be 1 or more, warmup and negatives 0 or"),
        (["loss=distillation"], "loss=distillation compares documents of one query: give negatives=1 or more"),
        (["loss=triplet"], "loss=triplet must be one of contrastive, cached, distillation"),
        (["precision=fp16"], "precision=fp16 is not compared: give float32 or bf16"),
        (["step=3"], "step is no key"),
        (["steps=many"], "steps=many must be of type integer"),
    ],
)
def test_a_mistake_gets_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_peers_trainer_knows_nothing_of_lateforge() -> None:
    source = Path(peer_trainer.__file__).read_text()
    for package in ("architectures", "configs", "losses", "scripts", "trainer"):
        assert f"from {package}" not in source
        assert f"import {package}" not in source


def test_no_two_pairs_have_one_query_or_one_document(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("what", "a cat"), ("what", "a dog"), ("which", "a cat"), ("that", "a fish"), ("is", "a dog")]
    examples = to_set([with_texts(f"made:{row}", query, [text]) for row, (query, text) in enumerate(rows)])
    monkeypatch.setattr(benchmark, "load_data", lambda config: Data([examples], {}))
    monkeypatch.setattr(Contest, "write_in_order", lambda contest, steps: None)
    contest = Contest(Options(model=str(tiny_bert), batch_size=3), "squad_sentences", tmp_path)
    contest.write_examples(steps=1)
    written = [json.loads(line) for line in (tmp_path / "given.jsonl").read_text().splitlines()]
    assert [tuple(row.values()) for row in written] == [rows[0], rows[3], rows[4]]
    with pytest.raises(ConfigError, match="squad_sentences has 3 different pairs, and the steps take 6"):
        contest.write_examples(steps=2)


@pytest.mark.parametrize(("loss", "negatives"), [(Loss.contrastive, 1), (Loss.distillation, 3)])
def test_a_negative_is_no_positive_and_a_teacher_scores_each(
    loss: Loss, negatives: int, tiny_bert: Path, tmp_path: Path
) -> None:
    options = Options(model=str(tiny_bert), batch_size=30, document_length=16, negatives=negatives, loss=loss)
    Contest(options, benchmark.MADE, tmp_path).write_examples(steps=2)
    given, in_order = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("given.jsonl", "in_order.jsonl")
    )
    assert len(given) == 60
    documents = [text for row in in_order for text in row["documents"]]
    assert len(set(documents)) == len(documents) == 60 * (1 + negatives)
    if loss is Loss.distillation:
        by_text = {text: score for row in given for text, score in zip(row["documents"], row["scores"], strict=True)}
        assert [by_text[text] for row in in_order for text in row["documents"]] == [
            score for row in in_order for score in row["scores"]
        ]
        assert len(set(by_text.values())) == len(documents)
    else:
        of_query = {row["query"]: [row["positive"], *row["negatives"]] for row in given}
        assert {row["query"]: row["documents"] for row in in_order} == of_query


def test_both_layouts_are_written(tiny_bert: Path, tmp_path: Path) -> None:
    contest = Contest(Options(model=str(tiny_bert), document_length=16), "made", tmp_path)
    contest.write("given.jsonl", [{"query": "what", "positive": "a cat"}])
    contest.write_weights(tmp_path / "on", [])
    for layout in (Format.sentence_transformers, Format.pylate):
        assert (tmp_path / "on" / layout.name / "modules.json").is_file()


def test_a_product_of_matrices_is_measured_at_its_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timer, "blocked_autorange", lambda *_, **__: SimpleNamespace(times=[2.0, 0.5, 1.0]))
    # A sum of 8 products for each of 8 x 8 numbers.
    assert benchmark.matrix_rate(torch.float32, 8, "cpu") == 8 * 8 * 8 * 2 / 0.5
