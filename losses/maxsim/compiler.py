"""CUDA C++ text to a cubin, by NVRTC: no toolkit, no host compiler, no GPU.

A cubin and not PTX: a driver older than NVRTC refuses its PTX, while it runs its SASS. A cubin lies in the cache folder
under a key of source, options, architecture and NVRTC's version; behind it in its file stands its sha256.
"""

import functools
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

# -v puts registers and spills of each kernel into the log. It changes the cubin's notes, so both functions pass it.
OPTIONS = ("--std=c++20", "--ptxas-options=-v")
REMEDY = "pip install 'lateforge[cuda]'"


class CompileError(RuntimeError):
    """NVRTC is missing or refused the text; the message carries the architecture and NVRTC's log."""


def unavailable() -> str | None:
    """None where NVRTC can compile, else a clause that says what is missing and the remedy."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        return f"cuda-bindings cannot be imported ({error}): {REMEDY}"
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the library is loaded by the first call
        return f"libnvrtc cannot be loaded ({str(error).splitlines()[0]}): {REMEDY}"
    return None


def compile_cubin(source: str, *, architecture: str, defines: Mapping[str, int]) -> bytes:
    """Compile, or read what an earlier process compiled.

    source: text without #include; architecture: as `sm_80`, `sm_90a`; defines: macros and their values.
    Raises CompileError.
    """
    name = f"{_key(source, architecture, defines)}.cubin"
    cubin = _read(name)
    if cubin is None:
        cubin, _ = compile_with_log(source, architecture=architecture, defines=defines)
        _write(name, cubin)
    return cubin


def compile_with_log(source: str, *, architecture: str, defines: Mapping[str, int]) -> tuple[bytes, str]:
    """Compile without the cache; also return what the compiler and ptxas said.

    The log has `0 bytes spill stores, 0 bytes spill loads` and `Used 48 registers` for each kernel, and `(C7510)` and
    its neighbours where ptxas serialises wgmma.
    Raises CompileError.
    """
    version = nvrtc_version()
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={architecture}", *OPTIONS, *(f"-D{name}={defines[name]}" for name in defines)]
    status, program = nvrtc.nvrtcCreateProgram(source.encode(), b"maxsim.cu", 0, None, None)
    if status:
        raise CompileError(f"NVRTC {version} made no program for {architecture}: {status.name}")
    try:
        (compiled,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        # bytearray: NVRTC writes into what it is given, and an empty log would overwrite the interpreter's own b" ".
        log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.rstrip(b"\0").decode(errors="replace")
        if compiled:
            raise CompileError(f"NVRTC {version} cannot compile for {architecture}: {compiled.name}\n{text}")
        cubin = bytearray(nvrtc.nvrtcGetCUBINSize(program)[1])
        nvrtc.nvrtcGetCUBIN(program, cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin), text


def cache_folder() -> Path:
    """The user's cache, where the platform's standard puts it: a relative XDG_CACHE_HOME does not count."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "lateforge" / "maxsim"


def nvrtc_version() -> str:
    """The version of the compiler, as `13.0`; it decides, with the source, what a cubin is. Raises CompileError."""
    missing = unavailable()
    if missing is not None:
        raise CompileError(missing)
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def _key(source: str, architecture: str, defines: Mapping[str, int]) -> str:
    decisive = [source, architecture, sorted(defines.items()), OPTIONS, nvrtc_version()]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _read(name: str) -> bytes | None:
    try:
        content = (cache_folder() / name).read_bytes()
    except (OSError, RuntimeError):  # not there, or no home; a folder out of order is reported when it is written
        return None
    cubin, checksum = content[:-32], content[-32:]
    # A truncated or damaged file is as good as none: it is compiled anew and replaced.
    return cubin if cubin and hashlib.sha256(cubin).digest() == checksum else None


def _write(name: str, cubin: bytes) -> None:
    try:
        folder = cache_folder()
    except RuntimeError as error:
        _warn_once("the cache", str(error))
        return
    part = folder / f".{name}.{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(cubin + hashlib.sha256(cubin).digest())
            # Of two processes the later one replaces equal bytes; a reader sees a whole file or none.
            part.replace(folder / name)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        _warn_once(str(folder), error.strerror or type(error).__name__)


@functools.cache
def _warn_once(folder: str, reason: str) -> None:
    logger.warning("MaxSim's kernels are compiled anew by each process: %s cannot be written: %s", folder, reason)
