"""Every key of a run: its type, its unit and one line of meaning.

YAML states the values; nothing has a default here, so nothing is written twice. This module imports omegaconf and the
standard library only, so a bad config answers before torch is loaded.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from itertools import pairwise
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# For names of folders that are made of members such as study/glu.
OmegaConf.register_new_resolver("dashed", lambda text: text.replace("/", "-"), replace=True)


class ConfigError(Exception):
    """A mistake of the user's: key or file:line, value, rule and remedy in one line."""


class Expansion(Enum):
    none = "none"
    fixed = "fixed"
    min = "min"


class Attention(Enum):
    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class Side(Enum):
    query = "query"
    document = "document"


class Activation(Enum):
    """Classes of torch.nn that need no argument: a saved head names the class alone."""

    identity = "Identity"
    relu = "ReLU"
    leaky_relu = "LeakyReLU"
    gelu = "GELU"
    silu = "SiLU"
    mish = "Mish"
    tanh = "Tanh"
    sigmoid = "Sigmoid"


class Norm(Enum):
    none = "none"
    layer_norm = "LayerNorm"
    rms_norm = "RMSNorm"


class Mode(Enum):
    train = "train"
    check = "check"


class DataFormat(Enum):
    pairs = "pairs"
    scored = "scored"
    beir = "beir"
    distillation_ids = "distillation_ids"
    stanford = "stanford"
    python_functions = "python_functions"
    mix = "mix"


class Positive(Enum):
    first = "first"
    best = "best"


class Negatives(Enum):
    none = "none"
    judged = "judged"
    run = "run"


class Draw(Enum):
    uniform = "uniform"
    stratified = "stratified"


class MixedBatch(Enum):
    one_set = "one_set"
    all_sets = "all_sets"


class Score(Enum):
    maxsim = "maxsim"
    mean_maxsim = "mean_maxsim"


class Normalization(Enum):
    none = "none"
    min_max = "min_max"


class OptimizerName(Enum):
    adamw = "adamw"
    muon = "muon"


class Schedule(Enum):
    linear = "linear"
    cosine = "cosine"
    constant = "constant"


class Precision(Enum):
    float32 = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class MaxSimBackend(Enum):
    auto = "auto"
    cuda = "cuda"
    reference = "reference"


class TrackerName(Enum):
    none = "none"
    wandb = "wandb"


# Metrics by the name that users read; the values are trec_eval's own names.
Metric = Enum("Metric", {"ndcg@10": "ndcg_cut_10", "mrr@10": "recip_rank", "map": "map", "recall@100": "recall_100"})


@dataclass
class BackboneConfig:
    """The pretrained encoder and how text becomes its tokens. A key that is null keeps what a late-interaction
    checkpoint says; any other gets what PyLate gives it."""

    name: str
    """Hub name, local folder, or `package:<module>/<folder>` for weights inside an installed Python package."""
    revision: str | None
    """Branch, tag or commit of a Hub name; null is its main branch."""
    sha256: str | None
    """SHA-256 that `model.safetensors` must have, checked before it is loaded; null checks nothing."""
    trust_remote_code: bool
    """Run the Python code that the checkpoint brings; without it such a checkpoint is refused."""
    allow_pickle: bool
    """Take weights that lie in pickles alone, which are read as tensors and nothing else (`weights_only`)."""
    attention: Attention
    """Attention of the backbone. flash_attention_2 cannot keep unattended expansion tokens apart."""
    dropout: float | None
    """Share of activations that the backbone drops in training; null is what the checkpoint says."""
    query_length: int | None
    """Tokens of a query, special ones and prefix included; 32 in PyLate."""
    document_length: int | None
    """Tokens a document is cut to, special ones and prefix included; 180 in PyLate, 220 in Stanford's ColBERT."""
    query_prefix: str | None
    """Marker put before every query, one token of its own; an empty text means none."""
    document_prefix: str | None
    """Marker put before every document, one token of its own; an empty text means none."""
    expansion: Expansion | None
    """Fill queries with mask tokens, which are scored: to exactly query_length tokens (fixed), or at least (min)."""
    attend_to_expansion: bool | None
    """Whether the backbone's attention sees the expansion tokens."""
    skiplist: list[str] | None
    """Tokens left out of scoring. A word that is no single token of the vocabulary is listed and dropped."""
    skiplist_sides: list[Side] | None
    """Sides that the skiplist applies to."""


@dataclass
class HeadLayer:
    """One projection layer: activation(linear(x)) plus, with residual, x itself. One with norm, gated or dropout is a
    module of our own, which the saved model carries; others are Dense layers that any library reads."""

    bias: bool
    """Whether the linear map has a bias."""
    activation: Activation
    """Activation after the linear map."""
    residual: bool
    """Add the input to the output. Over unequal widths the input passes a learned, bias-free linear map."""
    # One of these two gives the width, so each may be left out of a layer.
    out_features: int | None = None
    """Width of the layer's output. Where it is given, factor is not read."""
    factor: float | None = None
    """Width of the layer's output as a multiple of the backbone's width."""
    # What few layers have may be left out as well: a list has no preset to take it from.
    in_features: int | None = None
    """Width of the layer's input; it follows from the layer before, and is checked against it where it is given."""
    norm: Norm = Norm.none
    """Normalisation of the layer's input, before the linear map; a residual passes it by."""
    gated: bool = False
    """Multiply by a second linear map of the input: with sigmoid a GLU, with silu a SwiGLU."""
    dropout: float = 0.0
    """Share of the output dropped in training, before the residual is added."""


@dataclass
class HeadConfig:
    """The projection head: what is kept of the checkpoint's own, then the layers listed here."""

    keep: str
    """Layers kept of the checkpoint's own head: all, none, or a number, the first so many."""
    embedding_size: int | None
    """Width of the vectors: where the last layer gives another, a bias-free linear layer to it follows. null leaves
    what the layers give; a head without any gets one to 128."""
    seed: int | None
    """Seed that new layers are drawn from; null draws them from the run's."""
    layers: list[HeadLayer]
    """Layers appended after those kept; each takes the width of the one before."""


@dataclass
class SetConfig:
    """One set of examples: where it lies, how it is read, and what of it a query is trained with. A key that a format
    does not read is null."""

    format: DataFormat
    """How the examples lie on disk."""
    root: str
    """Folder that relative paths start from."""
    path: str | None
    """A file (JSON lines, CSV, TSV, all also gzipped, Parquet or Arrow), a pattern such as `part-*.parquet`, a folder,
    or a data set of the Hub, `owner/name`."""
    subset: str | None
    """Subset of a data set of the Hub; null is its only one. distillation_ids: of the rows that a teacher scored."""
    revision: str | None
    """Branch, tag or commit of a data set of the Hub; null is its main branch."""
    split: str | None
    """Split of a data set of the Hub, file of a folder without its ending, or judgements of a BEIR folder."""
    queries_path: str | None
    """stanford: the file of queries, an id and a text a line."""
    documents_path: str | None
    """stanford: the collection, an id, a text and perhaps a title a line."""
    evaluation_path: str | None
    """Examples to evaluate on, in the same format; null holds out evaluation_fraction."""
    evaluation_split: str | None
    """The split to evaluate on. beir: its queries rank the whole corpus."""
    evaluation_fraction: float | None
    """Share held out where neither evaluation_path nor evaluation_split is given (of the queries; python_functions:
    of the modules; distillation_ids: the last queries by id); 0 trains without a score."""
    query_column: str | None
    """Column of the query's text."""
    positive_column: str | None
    """Column of the text of the document that answers the query, or of a list of several."""
    negative_columns: list[str] | None
    """Columns of documents that do not answer it: a text or a list of texts each; null takes every column named
    negative, negatives, negative_1, negative_2 and so on."""
    documents_column: str | None
    """scored: column of a list of texts."""
    scores_column: str | None
    """scored: column of what a teacher gives each of them."""
    positive: Positive | None
    """Which of the documents that a teacher scored is the positive: the first of the row, or the best."""
    negatives: Negatives | None
    """beir: none, the documents judged below positive_grade (judged), or what a ranking has beside answers (run)."""
    run_path: str | None
    """beir: a ranking in TREC's format (query, Q0, document, rank, score, name)."""
    positive_grade: int | None
    """beir: lowest grade of a document that answers a query."""
    ignore_identical_ids: bool | None
    """beir: whether a document with the id of a query is that query itself, which it is then not ranked for, as
    published figures of ArguAna and Quora have it."""
    max_empty: float | None
    """Share of the examples that may have an empty text: these are left out and counted; above it that is an error."""
    documents_per_query: int | None
    """Documents that a query is trained with: a positive, and of the others as many as fit, drawn anew each epoch;
    null takes all. Of several positives each epoch draws one."""
    draw: Draw | None
    """How the others are drawn: each alike (uniform), or one from each of as many equal ranges of the teacher's order
    (stratified)."""
    query_length: int | None
    """Tokens of a query of this set, special ones and prefix included; null is the backbone's."""
    document_length: int | None
    """Tokens a document of this set is cut to; null is the backbone's."""
    query_prefix: str | None
    """What is put before a query of this set in place of the backbone's; null is the backbone's."""
    document_prefix: str | None
    """What is put before a document of this set in place of the backbone's; null is the backbone's."""


@dataclass
class DataConfig(SetConfig):
    """What to train on, and what to evaluate on: one set, or a mix of several."""

    mix: dict[str, float]
    """Weight of each set, by its member of this group, as in {medquad: 2.0, squad_sentences: 1.0}."""
    mix_by_size: float
    """Power of a set's size that multiplies its weight: 0 leaves the weight alone, 1 gives every example its own."""
    mix_batches: MixedBatch
    """one_set: the queries of a step come from one set, on all processes the same; all_sets: each from any."""
    # Of SetConfig each, as parse_config makes them: Hydra could not add a key to a typed one.
    sets: dict[str, Any]
    """The sets of a mix, as their members say; `data.sets.medquad.document_length=256` says otherwise."""
    length_window: int | None
    """Batches whose examples are sorted by length among themselves before they are cut into batches again: less
    padding, and negatives of like length; null sorts inside a batch alone, which changes no batch."""


@dataclass
class LossTerms:
    """Weight of each term in the sum that is minimised; 0 leaves it out. Each is logged by itself."""

    contrastive: float
    """Cross-entropy of each query's positive among the documents of the batch."""
    distillation: float
    """Divergence of the distribution over a query's own documents from the teacher's; needs teacher scores."""
    margin_mse: float
    """Squared error of each margin between a query's positive and another of its documents; needs teacher scores."""


@dataclass
class ContrastiveConfig:
    """Read where loss.terms.contrastive is above 0."""

    score: Score
    """maxsim, or mean_maxsim: the same over the query's scored tokens."""
    temperature: float
    """Divisor of the scores before the softmax; where it is learnt, its first value."""
    learn_temperature: bool
    """Train the temperature's logarithm as well, at optimizer.learning_rate unless a group `loss.*` has its own."""
    temperature_bounds: list[float]
    """Lowest and highest value of a learnt temperature."""
    symmetric: bool
    """Take the mean with the other direction: cross-entropy of each positive's query among all queries."""
    own_negatives: bool
    """Whether a query meets its own explicit negatives; false, as in Stanford's ColBERT, leaves it those of others."""
    mask_known_positives: bool
    """Leave out of a query's negatives its positive where it stands again, and its other positives in the data."""
    max_negative_ratio: float | None
    """Leave out negatives that the model scores above this share of the positive's score; null leaves out none."""


@dataclass
class DistillationConfig:
    """Read where loss.terms.distillation is above 0."""

    score: Score
    """maxsim, or mean_maxsim: the same over the query's scored tokens."""
    student_temperature: float
    """Divisor of the student's scores before the softmax; the divergence is multiplied by its square."""
    teacher_temperature: float
    """Divisor of the teacher's scores before the softmax."""
    normalization: Normalization
    """What is done to the student's scores first: nothing, or min_max over the query's documents, as PyLate does."""


@dataclass
class MarginMSEConfig:
    """Read where loss.terms.margin_mse is above 0."""

    score: Score
    """maxsim, or mean_maxsim: the same over the query's scored tokens."""
    teacher_temperature: float
    """Divisor of the teacher's scores."""


@dataclass
class MatryoshkaConfig:
    """Widths at which every term is computed, each of the first so many components, at unit length again."""

    widths: list[int]
    """From the model's own down; the evaluation reports each. Empty is the model's own alone."""
    weights: list[float]
    """Weight of each width in the sum."""


@dataclass
class LossConfig:
    """What is minimised: a weighted sum of terms over one forward pass."""

    terms: LossTerms
    contrastive: ContrastiveConfig
    distillation: DistillationConfig
    margin_mse: MarginMSEConfig
    matryoshka: MatryoshkaConfig


@dataclass
class ParameterGroup:
    """Parameters that have a learning rate of their own."""

    pattern: str
    """Names such as `head.*` or `backbone.encoder.layer.[0-3].*`; the first group that matches a name takes it."""
    learning_rate: float
    """Their highest learning rate; 0 freezes them."""


@dataclass
class OptimizerConfig:
    """How a gradient becomes a step."""

    name: OptimizerName
    """Optimiser."""
    learning_rate: float
    """Highest learning rate, reached at the end of the warm-up."""
    muon_learning_rate: float | None
    """muon: the same for the matrices that Muon trains; embeddings, norms and biases are AdamW's."""
    muon_momentum: float | None
    """muon: decay of the running mean of the gradient."""
    groups: list[ParameterGroup]
    """Learning rates of some parameters, by their names."""
    weight_decay: float
    """Decoupled weight decay of matrices; biases and norms have none."""
    betas: list[float]
    """Decay of the running means of the gradient and of its square."""
    epsilon: float
    """Added to the root of the second moment."""
    schedule: Schedule
    """Learning rate after the warm-up: linear or cosine to 0, or constant."""
    warmup_fraction: float
    """Share of all steps in which the learning rate rises linearly from 0."""


@dataclass
class TrainerConfig:
    """How long, in which batches and in which precision."""

    steps: int | None
    """Optimiser steps. Exactly one of steps and epochs is set."""
    epochs: float | None
    """Passes over the training examples. Exactly one of steps and epochs is set."""
    batch_size: int
    """Queries per optimiser step, over all processes."""
    accumulation_steps: int
    """Micro-batches that an optimiser step is cut into; queries of one do not meet the documents of another."""
    precision: Precision
    """Precision of the forward and backward pass, and in which the evaluation encodes; weights and sums stay
    float32."""
    maxsim: MaxSimBackend
    """Which MaxSim computes the scores: auto takes the CUDA kernel where it can run, else the reference."""
    max_gradient_norm: float | None
    """Gradients are scaled down to this norm; null clips nothing."""
    chunk_tokens: int
    """Texts of a batch are sorted by length and encoded in chunks of at most this many tokens, padding included where
    there is any; read where cache_tokens is null."""
    pack: bool
    """Put the texts of a chunk into one row without padding, where the first step shows that their vectors stay the
    same; false pads each to the longest of its chunk."""
    cache_tokens: int | None
    """Keep activations of one chunk at a time, of at most this many tokens, and encode each a second time for its
    gradient (GradCache): the same gradient in the memory of a chunk. null keeps those of the whole micro-batch."""
    gradient_checkpointing: bool
    """Keep the inputs of the backbone's layers alone and compute the rest again: less memory, a third more time."""
    compile: bool
    """Compile the backbone's layers by torch.compile, with lengths that vary; a line says what that gained, and
    train/compilations counts the graphs."""
    log_every_steps: int
    """Steps between two lines where there is no terminal to draw a progress bar on."""
    save_every_steps: int | None
    """Steps between two checkpoints, from which `resume=` goes on; null saves one at Ctrl-C and TERM only."""
    keep_checkpoints: int
    """Newest checkpoints that are kept; a finished run keeps none."""
    profile: bool
    """Say where the time of a step goes, by phase, in the metrics, at the end and in the report, and leave
    trace.json.gz of two steps, for Perfetto."""


@dataclass
class EvaluationConfig:
    """When the model is scored, and by what the best one is chosen."""

    every_steps: int | None
    """Steps between two evaluations during training; null evaluates before and after only."""
    metric: Metric
    """Metric that decides which model is best: ndcg@10, mrr@10, map or recall@100."""
    batch_size: int
    """Texts encoded at once."""


@dataclass
class TrackerConfig:
    """Where the metrics are shown while the run goes on."""

    name: TrackerName
    """Tracker."""
    project: str
    """Project that the run belongs to."""
    entity: str | None
    """User or team that the project belongs to; null is the tracker's default."""
    group: str | None
    """Runs that are shown together; null is none, and in a sweep the sweep's folder."""
    id: str | None
    """Id of the run at the tracker, which a resumed run keeps; null draws one."""


@dataclass
class SweepConfig:
    """How the jobs of `-m` run."""

    launch: str | None
    """What starts train.py in each job, such as `accelerate launch --num_processes 4`; null is this Python."""


@dataclass
class Config:
    """A whole run."""

    name: str
    """Name of the run."""
    output_dir: str
    """Folder that receives all that the run leaves."""
    overwrite: bool
    """Replace the run that output_dir holds."""
    report: bool
    """End in report.html; without, `python scripts/report.py run=...` draws it at any time."""
    mode: Mode
    """train, or check: read the data, say what is in it, and stop before any weight is loaded."""
    seed: int
    """Seed of the new layers, the order of the examples and dropout."""
    backbone: BackboneConfig
    head: HeadConfig
    data: DataConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    evaluation: EvaluationConfig
    tracker: TrackerConfig
    sweep: SweepConfig


def parse_config(composed: DictConfig) -> Config:
    """Turn a composed config into dataclasses and check all that the config alone can tell.

    Raises ConfigError that names the key, the value, the rule and the remedy.
    """
    try:
        # A merge of two typed nodes keeps keys added with `+`; through a plain container they are rejected.
        plain = OmegaConf.to_container(composed, resolve=True)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
        assert isinstance(config, Config)
        for name, given in config.data.sets.items():
            each = OmegaConf.merge(
                {"data": {"sets": {name: OmegaConf.structured(SetConfig)}}}, {"data": {"sets": {name: given}}}
            )
            config.data.sets[name] = OmegaConf.to_object(each.data.sets[name])
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    for problem in _problems(config):
        raise ConfigError(problem)
    return config


def save_config(config: Config, path: str) -> None:
    """Write every key with its value as YAML that `rerun=` reads back."""
    OmegaConf.save(OmegaConf.structured(config), path)


def as_dict(config: Config) -> dict[str, Any]:
    """Every key with its value, as JSON takes them."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def assignment(key: str, text: str) -> str:
    """The override that gives a key this text, whatever quotes and signs it holds."""
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'")
    return f"{key}='{escaped}'"


def changed_keys(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Value in the one and in the other by dotted key, where they differ; a list counts as a whole."""
    values = [flat(as_dict(config)) for config in (old, new)]
    return {key: (value, values[1][key]) for key, value in values[0].items() if values[1][key] != value}


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Every value by its dotted key; a list counts as a whole."""
    return dict(_leaves(values))


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def explain(error: OmegaConfBaseException) -> str:
    """One line for an error of omegaconf: key and value, the rule, and for an unknown key the nearest known one."""
    key, reason = _in_its_list(error.full_key or ""), str(error).split("\n")[0]
    if re.search(r"Key '.*' (is )?not in", reason):
        return unknown_key(key)
    if "missing mandatory value" in reason:
        return f"{key} has no value: set {key}=..."
    if match := re.fullmatch(r"Value '(.*)' of type '.*' could not be converted to (\w+)", reason):
        return f"{key}={match[1]} must be of type {match[2].lower()}"
    if match := re.fullmatch(r"Invalid value '(.*)', expected one of \[(.*)\]", reason):
        return f"{key}={match[1]} must be one of {match[2]}"
    if match := re.fullmatch(r"Invalid type assigned: str is not a subclass of \w+Config. value: (.*)", reason):
        return f"{key}={match[1]}: a saved run takes keys, not members of a group: set the keys of {key}, one by one"
    if key.endswith("]") and "Invalid type assigned" in reason:
        return f"{key} does not exist: to lengthen a list, give it whole, as in 'head.layers=[{{...}},{{...}}]'"
    return f"{key}: {reason[0].lower()}{reason[1:]}"


def _in_its_list(key: str) -> str:
    """The key with its list before it, where omegaconf names that of an element alone, and not of which."""
    known = list(known_keys())
    lists = [name for name in known if name.endswith(f".0.{key}")]
    return lists[0].replace(".0.", "[].") if key not in known and lists else key


def unknown_key(key: str) -> str:
    """One line for a key that no dataclass has, with the nearest that one has."""
    parts = ["0" if part.isdigit() else part for part in key.replace("[", ".").replace("]", "").split(".")]
    known = list(known_keys())
    same_name = [name for name in known if name.split(".")[-1] == parts[-1]]
    siblings = [name for name in known if name.split(".")[:-1] == parts[:-1]]
    nearest = same_name or get_close_matches(".".join(parts), siblings or known, n=1, cutoff=0.0)
    return f"{key} is no key; the nearest is {nearest[0]} (README.md lists all)"


def known_keys(node: type = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema; an element of a list stands at index 0."""
    hints = get_type_hints(node)
    for field in fields(node):
        hint, key = hints[field.name], prefix + field.name
        yield key
        # The keys of a dict are the user's, and what stands under them is said elsewhere.
        element = next((inner for inner in get_args(hint)[:1] if is_dataclass(inner)), None)
        if isinstance(hint, type) and is_dataclass(hint):
            yield from known_keys(hint, key + ".")
        elif isinstance(element, type):
            yield from known_keys(element, key + ".0.")


def _problems(config: Config) -> Iterator[str]:
    """Rules between keys and of values, each as `key=value rule: remedy`."""
    yield from _not_positive(
        ("backbone.query_length", config.backbone.query_length),
        ("backbone.document_length", config.backbone.document_length),
        ("trainer.steps", config.trainer.steps),
        ("trainer.epochs", config.trainer.epochs),
        ("trainer.batch_size", config.trainer.batch_size),
        ("trainer.accumulation_steps", config.trainer.accumulation_steps),
        ("trainer.max_gradient_norm", config.trainer.max_gradient_norm),
        ("trainer.chunk_tokens", config.trainer.chunk_tokens),
        ("trainer.cache_tokens", config.trainer.cache_tokens),
        ("trainer.log_every_steps", config.trainer.log_every_steps),
        ("trainer.save_every_steps", config.trainer.save_every_steps),
        ("trainer.keep_checkpoints", config.trainer.keep_checkpoints),
        ("evaluation.every_steps", config.evaluation.every_steps),
        ("evaluation.batch_size", config.evaluation.batch_size),
    )
    yield from _head_problems(config.head)
    yield from _backbone_problems(config.backbone)
    yield from _data_problems(config.data)
    yield from _loss_problems(config.loss, config.data)
    yield from _optimizer_problems(config.optimizer)
    if not config.output_dir.strip():
        yield "output_dir= is empty: name the folder that receives the run"
    if not 0 <= config.seed < 2**32:
        yield f"seed={config.seed} must lie between 0 and 4294967295"
    trainer = config.trainer
    if (trainer.steps is None) == (trainer.epochs is None):
        yield (
            f"trainer.steps={trainer.steps} and trainer.epochs={trainer.epochs}: exactly one must be set, the other "
            "null, as in trainer.steps=null trainer.epochs=1"
        )
    if trainer.batch_size % trainer.accumulation_steps:
        yield (
            f"trainer.accumulation_steps={trainer.accumulation_steps} must divide "
            f"trainer.batch_size={trainer.batch_size}"
        )
    if config.loss.terms.contrastive and trainer.batch_size // trainer.accumulation_steps < 2:
        yield (
            f"trainer.batch_size={trainer.batch_size} in trainer.accumulation_steps={trainer.accumulation_steps} "
            "leaves one query a micro-batch, which has no other document to be told from: use 2 or more"
        )


def _not_positive(*values: tuple[str, float | None]) -> Iterator[str]:
    for key, value in values:
        # `not >` also catches nan.
        if value is not None and not 0 < value < float("inf"):
            yield f"{key}={value} must be positive"


def _negative(*values: tuple[str, float]) -> Iterator[str]:
    for key, value in values:
        if not 0 <= value < float("inf"):
            yield f"{key}={value} must be 0 or more, and finite"


def _head_problems(head: HeadConfig) -> Iterator[str]:
    if head.keep not in ("all", "none") and not head.keep.isdecimal():
        yield f"head.keep={head.keep} must be all, none or the number of layers to keep, the first so many"
    if not head.layers and head.keep in ("none", "0") and head.embedding_size is None:
        yield (
            f"head.layers=[] with head.keep={head.keep} leaves no layer: add one, set head.embedding_size, or set "
            "head.keep=all"
        )
    yield from _not_positive(("head.embedding_size", head.embedding_size))
    if head.seed is not None and not 0 <= head.seed < 2**32:
        yield f"head.seed={head.seed} must lie between 0 and 4294967295"
    for index, layer in enumerate(head.layers):
        path = f"head.layers[{index}]"
        yield from _not_positive(
            (f"{path}.out_features", layer.out_features),
            (f"{path}.factor", layer.factor),
            (f"{path}.in_features", layer.in_features),
        )
        if layer.out_features is None and layer.factor is None:
            yield f"{path} has no width: set its out_features, or its factor as a multiple of the backbone's width"
        if not 0 <= layer.dropout < 1:
            yield f"{path}.dropout={layer.dropout} must be at least 0 and below 1"


def _backbone_problems(backbone: BackboneConfig) -> Iterator[str]:
    if backbone.dropout is not None and not 0 <= backbone.dropout < 1:
        yield f"backbone.dropout={backbone.dropout} must be at least 0 and below 1"
    if backbone.sha256 is not None and (len(backbone.sha256) != 64 or set(backbone.sha256) - set("0123456789abcdef")):
        yield f"backbone.sha256={backbone.sha256} must be 64 lower-case hexadecimal digits"


def _loss_problems(loss: LossConfig, data: DataConfig) -> Iterator[str]:
    weights = {f"loss.terms.{name}": weight for name, weight in vars(loss.terms).items()}
    yield from _negative(*weights.items())
    if not any(weights.values()):
        yield "loss.terms are all 0: give one a weight, as in loss.terms.contrastive=1"
    yield from _not_positive(
        ("loss.contrastive.temperature", loss.contrastive.temperature),
        ("loss.contrastive.max_negative_ratio", loss.contrastive.max_negative_ratio),
        ("loss.distillation.student_temperature", loss.distillation.student_temperature),
        ("loss.distillation.teacher_temperature", loss.distillation.teacher_temperature),
        ("loss.margin_mse.teacher_temperature", loss.margin_mse.teacher_temperature),
    )
    if loss.contrastive.learn_temperature:
        bounds = loss.contrastive.temperature_bounds
        if len(bounds) != 2 or not 0 < bounds[0] < bounds[1] < float("inf"):
            yield f"loss.contrastive.temperature_bounds={bounds} must be two rising numbers above 0"
        elif not bounds[0] <= loss.contrastive.temperature <= bounds[1]:
            yield (
                f"loss.contrastive.temperature={loss.contrastive.temperature} lies outside "
                f"loss.contrastive.temperature_bounds={bounds}: start within them"
            )
    widths = loss.matryoshka.widths
    yield from _not_positive(*((f"loss.matryoshka.widths[{index}]", width) for index, width in enumerate(widths)))
    if len(widths) == 1:
        yield f"loss.matryoshka.widths={widths} must be two or more, or [] for the model's own alone"
    if any(narrower >= wider for wider, narrower in pairwise(widths)):
        yield f"loss.matryoshka.widths={widths} must descend, from the model's own width to the narrowest"
    if len(loss.matryoshka.weights) != len(widths):
        yield f"loss.matryoshka.weights={loss.matryoshka.weights} must be as many as loss.matryoshka.widths={widths}"
    yield from _not_positive(
        *((f"loss.matryoshka.weights[{index}]", weight) for index, weight in enumerate(loss.matryoshka.weights))
    )
    taught = [key for key in ("loss.terms.distillation", "loss.terms.margin_mse") if weights[key]]
    if not taught:
        return
    sets = data.sets or {"": data}
    for name, each in sets.items():
        if each.format not in TAUGHT:
            where = f"data.sets.{name} is {each.format.name}" if name else f"data={each.format.name} has none"
            yield (
                f"{taught[0]}={weights[taught[0]]:g} needs teacher scores, and {where}: use "
                "data=scored, distillation_ids or stanford, or set it to 0"
            )
    # Of two, min_max makes 0 and 1, whatever they are.
    min_max = weights["loss.terms.distillation"] and loss.distillation.normalization is Normalization.min_max
    fewest = 3 if min_max else 2
    for name, each in sets.items():
        if each.documents_per_query is not None and each.documents_per_query < fewest:
            key = f"data.sets.{name}" if name else "data"
            yield (
                f"{key}.documents_per_query={each.documents_per_query} leaves {taught[0]} nothing to compare"
                f"{' after loss.distillation.normalization=min_max' if min_max else ''}: use {fewest} or more"
            )


def _optimizer_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    yield from _not_positive(
        ("optimizer.learning_rate", optimizer.learning_rate),
        ("optimizer.epsilon", optimizer.epsilon),
        ("optimizer.muon_learning_rate", optimizer.muon_learning_rate),
    )
    yield from _negative(
        ("optimizer.weight_decay", optimizer.weight_decay),
        *((f"optimizer.groups[{index}].learning_rate", g.learning_rate) for index, g in enumerate(optimizer.groups)),
    )
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        yield f"optimizer.betas={optimizer.betas} must be two numbers, each at least 0 and below 1"
    if not 0 <= optimizer.warmup_fraction <= 1:
        yield f"optimizer.warmup_fraction={optimizer.warmup_fraction} must lie between 0 and 1"
    if optimizer.muon_momentum is not None and not 0 <= optimizer.muon_momentum < 1:
        yield f"optimizer.muon_momentum={optimizer.muon_momentum} must be at least 0 and below 1"
    for key, value in (("learning_rate", optimizer.muon_learning_rate), ("momentum", optimizer.muon_momentum)):
        if (optimizer.name is OptimizerName.muon) != (value is not None):
            rule = "has no effect on optimizer=adamw: use optimizer=muon"
            needed = "is needed by optimizer=muon: set a number"
            yield f"optimizer.muon_{key}=null {needed}" if value is None else f"optimizer.muon_{key}={value} {rule}"


# The keys of a set that each format reads beside those that all do.
_FILES = {"path", "split", "evaluation_path", "evaluation_split"}
_HUB = {"subset", "revision"}
READS = {
    DataFormat.pairs: _FILES | _HUB | {"query_column", "positive_column", "negative_columns"},
    DataFormat.scored: _FILES | _HUB | {"query_column", "documents_column", "scores_column", "positive"},
    DataFormat.beir: {
        *("path", "split", "evaluation_split", "negatives", "run_path", "positive_grade", "ignore_identical_ids")
    },
    DataFormat.distillation_ids: _FILES | _HUB | {"positive"},
    DataFormat.stanford: {"path", "queries_path", "documents_path", "evaluation_path"},
    DataFormat.python_functions: set[str](),
    DataFormat.mix: set[str](),
}
_EVERY_FORMAT = {"evaluation_fraction", "max_empty", "documents_per_query", "draw"}
_EVERY_FORMAT |= {"query_length", "document_length", "query_prefix", "document_prefix"}
# Of those, what a set can do without, or has a rule of its own for.
_MAY_BE_NULL = {"subset", "revision", "split", "evaluation_path", "evaluation_split", "negative_columns", "run_path"}
TAUGHT = (DataFormat.scored, DataFormat.distillation_ids, DataFormat.stanford)


def _data_problems(data: DataConfig) -> Iterator[str]:
    yield from _set_problems("data", data)
    if (data.format is DataFormat.mix) != bool(data.mix):
        yield (
            f"data.mix={data.mix} has no effect on data={data.format.name}: use data=mix"
            if data.mix
            else "data.mix={}: data=mix needs the weights of its sets, as in data.mix={medquad: 2, lfrqa: 1}"
        )
    yield from _not_positive(
        *((f"data.mix.{name}", weight) for name, weight in data.mix.items()),
        ("data.length_window", data.length_window),
    )
    if not 0 <= data.mix_by_size <= 1:
        yield f"data.mix_by_size={data.mix_by_size} must lie between 0, the weights alone, and 1, the sizes"
    if set(data.sets) != set(data.mix):
        yield f"data.sets has {', '.join(data.sets)} and data.mix {', '.join(data.mix)}: name the same"
    if data.length_window is not None and data.mix and data.mix_batches is MixedBatch.all_sets:
        yield (
            f"data.length_window={data.length_window} sorts batches of one set, and data.mix_batches=all_sets makes "
            "none: set one of them otherwise"
        )
    for name, each in data.sets.items():
        yield from _set_problems(f"data.sets.{name}", each)
        if each.format is DataFormat.mix:
            yield f"data.mix.{name} is a mix itself: name the sets that it is made of"


def _set_problems(key: str, data: SetConfig) -> Iterator[str]:
    """Rules of one set; key: where it stands."""
    if data.documents_per_query is not None and data.documents_per_query < 1:
        yield f"{key}.documents_per_query={data.documents_per_query} must be 1 or more: a query keeps its positive"
    if data.evaluation_fraction is not None and not 0 <= data.evaluation_fraction < 1:
        yield f"{key}.evaluation_fraction={data.evaluation_fraction} must be at least 0 and below 1"
    if data.max_empty is not None and not 0 <= data.max_empty <= 1:
        yield f"{key}.max_empty={data.max_empty} must lie between 0 and 1"
    yield from _not_positive(
        (f"{key}.query_length", data.query_length),
        (f"{key}.document_length", data.document_length),
        (f"{key}.positive_grade", data.positive_grade),
    )
    reads = READS[data.format] | (_EVERY_FORMAT if data.format is not DataFormat.mix else set())
    for field in fields(SetConfig):
        value = getattr(data, field.name)
        if field.name in ("format", "root"):
            continue
        name = f"{key}.{field.name}"
        if field.name not in reads and value is not None:
            remedy = "set it to null"
            if data.format is DataFormat.mix:
                remedy = f"set data.sets.<set>.{field.name}"
            elif data.format is DataFormat.python_functions:
                remedy = "use data=pairs for files of your own"
            yield f"{name}={_shown(value)} has no effect on data={data.format.name}: {remedy}"
        if field.name in READS[data.format] - _MAY_BE_NULL and value is None:
            example = f", as in {name}={_EXAMPLES[field.name]}" if field.name in _EXAMPLES else ""
            yield f"{name}=null: data={data.format.name} needs it{example}"
    if data.format in (DataFormat.beir, DataFormat.distillation_ids) and data.split is None:
        what = "qrels/<split>.tsv" if data.format is DataFormat.beir else "a file of its folder"
        yield f"{key}.split=null: data={data.format.name} reads {what}: name it, as in {key}.split=train"
    if (
        data.format is DataFormat.distillation_ids
        and data.evaluation_path is not None
        and data.evaluation_split is None
    ):
        yield (
            f"{key}.evaluation_split=null: name the file of {key}.evaluation_path={data.evaluation_path}, "
            f"as in {key}.evaluation_split=test"
        )
    if data.format is DataFormat.beir and (data.negatives is Negatives.run) != (data.run_path is not None):
        yield (
            f"{key}.run_path={data.run_path} and {key}.negatives={_shown(data.negatives)}: a ranking is read where "
            f"both are set: name the file, and set {key}.negatives=run"
        )
    if data.draw is Draw.stratified and (data.format not in TAUGHT or data.documents_per_query is None):
        yield (
            f"{key}.draw=stratified draws some of the documents that a teacher scored: set {key}.documents_per_query, "
            f"and use one of data={', '.join(sorted(each.name for each in TAUGHT))}; or set it to uniform"
        )


_EXAMPLES = {
    "path": "mine.jsonl, a folder or owner/name",
    "queries_path": "queries.tsv",
    "documents_path": "collection.tsv",
}


def _shown(value: object) -> object:
    return value.name if isinstance(value, Enum) else value
