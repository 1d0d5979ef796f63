"""What a resumed run needs, on disk without pickle: weights and moments as safetensors, the rest as JSON.

The order of the examples is a pure function of seed, epoch and step, so the step is the position in the data.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


class UnreadableCheckpoint(Exception):
    """A checkpoint that is not whole."""


@dataclass
class Progress:
    """What a run has done so far, each a number or a dictionary of numbers."""

    step: int = 0
    """Optimiser steps that are done; the next batch is that of this step, counted from 0."""
    totals: dict[str, float] = field(
        default_factory=lambda: {"queries": 0, "tokens": 0, "padded_tokens": 0, "seconds": 0.0}
    )
    """Over all steps and processes; seconds of the steps alone."""
    before: dict[str, float] | None = None
    """Metrics before training."""
    after: dict[str, float] | None = None
    """Metrics at the last evaluation."""
    evaluation_id: int = 0
    """Of the queries that both were scored on; 0 without any."""
    best: float | None = None
    """Best value of evaluation.metric during training."""
    best_step: int = 0
    """The step that had it."""
    seconds: float = 0.0
    """Wall-clock time, evaluations and saves included."""


@dataclass
class TrainState:
    """All that a resumed run needs."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: GradScaler | None
    """Of fp16."""
    progress: Progress = field(default_factory=Progress)

    def save(self, folder: Path, random_states: list[dict[str, Any]]) -> None:
        """Write the state as a folder.

        random_states: what `random_state` gave on each process.
        """
        folder.mkdir()
        save_model(self.model, str(folder / MODEL))
        optimizer = self.optimizer.state_dict()
        tensors = {
            f"{parameter}/{name}": value
            for parameter, moments in optimizer["state"].items()
            for name, value in moments.items()
        }
        save_file(tensors, folder / OPTIMIZER)
        state = {
            "progress": vars(self.progress),
            "schedule": self.schedule.state_dict(),
            "parameter_groups": optimizer["param_groups"],
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "random_states": random_states,
        }
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> list[dict[str, Any]]:
        """Take the state of a folder and return its random states, one a process.

        Raises UnreadableCheckpoint, and then has changed nothing, where a file is missing or cut short.
        """
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            # Copies: on a CPU the optimiser would keep the file open, which is removed one day.
            tensors = {key: value.clone() for key, value in load_file(folder / OPTIMIZER).items()}
            load_model(self.model, folder / MODEL)  # last: it is the one that changes something
        except (FileNotFoundError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
            reason = str(error) or type(error).__name__
            raise UnreadableCheckpoint(f"{folder} is not whole ({reason})") from error
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            parameter, _, name = key.partition("/")
            moments.setdefault(int(parameter), {})[name] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": state["parameter_groups"]})
        # The rate is set once more: a run that was made longer has another schedule.
        self.schedule.load_state_dict(state["schedule"] | {"last_epoch": state["schedule"]["last_epoch"] - 1})
        self.schedule.step()
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        random_states: list[dict[str, Any]] = state["random_states"]
        return random_states


def gather_random_states() -> list[dict[str, Any]]:
    """The random states of all processes, in their order. Every process must call it."""
    states: list[dict[str, Any]] = gather_object([random_state()])
    return states


def random_state() -> dict[str, Any]:
    """The state of every generator that dropout and library code draw from, as JSON takes it."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every generator back to what `random_state` saw."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _text(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _tensor(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
