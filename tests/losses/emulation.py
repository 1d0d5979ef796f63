"""The CUDA kernels on the host: their own text, compiled by g++ against an emulator of what a GPU does.

`EmulatedModule` stands where `losses.maxsim.driver.Module` stands on a GPU, so all of `kernels.py` runs as well.
"""

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losses.maxsim import kernels

SOURCES = Path(kernels.__file__).parent / "sources"
EMULATOR = Path(__file__).parent / "emulator"


class TensorMap(ctypes.Structure):
    """`struct TensorMap` of `emulator.h`."""

    _fields_ = [
        ("base", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("box_rows", ctypes.c_int),
        ("box_columns", ctypes.c_int),
        ("padding", ctypes.c_ubyte * 96),
    ]


class EmulatedModule:
    """seed: 0 runs the threads in plain order, any other number in an order drawn from it."""

    def __init__(self, library: Path, *, seed: int = 0) -> None:
        loaded = ctypes.CDLL(str(library))
        self._launch = loaded.launch
        self.document_parts = loaded.parts
        self.seed = seed
        self.launched: list[str] = []

    def launch(
        self, kernel: str, *, grid: tuple[int, int], threads: int, shared_bytes: int, arguments: list[Any]
    ) -> None:
        error = ctypes.create_string_buffer(1000)
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self.launched.append(kernel)
        if self._launch(
            kernel.encode(),
            *grid,
            threads,
            ctypes.c_uint64(shared_bytes),
            self.seed,
            pointers,
            error,
            ctypes.c_uint64(1000),
        ):
            raise RuntimeError(error.value.decode())


def tensor_map(tensor: Tensor, *, box_rows: int) -> TensorMap:
    rows, columns = tensor.shape
    return TensorMap(tensor.data_ptr(), rows, columns, box_rows, 64)


def build(folder: Path, defines: Mapping[str, int], sources: Path = SOURCES) -> Path:
    """Compile the kernels for the host into a shared library below `folder`, once for all processes that share it."""
    text = "".join(path.read_text() for path in sorted([*sources.glob("*.cuh"), *EMULATOR.iterdir()]))
    key = hashlib.sha256(repr((text, sorted(defines.items()))).encode()).hexdigest()[:16]
    library = folder / f"{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{key}.{os.getpid()}"
        command = ["c++", "-std=c++20", "-O2", "-w", "-Wno-psabi", "-shared", "-fPIC", f"-I{sources}", f"-I{EMULATOR}"]
        command += [f"-D{name}={value}" for name, value in defines.items()]
        command += [str(EMULATOR / "launch.cpp"), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        unfinished.replace(library)
    return library


def program(folder: Path, embedding: int, dtype: torch.dtype, *, sm90: bool, seed: int = 0) -> kernels.Program:
    """Return the kernels as `kernels.load` does. Few multiprocessors, so that blocks get several documents each."""
    numbers = kernels.constants(embedding, dtype)
    return kernels.Program(EmulatedModule(build(folder, numbers), seed=seed), tensor_map, numbers, 2, 228 * 1024, sm90)
