"""What a run leaves in its folder, each written whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from configs.schema import Config, ConfigError, save_config

if TYPE_CHECKING:  # checked before this slow import is made
    from sentence_transformers import MultiVectorEncoder

CONFIG, METRICS, RESULT, FAILED_BATCH = "config.yaml", "metrics.jsonl", "result.json", "failed_batch.jsonl"
MODEL, BEST = "model", "best"


class RunFolder:
    """outputs/<name>/{config.yaml, metrics.jsonl, model/, best/, result.json}"""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output_dir)
        self._config = config

    def check(self) -> None:
        """Raise ConfigError where the folder holds a run that may not be replaced. Touches nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir={self.path} is a file: name a folder")
        if self._config.overwrite:
            return
        for file, kind in ((RESULT, "a finished run"), (CONFIG, "a run that did not finish")):
            if (self.path / file).exists():
                raise ConfigError(
                    f"output_dir={self.path} holds {kind}: set another name= or output_dir=, "
                    "or overwrite=true to replace it"
                )

    def create(self) -> None:
        """Make the folder, remove the run that it may replace, and write the config."""
        self.check()
        with self._errors(CONFIG):
            self.path.mkdir(parents=True, exist_ok=True)
            # By name: a folder given by mistake keeps all that no run has written.
            for name in (RESULT, METRICS, FAILED_BATCH, CONFIG, MODEL, BEST):
                _remove(self.path / name)
        with self._placed(CONFIG) as path:
            save_config(self._config, str(path))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Append the one line of a step to metrics.jsonl."""
        with self._errors(METRICS), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def save_model(self, encoder: "MultiVectorEncoder", name: str) -> Path:
        """Write the model as a folder that `MultiVectorEncoder` loads, and return it."""
        with self._placed(name) as path:
            encoder.save_pretrained(str(path))
        return self.path / name

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
        unfinished = self.path / f"{name}.unfinished"
        with self._errors(name):
            try:
                _remove(unfinished)
                yield unfinished
                _remove(self.path / name)
                unfinished.rename(self.path / name)
            except BaseException:
                _remove(unfinished)
                raise

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
            raise ConfigError(
                f"output_dir={self.path}: {name} cannot be written ({error}): "
                "free space on the disk or name another folder"
            ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
