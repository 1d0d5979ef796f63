"""What is said of the libraries and of the machine, against other sources of both."""

import os
import platform
from pathlib import Path

import torch

from trainer.environment import hardware, versions


def test_versions_are_those_that_run() -> None:
    found = versions()
    assert next(iter(found.items())) == ("python", platform.python_version())
    assert found["torch"] == torch.__version__
    assert set(found) >= {"lateforge", "transformers", "sentence-transformers", "accelerate", "datasets"}


def test_hardware_is_that_of_this_machine() -> None:
    found = hardware(torch.device("cpu"))
    assert found["device"] == "cpu"
    assert found["cores"].startswith(f"{os.cpu_count()}, ")
    if Path("/proc/meminfo").exists():
        [total] = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:")]
        assert found["memory"] == f"{int(total.split()[1]) / 2**20:.0f} GiB"
    assert found["processor"].endswith(platform.machine())
    if Path("/proc/cpuinfo").exists():
        assert found["processor"].partition(", ")[0] in Path("/proc/cpuinfo").read_text()
