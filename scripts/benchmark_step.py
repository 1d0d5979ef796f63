"""Training steps beside the peers' own trainers: the same weights, the same examples, the same batches, in turn.

    python scripts/benchmark_step.py [device=cpu] [peers=[st,pylate]] [sets=[python_functions,lfrqa,squad_sentences]]

st is sentence-transformers' MultiVectorEncoderTrainer in this environment, pylate PyLate's in one of its own, which is
installed into environments=.peers at the first use, on a GPU with late-interaction-kernels. Weights are those of
model=minilm with a new linear head, or random ones of a size (model=random_minilm, random_modernbert_base), documents
are cut at document_length=180, a step has batch_size=32 queries, with negatives=1 another document each, and
precision=float32 or bf16. sets=[msmarco_lengths] are pairs of random words, as long as MS MARCO's queries and passages.

loss=contrastive is a softmax over the documents of the batch; loss=cached is the same by GradCache, in pieces of
mini_batch=32 documents, ours of as many tokens as those may have; loss=distillation is the divergence from a teacher's
scores, which are made up, over each query's own documents.

First each trainer takes agree=1 steps with dropout off; where a peer fails, has read other tokens, or has a loss more
than 1e-3 from ours at the first step, no ratio of it is printed and the status is 1. Then each trains steps=8 and
warmup=2 before them, with the dropout of the weights, in a process of its own, one after the other, rounds=3 times.
queries/s are those of the timed steps, in the median over the rounds, and so are the ratios, each of one round. Where
the time of a step of ours goes is measured once more, with trainer.profile=true. On a GPU the share of the matrix rate
counts what a step must multiply, 6 operations a token that is no padding and a weight of the layers and the head
(Chowdhery et al. 2022, appendix B, without attention's), over what a product of two square matrices reaches in this
precision; on a CPU, which other programs slow down from one minute to the next, that is no measure.

What was measured is written to scripts/results/step_<machine>.json, and with readme=true into the README's table.
LATEFORGE_DATA names the folder of the sets.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import OmegaConf
from torch.utils.benchmark import Timer
from transformers.utils import logging as transformers_logging

from architectures.export import Format, write_layout
from configs.schema import ConfigError, Precision
from scripts.machine import commit, processor
from scripts.made_workload import SIZES, made_pairs, write_backbone
from scripts.models import build_model, compose_config
from scripts.options import read_options
from scripts.peer_environments import (
    NEIGHBOURS,
    PEERS,
    PeerError,
    install,
    python_of,
    run,
    variables_of,
    versions,
    versions_of,
)
from scripts.regions import with_region
from trainer.console import fail
from trainer.data import load_data
from trainer.loop import build_batches
from trainer.phases import PHASES, TRACED_STEPS

RESULTS, README, TRAINER = ROOT / "scripts" / "results", ROOT / "README.md", ROOT / "scripts" / "peer_trainer.py"
BEGIN, END = "<!-- step table -->\n", "<!-- end of step table -->\n"
OURS, TRAINERS = "lateforge", {"st": "sentence-transformers", "pylate": "PyLate"}
MADE = "msmarco_lengths"
# A peer's loss of the first step may be so far from ours.
FIRST_LOSS = 1e-3
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
# Side of the matrices whose product measures what a GPU can do.
SIDE = 8192
# What PyLate's MaxSim runs on on a GPU.
KERNELS = "late-interaction-kernels"


class Loss(Enum):
    """What a step computes."""

    contrastive = "a softmax over the batch"
    cached = "a softmax over the batch by GradCache"
    distillation = "distillation"


@dataclass
class Options:
    device: str = "cpu"
    peers: list[str] = field(default_factory=lambda: list(TRAINERS))
    sets: list[str] = field(default_factory=lambda: ["python_functions", "lfrqa", "squad_sentences"])
    model: str = "minilm"
    document_length: int = 180
    batch_size: int = 32
    negatives: int = 0
    loss: Loss = Loss.contrastive
    mini_batch: int = 32
    precision: Precision = Precision.float32
    steps: int = 8
    warmup: int = 2
    rounds: int = 3
    agree: int = 1
    environments: str = ".peers"
    readme: bool = False


@dataclass(frozen=True)
class Measured:
    """What one trainer did in one process, step by step."""

    seconds: list[float]
    losses: list[float]
    tokens: list[int]
    """Of documents."""
    padded_tokens: list[int]
    phases: dict[str, float]
    """Seconds a timed step."""
    peak_memory_bytes: int
    versions: dict[str, str]


def main(arguments: Sequence[str]) -> int:
    """The status is 0, 1 where a peer cannot be compared, 2 for a mistake in the arguments."""
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0
    try:
        options = parse(arguments)
        record = measure_all(options)
    except (ConfigError, PeerError) as error:
        return fail(str(error))
    path = RESULTS / f"{file_name(record)}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(record)}\n{path}")
    if options.readme:
        README.write_text(updated(README.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
    return int(any(each["problems"] for each in record["sets"].values()))


def parse(arguments: Sequence[str]) -> Options:
    """Raises ConfigError for an argument that cannot be."""
    options = read_options(Options, OmegaConf.from_dotlist(list(arguments)))
    unknown = [name for name in options.peers if name not in TRAINERS]
    problems = {
        f"peers={unknown} are none: give some of {', '.join(TRAINERS)}": bool(unknown),
        f"device={options.device} must be cpu or cuda": options.device not in ("cpu", "cuda"),
        "device=cuda: this machine has no GPU that torch can use: give device=cpu": (
            options.device == "cuda" and not torch.cuda.is_available()
        ),
        "precision=fp16 is not compared: give float32 or bf16": options.precision is Precision.fp16,
        "loss=distillation compares documents of one query: give negatives=1 or more": (
            options.loss is Loss.distillation and options.negatives < 1
        ),
        "steps, rounds, agree, batch_size and mini_batch must be 1 or more, warmup and negatives 0 or more": (
            min(options.steps, options.rounds, options.agree, options.batch_size, options.mini_batch) < 1
            or min(options.warmup, options.negatives) < 0
        ),
    }
    for problem, holds in problems.items():
        if holds:
            raise ConfigError(problem)
    return options


def measure_all(options: Options) -> dict[str, Any]:
    """What was measured of each set, and on what."""
    if "pylate" in options.peers:
        pylate = PEERS["pylate"]
        if options.device == "cuda":
            pylate = replace(pylate, requirements=(*pylate.requirements, KERNELS))
        install(pylate, Path(options.environments).absolute() / "pylate")
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    record: dict[str, Any] = {
        "machine": gpu or f"{processor()} {torch.get_num_threads()} threads",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "command": " ".join(["python scripts/benchmark_step.py", *sys.argv[1:]]),
        "options": asdict(options) | {"precision": options.precision.name, "loss": options.loss.name},
        "matrix_rate": None,
        "versions": {},
        "sets": {},
    }
    if options.device == "cuda":
        record["matrix_rate"] = matrix_rate(torch.bfloat16 if options.precision is Precision.bf16 else torch.float32)
    for name in options.sets:
        print(f"{name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            contest = Contest(options, name, Path(folder))
            record["sets"][name], found = contest.run()
            record["versions"] |= found
    return record


class Contest:
    """The trainers over one set."""

    def __init__(self, options: Options, name: str, folder: Path) -> None:
        self.options, self.name, self.folder = options, name, folder
        self.trainers = [OURS, *options.peers]
        self.count = 0
        self.model = options.model
        if options.model in SIZES:
            self.model = str(folder / options.model)
            write_backbone(Path(self.model), options.model)

    def run(self) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
        """What was measured, by trainer; and the versions of each."""
        options, folder = self.options, self.folder
        self.write_weights(folder / "off", ["backbone.dropout=0"])
        matrix_weights = self.write_weights(folder / "on", [])
        query_tokens = self.write_examples(steps=max(options.agree, options.warmup + options.steps))
        problems, first = dict[str, str](), dict[str, Measured]()
        for trainer in self.trainers:
            try:
                first[trainer] = self.train(trainer, folder / "off", steps=options.agree)
            except PeerError as error:
                problems[trainer] = str(error)
        if OURS in problems:
            raise PeerError(problems[OURS])
        for trainer in options.peers:
            if trainer not in problems and (problem := disagreement(first[OURS], first[trainer])):
                problems[trainer] = problem
        apart = {
            trainer: max(abs(a - b) for a, b in zip(first[OURS].losses, first[trainer].losses, strict=True))
            for trainer in options.peers
            if trainer not in problems
        }
        for trainer, problem in problems.items():
            print(f"{TRAINERS[trainer]} is not compared: {problem}", flush=True)
        compared = [trainer for trainer in self.trainers if trainer not in problems]
        rounds: dict[str, list[Measured]] = {trainer: [] for trainer in compared}
        for number in range(options.rounds):
            for trainer in compared:
                measured = self.train(trainer, folder / "on", steps=options.warmup + options.steps)
                rounds[trainer].append(measured)
                print(f"round {number + 1}  {trainer:10}{self.rate(measured):8.2f} queries/s", flush=True)
        out = folder / "profile"
        out.mkdir()
        profiled = self.train_ours(folder / "on", out, options.warmup + options.steps, profile=True)
        timed = slice(options.warmup, None)
        tokens = median(rounds[OURS][0].tokens[timed]) + query_tokens
        result = {
            "problems": problems,
            "phases": profiled.phases,
            "losses_apart": apart,
            "operations": 6 * tokens * matrix_weights,
            "trainers": {trainer: self.summary(rounds[trainer], rounds[OURS]) for trainer in compared},
        }
        return result, {trainer: rounds[trainer][0].versions for trainer in compared}

    def write_weights(self, folder: Path, keys: list[str]) -> int:
        """The same weights in each library's layout. Returns how many of them each token is multiplied with."""
        config = compose_config(self.model, *self.keys(), *keys)
        set_seed(1)
        encoder = build_model(config)
        for layout in (Format.sentence_transformers, Format.pylate):
            write_layout(encoder, layout, folder / layout.name)
        return sum(
            weights.numel() for name, weights in encoder.named_parameters() if weights.ndim == 2 and "embed" not in name
        )

    def write_examples(self, *, steps: int) -> int:
        """As many pairs of the set as the steps take, in two files; no two of one document, which ours would not take
        for a negative of its own query, and the peers would. Negatives are documents of the pairs that follow.
        Returns the tokens of a step's queries."""
        examples, negatives = steps * self.options.batch_size, self.options.negatives
        wanted, pairs, seen = examples * (1 + negatives), dict[str, str](), set[str]()
        for query, positive in made_pairs() if self.name == MADE else self.pairs():
            if query not in pairs and positive not in seen:
                pairs[query] = positive
                seen.add(positive)
            if len(pairs) == wanted:
                break
        if len(pairs) < wanted:
            raise ConfigError(f"{self.name} has {len(pairs):,} different pairs, and the steps take {wanted:,}")
        queries, documents = list(pairs)[:examples], list(pairs.values())
        rest = iter(documents[examples:])
        rows: list[dict[str, Any]] = [
            {"query": query, "documents": [positive, *islice(rest, negatives)]}
            for query, positive in zip(queries, documents, strict=False)
        ]
        if self.options.loss is Loss.distillation:
            teacher = np.random.default_rng(2).normal(size=(examples, 1 + negatives))
            rows = [row | {"scores": scores} for row, scores in zip(rows, teacher.tolist(), strict=True)]
        else:
            rows = [as_pair(**row) for row in rows]
        self.write("given.jsonl", rows)
        return self.write_in_order(steps)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The queries of the set and the first positive of each."""
        for examples in load_data(compose_config(self.model, f"data={self.name}").data).sets:
            for row in range(len(examples)):
                example = examples.example(row)
                yield example["query"], example["documents"][0]

    def write_in_order(self, steps: int) -> int:
        """The given examples in the order of our batches. Returns the tokens of a step's queries."""
        config = compose_config(self.model, *self.keys(), f"trainer.batch_size={self.options.batch_size}")
        batches = build_batches(config, load_data(config.data).sets, build_model(config), Accelerator(cpu=True))
        in_order = [example for step in range(steps) for example in batches.examples(step)]
        columns = ("query", "documents", *(["scores"] if self.options.loss is Loss.distillation else []))
        self.write("in_order.jsonl", [{column: each[column] for column in columns} for each in in_order])
        return sum(batch.queries.tokens for batch in batches[0])

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def keys(self) -> list[str]:
        """Of our config, for the examples and what is computed of them."""
        options = self.options
        keys = [f"data.path={self.folder / 'given.jsonl'}", "data.evaluation_fraction=0"]
        if options.loss is Loss.distillation:
            keys += ["data=scored", "data.documents_per_query=null"]
            keys += ["loss=distillation", "loss.distillation.normalization=none"]
        else:
            keys += ["data=pairs", "loss.contrastive.mask_known_positives=false"]
        if options.loss is Loss.cached:
            keys.append(f"trainer.cache_tokens={options.mini_batch * options.document_length}")
        elif options.device == "cuda":
            keys.append("trainer.chunk_tokens=16384")
        return [*keys, f"backbone.document_length={options.document_length}"]

    def train(self, trainer: str, weights: Path, *, steps: int) -> Measured:
        """Train in a process of its own. Raises PeerError where that fails."""
        self.count += 1
        out = self.folder / f"out{self.count}"
        out.mkdir()
        if trainer == OURS:
            return self.train_ours(weights, out, steps)
        return self.train_peer(trainer, weights, out, steps)

    def train_ours(self, weights: Path, out: Path, steps: int, *, profile: bool = False) -> Measured:
        options = self.options
        keys = [
            *("backbone=checkpoint", f"backbone.name={weights / Format.sentence_transformers.name}", *self.keys()),
            *("head=default", "name=benchmark", f"output_dir={out / 'run'}", "report=false", "trainer.epochs=null"),
            *(f"trainer.steps={steps}", f"trainer.batch_size={options.batch_size}", "trainer.save_every_steps=null"),
            f"trainer.precision={options.precision.name}",
            *(f"optimizer.learning_rate={LEARNING_RATE}", f"optimizer.weight_decay={WEIGHT_DECAY}"),
            *("optimizer.warmup_fraction=0", f"trainer.profile={str(profile).lower()}"),
        ]
        variables = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        variables |= {} if options.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(ROOT / "train.py"), *keys]
        run(command, f"{OURS} failed", cwd=ROOT, variables=os.environ | variables)
        lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        done = [line for line in lines if "train/loss" in line]
        seconds = [line["train/seconds"] for line in done]
        tokens = [round(line["train/document_tokens_per_second"] * line["train/seconds"]) for line in done]
        padding = [line["train/padding_fraction"] for line in done]
        phases = [{name: line.get(f"train/seconds/{name}", 0.0) for name in PHASES} for line in done] if profile else []
        untraced = phases[1 + TRACED_STEPS + 1 :] or phases
        result = json.loads((out / "run" / "result.json").read_text(encoding="utf-8"))
        return Measured(
            seconds=seconds,
            losses=[line["train/loss"] for line in done],
            tokens=tokens,
            padded_tokens=[round(own / (1 - share)) for own, share in zip(tokens, padding, strict=True)],
            phases={name: median(each[name] for each in untraced) for name in PHASES} if profile else {},
            peak_memory_bytes=result["peak_memory_bytes"],
            versions=versions(NEIGHBOURS, sys.path),
        )

    def train_peer(self, trainer: str, weights: Path, out: Path, steps: int) -> Measured:
        options = self.options
        layout = Format.pylate if trainer == "pylate" else Format.sentence_transformers
        task = {
            "library": trainer,
            "model": str(weights / layout.name),
            "loss": options.loss.name,
            "mini_batch": options.mini_batch,
            "examples": str(self.folder / "in_order.jsonl"),
            "steps": steps,
            "batch_size": options.batch_size,
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "precision": options.precision.name,
            "device": options.device,
            "threads": torch.get_num_threads(),
            "result": str(out / "result.json"),
        }
        python, variables = Path(sys.executable), os.environ | {"HF_HUB_OFFLINE": "1"}
        installed = versions(NEIGHBOURS, sys.path)
        if trainer == "pylate":
            environment = Path(options.environments).absolute() / "pylate"
            python, variables = python_of(environment), variables_of(environment)
            installed = versions_of(
                environment, PEERS[trainer].package, *([KERNELS] if options.device == "cuda" else [])
            )
        if options.device == "cuda":
            variables.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        command = [str(python), str(TRAINER), json.dumps(task)]
        run(command, f"{TRAINERS[trainer]} failed", cwd=ROOT, variables=variables)
        found = json.loads((out / "result.json").read_text(encoding="utf-8"))
        timed = found["phases"][options.warmup :] or found["phases"]
        found["phases"] = {name: sum(each[name] for each in timed) / len(timed) for name in timed[0]}
        return Measured(**found, versions=installed)

    def rate(self, measured: Measured) -> float:
        """Queries a second of the timed steps."""
        timed = measured.seconds[self.options.warmup :]
        return self.options.batch_size * len(timed) / sum(timed)

    def summary(self, rounds: list[Measured], ours: list[Measured]) -> dict[str, Any]:
        """Medians over the rounds."""
        timed = slice(self.options.warmup, None)
        one = rounds[0]
        return {
            "queries_per_second": median(map(self.rate, rounds)),
            "document_tokens_per_second": median(sum(each.tokens[timed]) / sum(each.seconds[timed]) for each in rounds),
            "padded_over_real": sum(one.padded_tokens[timed]) / sum(one.tokens[timed]),
            "peak_memory_bytes": median(each.peak_memory_bytes for each in rounds),
            "phases": {name: median(each.phases[name] for each in rounds) for name in one.phases},
            "ratio": median(self.rate(own) / self.rate(each) for own, each in zip(ours, rounds, strict=True)),
            "rounds": [asdict(each) for each in rounds],
        }


def matrix_rate(dtype: torch.dtype, side: int = SIDE, device: str = "cuda") -> float:
    """Operations a second of a product of two square matrices, at its fastest."""
    one, other = torch.randn(2, side, side, device=device, dtype=dtype)
    measured = Timer("one @ other", globals={"one": one, "other": other}).blocked_autorange(min_run_time=1)
    return float(2 * side**3 / min(measured.times))


def as_pair(query: str, documents: list[str]) -> dict[str, Any]:
    """The first of the documents is the positive."""
    return {"query": query, "positive": documents[0]} | ({"negatives": documents[1:]} if documents[1:] else {})


def file_name(record: dict[str, Any]) -> str:
    """One a machine, loss and model; those of the options' own defaults are not named."""
    options, own = record["options"], Options()
    named = [
        options[key] for key, default in (("loss", own.loss.name), ("model", own.model)) if options[key] != default
    ]
    return re.sub("[^a-z0-9]+", "_", "_".join(["step", record["machine"], *named]).lower()).strip("_")


def disagreement(ours: Measured, theirs: Measured) -> str | None:
    """Why a peer has not done the same, or None."""
    if ours.tokens != theirs.tokens:
        read = [", ".join(map(str, each.tokens[:3])) for each in (theirs, ours)]
        return f"it read {read[0]} document tokens a step, and lateforge {read[1]}"
    first = ours.losses[0], theirs.losses[0]
    if not abs(first[0] - first[1]) <= FIRST_LOSS:
        return f"its loss of the first step is {first[1]:.6f}, and lateforge's {first[0]:.6f}"
    return None


def updated(readme: str, results: Path) -> str:
    """The README with its region replaced; unchanged where it has none."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("step_*.json"))]
    return with_region(readme, BEGIN, END, "\n".join(map(table, records)))


def table(record: dict[str, Any]) -> str:
    """What was measured, as the README has it."""
    options, found = record["options"], record["versions"]
    lines = [
        "| set | trainer | queries/s | ours over it | document tokens/s | computed / real | peak memory |",
        "|---|---|---|---|---|---|---|",
        *(line for name, each in record["sets"].items() for line in _rows(name, each)),
        "",
        f"| seconds of a step of ours | {' | '.join(record['sets'])} |",
        f"|---|{'---|' * len(record['sets'])}",
        *(
            f"| {words} | {' | '.join(format(each['phases'][phase], '.3f') for each in record['sets'].values())} |"
            for phase, words in PHASES.items()
        ),
        *_shares(record),
        "",
        f"({record['machine']}, {options['precision']}, {options['model']}, {Loss[options['loss']].value}, batches of "
        f"{options['batch_size']} queries with {1 + options['negatives']} documents each, of at most "
        f"{options['document_length']} tokens, medians of {options['rounds']} rounds of {options['steps']} steps; "
        + "; ".join(f"{name}: {_versions(own)}" for name, own in found.items())
        + f"; commit {record['commit'][:7]}, {record['date']}: `{record['command']}`)",
    ]
    return "\n".join(lines) + "\n"


def _rows(name: str, measured: dict[str, Any]) -> Iterator[str]:
    for trainer, own in measured["trainers"].items():
        ratio = "" if trainer == OURS else f"{own['ratio']:.2f}x"
        yield (
            f"| {name} | {TRAINERS.get(trainer, trainer)} | {own['queries_per_second']:.2f} | {ratio} | "
            f"{own['document_tokens_per_second']:,.0f} | {own['padded_over_real']:.2f} | "
            f"{own['peak_memory_bytes'] / 2**20:,.0f} MiB |"
        )
    for trainer, problem in measured["problems"].items():
        yield f"| {name} | {TRAINERS[trainer]} | not compared: {problem.replace('|', '/')} | | | | |"


def _shares(record: dict[str, Any]) -> Iterator[str]:
    """What a step of ours multiplies a second, over what the device can, where that was measured."""
    if rate := record["matrix_rate"]:
        of_sets = [
            each["operations"] * each["trainers"][OURS]["queries_per_second"] / record["options"]["batch_size"] / rate
            for each in record["sets"].values()
        ]
        yield f"| share of {rate / 1e12:,.0f} TFLOP/s | {' | '.join(format(share, '.2f') for share in of_sets)} |"


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
