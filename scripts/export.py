"""Hand a model on in the layout of another library, read it back as that library does, and compare the scores.

    python scripts/export.py model=outputs/<name>/model format=pylate
    python scripts/export.py model=outputs/<name>/model format=all
    python scripts/export.py model=outputs/<name>/model format=stanford fold=true
    python scripts/export.py model=outputs/<name>/model format=sentence_transformers width=64 output=model_64

format= sentence_transformers, pylate, stanford, or all that can hold the model; fold=true writes a linear head as one
layer; width= cuts the vectors, as a model that was trained with loss.matryoshka allows; output= is the folder, which
must not exist: by default beside the model, <model>_<format>. model= is a folder, a Hub name or a member of
configs/backbone; revision=, trust_remote_code=true and allow_pickle=true are the keys of configs/backbone.
The largest difference of scores over a fixed set of texts is printed; above 1e-4 nothing is left. The status is 2 where
something that was asked for could not be written.
"""

import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from sentence_transformers import MultiVectorEncoder
from torch import Tensor

from architectures.export import Format, how_to_load, obstacle, runs_own_code, write_layout
from architectures.heads import cut_head, fold_head
from architectures.layouts import read_checkpoint
from architectures.readers import read_export, vectors_of
from configs.reference import explain_composition
from configs.schema import ConfigError, assignment, explain
from losses.maxsim import maxsim
from scripts.models import CONFIGS, compose_config, load_model

LIMIT = 1e-4
# Short, long, repeated, punctuated, cased, accented, in other scripts, a marker typed as text, and empty.
QUERIES = [
    "what is a cat?",
    "How do I open a file, read its lines & close it again in Python 3.11",
    "naïve café déjà-vu",
    "treatment of type-2 diabetes in adults: metformin (500 mg) vs. insulin; which one first?",
    "[Q] who wrote [MASK] and [unused0]?",
    "东京 Москва αβγ",
    "a query that is longer than most models let a query be, since nobody stops asking " * 8,
    "a",
    "",
]
DOCUMENTS = [
    "The cat (Felis catus) is a domestic species of small carnivorous mammal.",
    "with open(path, encoding='utf-8') as file:\n    return [line.rstrip() for line in file]  # closed on exit",
    'Café society was the "beautiful people" and "bright young things" who gathered in fashionable cafés.',
    "Metformin is the first-line medication. " * 100,  # longer than most models let a document be
    "!!! ... ??? --- ((())) ;;; ,,,",
    "[D] a document that begins with its own marker",
    "東京は日本の首都である。 Москва — столица России.",
    "Dog dog dog dog, dog dog.",
    "a",
    "",
]


@dataclass
class Options:
    """The arguments, each key=value."""

    model: str
    format: str
    output: str | None = None
    fold: bool = False
    width: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


def main(arguments: Sequence[str]) -> int:
    """Print where each export is, how far its scores are, and how to load it."""
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0
    try:
        options = parse(arguments)
        if options.format != "all":
            output_of(options, Format[options.format])
        overrides = [
            f"backbone.trust_remote_code={options.trust_remote_code}",
            f"backbone.allow_pickle={options.allow_pickle}",
        ]
        if options.revision is not None:
            overrides.append(assignment("backbone.revision", options.revision))
        if not read_checkpoint(compose_config(options.model, *overrides).backbone).has_head:
            raise ValueError(f"model={options.model} has no projection head, and a new one is random: train it first")
        encoder = load_model(options.model, *overrides)
        before = scores_of(lambda texts, *, task: vectors_of(encoder, texts, task=task))
        if options.fold:
            fold_head(encoder)
        if options.width is not None:
            cut_head(encoder, options.width)
            before = scores_of(lambda texts, *, task: vectors_of(encoder, texts, task=task))
        chosen = list(Format) if options.format == "all" else [Format[options.format]]
        held = [layout for layout in Format if obstacle(encoder, layout) is None]
        folders = {layout: output_of(options, layout) for layout in chosen if layout in held}
        for layout in chosen:
            if reason := obstacle(encoder, layout):
                problem = f"format={layout.name} cannot hold {options.model}: {reason}"
                if options.format != "all":
                    raise ValueError(f"{problem}; formats that work: {', '.join(each.name for each in held)}")
                print(f"{problem}\n")
                continue
            folder = folders[layout]
            difference = export(encoder, layout, folder, before, source=Path(options.model), options=options)
            lines = how_to_load(layout, str(folder), trust=runs_own_code(encoder, layout))
            print(f"{folder}: {layout.value}, scores at most {difference:.1e} apart; load it with")
            print("".join(f"    {line}\n" for line in lines.splitlines()))
    except (ValueError, ConfigError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    except (HydraException, OmegaConfBaseException) as error:
        print(f"export: {explain_composition(error, CONFIGS)}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str]) -> Options:
    """Raises ValueError for a key or a value that there is not."""
    try:
        given = {}
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if not equals:
                raise ValueError(f"{argument}: the arguments are {_known()}")
            # As it is typed: a folder may have the name of a number.
            given[key] = None if value == "null" else value
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), given))
    except OmegaConfBaseException as error:
        raise ValueError(f"{explain(error).partition(' is no key')[0]}: the arguments are {_known()}") from error
    assert isinstance(options, Options)
    names = [*(layout.name for layout in Format), "all"]
    if options.format not in names:
        raise ValueError(f"format={options.format} must be one of {', '.join(names)}")
    return options


def _known() -> str:
    return ", ".join(f"{name}=" for name in Options.__annotations__)


def output_of(options: Options, layout: Format) -> Path:
    """The folder that receives an export. Raises ValueError where it exists."""
    name = options.output or f"{options.model.rstrip('/')}_{layout.name}"
    if options.output is not None and options.format == "all":
        name = f"{options.output}/{layout.name}"
    elif options.output is None and not Path(options.model).is_dir():
        name = f"{options.model.replace('/', '--')}_{layout.name}"
    if Path(name).exists():
        raise ValueError(f"output={name} exists: name a new folder")
    return Path(name)


def export(
    encoder: MultiVectorEncoder, layout: Format, folder: Path, before: Tensor, *, source: Path, options: Options
) -> float:
    """Write, read back and compare; return the largest difference of scores. Leaves a whole export or nothing.

    Raises ValueError where the scores are too far apart, or the disk refuses.
    """
    trusted = runs_own_code(encoder, layout)
    unfinished = folder.with_name(folder.name + ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_layout(encoder, layout, unfinished)
        after = scores_of(read_export(unfinished, layout, trust_remote_code=trusted))
        difference = float((after - before).abs().max())
        if not difference <= LIMIT:
            raise ValueError(
                f"format={layout.name}: read back, scores are {difference:.1e} apart, above {LIMIT:g}; nothing is left"
            )
        write_card(
            source / "README.md",
            unfinished / "README.md",
            f"In the layout of {layout.value}; read back, scores over a fixed set of texts are at most "
            f"{difference:.1e} apart from the model's own.{_changes(options)}\n\n"
            f"```python\n{how_to_load(layout, str(folder), trust=trusted)}\n```\n",
        )
        unfinished.rename(folder)
    except Exception as error:
        # safetensors and tokenizers report a full disk by exceptions of their own.
        if not isinstance(error, OSError | SafetensorError) and "(os error" not in str(error):
            raise
        raise ValueError(f"output={folder} cannot be written or read back ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return difference


def _changes(options: Options) -> str:
    """What the card of the model, which follows, does not know."""
    changes = ["its head is written as one layer"] if options.fold else []
    changes += [f"its vectors are cut to {options.width} components"] if options.width is not None else []
    return f" Of the model below, {' and '.join(changes)}." if changes else ""


def scores_of(read: Callable[..., list[Tensor]]) -> Tensor:
    """Score every query with every document, (queries, documents); those without a token score 0."""
    sides = [pad(read(texts, task=task)) for texts, task in ((QUERIES, "query"), (DOCUMENTS, "document"))]
    (queries, query_mask), (documents, document_mask) = sides
    return maxsim(queries, documents, query_mask, document_mask)


def pad(vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Vectors (N, J, H) and their mask (N, J)."""
    padded = torch.nn.utils.rnn.pad_sequence([one.float().cpu() for one in vectors], batch_first=True)
    lengths = torch.tensor([len(one) for one in vectors])
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def write_card(own: Path, card: Path, said: str) -> None:
    """The card of the model, if it has one, below what is said of this export."""
    text = own.read_text(encoding="utf-8") if own.is_file() else ""
    metadata, rest = "", text
    if text.startswith("---\n"):
        head, _, rest = text.removeprefix("---\n").partition("\n---\n")
        metadata = f"---\n{head}\n---\n\n"
    card.write_text(f"{metadata}{said}{rest}", encoding="utf-8")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main(sys.argv[1:]))
