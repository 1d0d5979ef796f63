"""Say what a model is: its layout, settings, modules and head, what each library can hold, and whether its vectors
depend on how they are computed.

    python scripts/inspect_model.py model=outputs/<name>/model
    python scripts/inspect_model.py model=colbertv2
    python scripts/inspect_model.py model=minilm head=study/best

model= is a folder, a Hub name or a member of configs/backbone; any other argument is one of train.py, such as head= or
backbone.trust_remote_code=true. The status is 1 where vectors differ by more
than 1e-4, and 2 where the model cannot be loaded.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from sentence_transformers import MultiVectorEncoder
from torch import Tensor

from architectures.doctor import describe_modules, diagnose
from architectures.layouts import read_checkpoint
from architectures.readers import vectors_of
from configs.reference import explain_composition
from configs.schema import ConfigError
from scripts.export import DOCUMENTS, LIMIT, QUERIES
from scripts.models import CONFIGS, compose_config, load_model
from trainer.console import make_console
from trainer.display import print_start
from trainer.start_table import describe_side


def main(arguments: Sequence[str]) -> int:
    """Print the modules and the facts of a model."""
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0
    models = [argument.removeprefix("model=") for argument in arguments if argument.startswith("model=")]
    overrides = [argument for argument in arguments if not argument.startswith("model=")]
    try:
        if len(models) != 1:
            problem = f"is given {len(models)} times" if models else "is missing"
            raise ConfigError(f"model= {problem}: give one folder, Hub name or member of configs/backbone")
        config = compose_config(models[0], *overrides)
        checkpoint = read_checkpoint(config.backbone)
        torch.manual_seed(config.seed)
        encoder = load_model(models[0], *overrides)
    except ConfigError as error:
        print(f"inspect_model: {error}", file=sys.stderr)
        return 2
    except (HydraException, OmegaConfBaseException) as error:
        print(f"inspect_model: {explain_composition(error, CONFIGS)}", file=sys.stderr)
        return 2
    differences = consistency(encoder)
    facts = {
        "checkpoint": f"{config.backbone.name}, {checkpoint.layout.value}",
        **diagnose(encoder),
        "queries": describe_side(encoder, "query"),
        "documents": describe_side(encoder, "document"),
        **{how: f"vectors at most {difference:.1e} apart" for how, difference in differences.items()},
    }
    print_start(make_console(), describe_modules(encoder), facts)
    if inconsistent := [how for how, difference in differences.items() if not difference <= LIMIT]:
        print(f"inspect_model: vectors depend on how they are computed ({', '.join(inconsistent)})", file=sys.stderr)
        return 1
    return 0


def consistency(encoder: MultiVectorEncoder) -> dict[str, float]:
    """The largest difference of vectors between a text alone and the same in a batch, which pads it to the longest, and
    between the attention that is set and eager."""
    alone = [
        *encode(encoder, QUERIES, "query", one_by_one=True),
        *encode(encoder, DOCUMENTS, "document", one_by_one=True),
    ]
    batch = [*encode(encoder, QUERIES, "query"), *encode(encoder, DOCUMENTS, "document")]
    differences = {"alone or in a batch": largest_difference(alone, batch)}
    backbone = encoder.transformers_model
    assert backbone is not None, "a text model"
    own = backbone.config._attn_implementation
    if own != "eager":
        backbone.set_attn_implementation("eager")
        eager = [*encode(encoder, QUERIES, "query"), *encode(encoder, DOCUMENTS, "document")]
        backbone.set_attn_implementation(own)
        differences[f"{own} or eager"] = largest_difference(batch, eager)
    return differences


def encode(encoder: MultiVectorEncoder, texts: list[str], task: str, *, one_by_one: bool = False) -> list[Tensor]:
    """The vectors of each text."""
    batches = [[text] for text in texts] if one_by_one else [texts]
    return [vectors for batch in batches for vectors in vectors_of(encoder, batch, task=task)]


def largest_difference(ones: list[Tensor], others: list[Tensor]) -> float:
    """Infinite where the numbers of tokens differ."""
    if any(one.shape != other.shape for one, other in zip(ones, others, strict=True)):
        return float("inf")
    return max(float((one - other).abs().max()) for one, other in zip(ones, others, strict=True) if len(one))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
