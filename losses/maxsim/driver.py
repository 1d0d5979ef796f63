"""Cubins on torch's devices, contexts and streams, launched through the CUDA driver.

A launch is short in Python: a kernel's handle and its shared memory are settled once, and the one object made is the
array of pointers to the arguments. Nothing here synchronises, so a launch can be captured into a CUDA graph; the first
launch of a kernel loads it and belongs before the capture.

Modules (cuModuleLoadData) and not the context-free libraries of CUDA 12: shared memory is set for one device in either,
taking a module's function loads it, so that no later launch does, and every driver that torch supports has them.
"""

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

BOX_COLUMNS = 64  # 128 bytes of a 16-bit type: what the 128-byte swizzle permutes
TensorMap = ctypes.c_ubyte * 128


class Module:
    """The kernels of one cubin on one device; it stays loaded as long as the process.

    Raises RuntimeError, with the driver's reason, where the device cannot run the cubin.
    """

    def __init__(self, cubin: bytes, device: torch.device) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._device_index = _index(device)
        self._functions: dict[str, Any] = {}
        self._shared_bytes: dict[str, int] = {}
        self._lock = threading.Lock()
        with _Current(self._device_index):
            status, self._module = driver.cuModuleLoadData(cubin)
        _check(status, f"loading {len(cubin)} bytes of kernels on {device}")

    def launch(
        self,
        kernel: str,
        *,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[ctypes.Structure | ctypes.Array[Any]],
    ) -> None:
        """Queue a kernel on torch's current stream of the device; the call returns before the kernel has run.

        arguments: one by-value parameter each, laid out as the kernel declares it: the driver reads as many bytes as
        the kernel's own parameter has. They may go as soon as the call returns, the memory that they point to may not.
        shared_bytes: dynamic ones, of a block.
        Raises RuntimeError, also for an error that an earlier kernel left behind.
        """
        with _Current(self._device_index):
            if shared_bytes > self._shared_bytes.get(kernel, -1):
                self._prepare(kernel, shared_bytes)
            pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
            stream = torch.cuda.current_stream(self._device_index).cuda_stream
            # An int or a buffer is taken as the void** itself; the tuples that cuda-bindings also takes are repacked.
            (status,) = self._driver.cuLaunchKernel(
                self._functions[kernel], *grid, 1, threads, 1, 1, shared_bytes, stream, ctypes.addressof(pointers), 0
            )
        if status:
            _check(status, f"{kernel} with grid {grid}, {threads} threads, {shared_bytes} bytes of shared memory")

    def _prepare(self, kernel: str, shared_bytes: int) -> None:
        """Load a kernel, and allow it more dynamic shared memory than any launch before had."""
        with self._lock:
            if kernel not in self._functions:
                status, function = self._driver.cuModuleGetFunction(self._module, kernel.encode())
                _check(status, f"loading {kernel}")
                self._functions[kernel] = function
            # Without this 48 KiB, static ones included, are the limit. Never lowered: another thread may need more.
            if shared_bytes > self._shared_bytes.get(kernel, 0):
                attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                (status,) = self._driver.cuFuncSetAttribute(self._functions[kernel], attribute, shared_bytes)
                _check(status, f"{kernel} with {shared_bytes} bytes of shared memory")
            self._shared_bytes[kernel] = max(shared_bytes, self._shared_bytes.get(kernel, 0))


def tensor_map(tensor: Tensor, *, box_rows: int) -> ctypes.Array[ctypes.c_ubyte]:
    """Describe a matrix to the tensor memory accelerator, for a parameter `const __grid_constant__ CUtensorMap`.

    tensor: (rows, H) bfloat16 or float16 on a GPU, rows 16-byte aligned. A box has 64 columns and box_rows <= 256 rows,
    is swizzled by 128 bytes, and is filled with zeros outside of the matrix.
    Returns 128 bytes, aligned to 128; the tensor must outlive the kernel that reads by it.
    Raises RuntimeError if the driver refuses it.
    """
    rows, columns = tensor.shape
    address, row_bytes = tensor.data_ptr(), 2 * tensor.stride(0)
    assert rows > 0
    assert columns > 0
    assert tensor.stride(1) == 1
    assert address % 16 == row_bytes % 16 == 0
    assert 1 <= box_rows <= 256
    encode, types, options = _encoder()
    box = _Box(columns, rows, row_bytes, BOX_COLUMNS, box_rows, 1, 1)
    at = ctypes.addressof(box)
    memory = (ctypes.c_ubyte * 256)()
    encoded = TensorMap.from_buffer(memory, -ctypes.addressof(memory) % 128)
    with _Current(_index(tensor.device)):  # without a context the driver refuses even this
        status = encode(
            ctypes.addressof(encoded), types[tensor.dtype], 2, address, at, at + 16, at + 24, at + 32, *options
        )
    if status:
        _check(status, f"a tensor map of {tuple(tensor.shape)}, stride {row_bytes} bytes, box of {box_rows} rows")
    return encoded


class _Box(ctypes.Structure):
    """The four arrays that cuTensorMapEncodeTiled reads: sizes, stride, box and element strides, columns first."""

    _fields_ = [
        ("columns", ctypes.c_uint64),
        ("rows", ctypes.c_uint64),
        ("row_bytes", ctypes.c_uint64),
        ("box_columns", ctypes.c_uint32),
        ("box_rows", ctypes.c_uint32),
        ("column_step", ctypes.c_uint32),
        ("row_step", ctypes.c_uint32),
    ]


@functools.cache
def _encoder() -> tuple[Callable[..., int], dict[torch.dtype, int], tuple[int, ...]]:
    """cuTensorMapEncodeTiled, its codes of types, and its last four arguments."""
    from cuda.bindings import driver

    # By address: the binding's own function encodes into a Python object, which is aligned to 16 bytes and not to 64
    # (https://github.com/NVIDIA/cuda-python/pull/1692).
    status, address, _ = driver.cuGetProcAddress(b"cuTensorMapEncodeTiled", 12000, 0)
    _check(status, "cuTensorMapEncodeTiled")
    code, number, pointer = ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p
    prototype = ctypes.CFUNCTYPE(code, pointer, code, number, *[pointer] * 5, *[code] * 4)
    types = {
        torch.bfloat16: int(driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16),
        torch.float16: int(driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16),
    }
    options = (
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return prototype(address), types, tuple(int(option) for option in options)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class _Current:
    """torch's context of a device for the length of a block; afterwards the thread has what it had before.

    autograd's threads may have none yet (https://github.com/pytorch/pytorch/issues/124565), other threads that of
    another device. Asking costs 0.2 us; a memory of the answer would go stale with torch.cuda.set_device.
    """

    __slots__ = ("_driver", "_previous", "_target")

    def __init__(self, index: int) -> None:
        self._driver, self._target = _primary_context(index)
        self._previous: Any = None

    def __enter__(self) -> None:
        status, current = self._driver.cuCtxGetCurrent()
        if status:
            _check(status, "the current context")
        if int(current) != self._target:
            _check(self._driver.cuCtxSetCurrent(self._target)[0], "making a context current")
            self._previous = current

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            _check(self._driver.cuCtxSetCurrent(self._previous)[0], "restoring a context")


@functools.cache
def _primary_context(index: int) -> tuple[Any, int]:
    """The binding, and the context that the runtime, and so torch, uses on a device: the primary one."""
    from cuda.bindings import driver

    _check(driver.cuInit(0)[0], "cuInit")
    status, device = driver.cuDeviceGet(index)
    _check(status, f"device {index}")
    status, context = driver.cuDevicePrimaryCtxRetain(device)
    _check(status, f"the context of device {index}")
    return driver, int(context)


def _check(status: int, what: str) -> None:
    if status:
        from cuda.bindings import driver

        result = driver.CUresult(status)
        _, name = driver.cuGetErrorName(result)
        _, text = driver.cuGetErrorString(result)
        raise RuntimeError(f"{what}: {(name or b'CUDA error').decode()} ({int(status)}): {(text or b'').decode()}")
