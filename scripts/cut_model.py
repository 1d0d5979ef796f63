"""Cut a model that was trained with loss.matryoshka to one of its widths: smaller vectors, the same tokens.

    python -m scripts.cut_model outputs/<name>/model 64 outputs/<name>/model_64

Any width up to the model's own will do; what one is worth that was not trained, only an evaluation can say. To load
what it writes takes sentence-transformers alone. The status is 2 where it wrote nothing.
"""

import argparse
import inspect
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from sentence_transformers import MultiVectorEncoder
from transformers.utils import logging as transformers_logging

from architectures.heads import cut_head

FLOAT16_BYTES = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Print where the cut model is, the size of its vectors, and how to load it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a saved model")
    parser.add_argument("width", help="components of the vectors")
    parser.add_argument("output", type=Path, help="folder to write, which must not exist")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if options.output.exists():
            raise ValueError(f"{options.output} exists: name a new folder")
        width = whole_number(options.width)
        encoder = load(options.model)
        before = encoder.get_embedding_dimension()
        cut_head(encoder, width)
        save(encoder, options.output)
    except ValueError as error:
        print(f"cut_model: {error}", file=sys.stderr)
        return 2
    assert before is not None, "cut_head has found the layer that says it"
    print(
        f"{options.output}: {width} of {before} components, that is {width * FLOAT16_BYTES} of "
        f"{before * FLOAT16_BYTES} bytes per token vector in float16\n"
        f"load it with sentence_transformers.MultiVectorEncoder({str(options.output)!r})"
    )
    return 0


def whole_number(width: str) -> int:
    """Read a width; argparse would answer a wrong one with its usage."""
    try:
        return int(width)
    except ValueError as error:
        raise ValueError(f"width={width} is not a whole number") from error


def load(folder: Path) -> MultiVectorEncoder:
    """Load a saved model in float32 on the CPU.

    Raises ValueError for a folder that holds none, or one without a head.
    """
    if not (folder / "modules.json").is_file():
        raise ValueError(f"{folder} is not the folder of a saved model: it has no modules.json")
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        has_head = any(module["type"].endswith(".Dense") for module in modules)
        encoder = MultiVectorEncoder(
            str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder} cannot be loaded ({reason}): is the model complete?") from error
    if not has_head:
        # The loader gives such a model a random one.
        raise ValueError(f"{folder} has no Dense layer that could be cut")
    backbone = encoder.transformers_model
    if backbone is not None and "add_pooling_layer" in inspect.signature(type(backbone)).parameters:
        # The loader draws a pooler that nothing uses where none was saved, and a save would keep it.
        backbone.register_module("pooler", None)
    return encoder


def save(encoder: MultiVectorEncoder, folder: Path) -> None:
    """Write a whole model or none; ValueError says why none."""
    # A loaded model keeps its card, with the width that it had; without one it writes a new card.
    encoder._model_card_text = None
    # The card's example has queries that fill the model's length, of which the library would warn.
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    try:
        folder.mkdir(parents=True)
        try:
            encoder.save_pretrained(str(folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be written ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
