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
        with self._writing(CONFIG):
            self.path.mkdir(parents=True, exist_ok=True)
            # By name: a folder given by mistake keeps all that no run has written.
            for name in (RESULT, METRICS, FAILED_BATCH, CONFIG):
                (self.path / name).unlink(missing_ok=True)
            for name in (MODEL, BEST):
                shutil.rmtree(self.path / name, ignore_errors=True)
            save_config(self._config, str(self.path / CONFIG))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Append the one line of a step to metrics.jsonl."""
        with self._writing(METRICS), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def save_model(self, encoder: "MultiVectorEncoder", name: str) -> Path:
        """Write the model beside its place, then move it there; a failed write leaves nothing."""
        target, unfinished = self.path / name, self.path / f"{name}.unfinished"
        with self._writing(name):
            try:
                shutil.rmtree(unfinished, ignore_errors=True)
                encoder.save_pretrained(str(unfinished))
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
        return target

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json, the sign that the run is finished."""
        with self._writing(RESULT):
            unfinished = self.path / f"{RESULT}.unfinished"
            unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            unfinished.rename(self.path / RESULT)

    def write_failed_batch(self, examples: list[dict[str, Any]]) -> Path:
        """Write the examples of the batch that stopped the run, one a line."""
        path = self.path / FAILED_BATCH
        with self._writing(FAILED_BATCH):
            path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
        return path

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        # safetensors reports a full disk as an error of its own.
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"output_dir={self.path}: {name} cannot be written ({error}): "
                "free space on the disk or name another folder"
            ) from error
