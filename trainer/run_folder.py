"""What a run leaves in its folder, each written whole or not at all."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import Config, ConfigError, save_config

if TYPE_CHECKING:  # checked before this slow import is made
    from sentence_transformers import MultiVectorEncoder

CONFIG, METRICS, RESULT, FAILED_BATCH = "config.yaml", "metrics.jsonl", "result.json", "failed_batch.jsonl"
MODEL, BEST = "model", "best"
LEFT = (RESULT, CONFIG, METRICS, FAILED_BATCH, MODEL, BEST)


class RunFolder:
    """outputs/<name>/{config.yaml, metrics.jsonl, model/, best/, result.json}"""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output_dir)
        self._config = config

    def check(self) -> None:
        """Raise ConfigError where the folder holds a run that may not be replaced, or this one's input.

        Touches nothing.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir={self.path} is a file: name a folder")
        held = [name for name in LEFT if (self.path / name).exists()]
        if held and not self._config.overwrite:
            kind = "a finished run" if RESULT in held else f"a run that did not finish ({', '.join(held)})"
            raise ConfigError(
                f"output_dir={self.path} holds {kind}: set another name= or output_dir=, "
                "or overwrite=true to replace it"
            )
        for key, value in (("backbone.name", self._config.backbone.name), ("data.path", self._config.data.path)):
            inside = value is not None and Path(value).resolve().is_relative_to(self.path.resolve())
            if inside and held:
                raise ConfigError(f"{key}={value} lies in output_dir={self.path}, which is replaced: set another name=")

    def create(self) -> None:
        """Make the folder, remove the run that it may replace, and write the config."""
        self.check()
        with self._errors(CONFIG):
            self.path.mkdir(parents=True, exist_ok=True)
            # By name: a folder given by mistake keeps all that no run has written.
            for name in LEFT:
                _remove(self.path / name)
        with self._placed(CONFIG) as path:
            save_config(self._config, str(path))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append the one line of a step to metrics.jsonl."""
        with self._errors(METRICS), (self.path / METRICS).open("a", encoding="utf-8") as file:
            # JSON has no infinity, which the gradient norm of a skipped fp16 step is.
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def save_model(self, encoder: "MultiVectorEncoder", name: str) -> Path:
        """Write the model as a folder that `MultiVectorEncoder` loads, and return it."""
        with self._placed(name) as path:
            encoder.save_pretrained(str(path))
        return self.path / name

    def remove_model(self, name: str) -> None:
        """Remove a model that is no longer what its name says."""
        with self._errors(name):
            _remove(self.path / name)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json, the sign that the run is finished."""
        with self._placed(RESULT) as path:
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    def write_failed_batch(self, examples: list[dict[str, Any]]) -> Path:
        """Write the examples of the batch that stopped the run, one a line, and return the file."""
        with self._placed(FAILED_BATCH) as path:
            path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
        return self.path / FAILED_BATCH

    @contextmanager
    def _placed(self, name: str) -> Iterator[Path]:
        """A path to write to, which becomes `name` once all is written and goes where anything fails."""
        target, unfinished, old = (self.path / f"{name}{suffix}" for suffix in ("", ".unfinished", ".old"))
        with self._errors(name):
            try:
                _remove(unfinished)
                yield unfinished
                if target.is_dir():  # a folder cannot be replaced in one move
                    target.rename(old)
                unfinished.replace(target)
                _remove(old)
            except BaseException:
                _remove(unfinished)
                raise

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # safetensors and tokenizers report a full disk by exceptions of their own.
            if not isinstance(error, OSError) and "(os error" not in str(error):
                raise
            raise ConfigError(
                f"output_dir={self.path}: {name} cannot be written ({error}): "
                "free space on the disk or name another folder"
            ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
