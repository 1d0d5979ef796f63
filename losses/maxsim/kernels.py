"""MaxSim by the CUDA kernels in `sources/`: what they are compiled with, what they are given, how they are launched.

The module that runs them is an argument of `load`, so that a test can run the kernels' own text on the host.

Q queries, N documents, I query tokens, J document tokens, H embedding size; for packed vectors I and J are the longest.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import ceil
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from losses.maxsim import compiler, driver

DTYPES = (torch.bfloat16, torch.float16)
LARGEST_EMBEDDING = 256
LONGEST_TEXT = 65_535
"""Tokens of a text: a winner is a 16-bit number, of which one means none."""
MOST_TOKENS = 2**31 - 1
"""Tokens of a side, padding included: TMA counts rows in 32 bits. Offsets into memory have 64."""
SLAB = 16
"""Rows of a tensor-core tile: scored tokens of one query."""
FORWARD_WARPS = 8


class Module(Protocol):
    """A loaded cubin: `losses.maxsim.driver.Module`, or the host emulator of the tests."""

    def launch(
        self, kernel: str, *, grid: tuple[int, int], threads: int, shared_bytes: int, arguments: list[Any]
    ) -> None: ...


class Index(NamedTuple):
    """Where the scored tokens lie, from the forward kernels to the backward ones."""

    counts: Tensor
    """int32: query lengths (Q), first slabs (Q + 1), documents' lengths (N), query of each slab (slabs)."""
    positions: Tensor
    """int16: places of scored tokens, as many as both masks have elements."""


class Side(NamedTuple):
    """Queries or documents: padded (texts, tokens, H) with a mask, or packed (tokens, H) with offsets."""

    vectors: Tensor
    mask: Tensor | None
    """(texts, tokens) bool; None for packed vectors, all of which are scored."""
    offsets: Tensor | None
    """(texts + 1) int64, the first token of each text and the end of the last; None for padded vectors."""
    longest: int
    """Tokens of the longest text; of each where they are padded."""

    @property
    def texts(self) -> int:
        return self.vectors.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def embedding(self) -> int:
        return self.vectors.shape[-1]


class Arguments(ctypes.Structure):
    """`struct Arguments` of `sources/types.cuh`, field by field."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("queries", "documents", "compacted", "query_mask", "document_mask"),
                *("query_offsets", "document_offsets", "query_lengths", "slab_starts", "slab_queries"),
                *("query_positions", "document_lengths", "document_positions", "partial", "scores", "winners"),
                *("gradient", "query_gradient", "document_gradient"),
            )
        ),
        *((name, ctypes.c_int) for name in ("num_queries", "query_tokens", "num_documents", "document_tokens")),
        *((name, ctypes.c_int) for name in ("candidates", "slabs", "blocks_at_once")),
    ]


def constants(embedding: int, dtype: torch.dtype) -> dict[str, int]:
    """The numbers that the sources are compiled with, and that say how to launch them.

    Shared memory: 99 KiB is what every GPU from sm_80 on has for a block, 100 KiB what the smallest have for all of a
    multiprocessor; 227 KiB is what sm_90 has.
    """
    narrow = embedding <= 128
    n = {
        "EMBEDDING": embedding,
        "BFLOAT16": int(dtype == torch.bfloat16),
        "QUERY_INDEX_THREADS": 1024,
        "INDEX_WARPS": 8,
        "COMPACTED": 64,
        "SUM_THREADS": 256,
        # A block of a forward kernel reads its queries and fills its pipeline in about the time of two documents.
        "START_UP_DOCUMENTS": 2,
        "MOST_WAVES": 8,
        # forward: document tokens of a tile, buffers of tiles, slabs that a warp holds in registers.
        "TILE": 64 if narrow else 32,
        "STAGES": 2,
        "SLABS_A_WARP": 2 if narrow else 1,
        # forward_sm90: the same, consumer warpgroups of four slabs, and tokens that TMA brings at once.
        "TILE_90": 128,
        "STAGES_90": 4 if narrow else 3,
        "WARPGROUPS": 3 if narrow else 2,
        "BOX": 32,
        # query_gradient: rows of a block, documents whose winners it stages.
        "QUERY_ROWS": 4,
        "STAGED": 128,
        # document_gradient: warps of a block, each of which owns SLICE dimensions of RANGE tokens.
        "DOCUMENT_WARPS": 4,
        "RANGE": 64,
        "SLICE": 64,
        "SCANNED": 256,
    }
    row_bytes, panels = 2 * embedding + 16, ceil(embedding / 64)
    return n | {
        "FORWARD_SHARED_BYTES": n["STAGES"] * n["TILE"] * row_bytes,
        "SM90_SHARED_BYTES": n["STAGES_90"] * (panels * n["TILE_90"] * 128 + 16),
        "QUERY_SHARED_BYTES": n["STAGED"] * (n["QUERY_ROWS"] * 8 + 4),
        "DOCUMENT_SHARED_BYTES": n["DOCUMENT_WARPS"] * (n["RANGE"] * n["SLICE"] * 4 + (n["SCANNED"] + 32) * 8),
    }


def obstacle(device: torch.device, dtype: torch.dtype, embedding_size: int, longest_text: int) -> str | None:
    """Return why the kernels cannot score such vectors on this device, with the remedy, or None where they can."""
    machine: str | None = _machine_obstacle(device)
    if machine is not None:
        return machine
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the kernel takes bfloat16 and float16, not {name}: set trainer.precision=bf16"
    if embedding_size % SLAB or not 0 < embedding_size <= LARGEST_EMBEDDING:
        return f"the kernel takes embedding sizes that 16 divides, up to {LARGEST_EMBEDDING}, not {embedding_size}"
    if longest_text > LONGEST_TEXT:
        return f"the kernel takes texts of up to {LONGEST_TEXT:,} tokens, not {longest_text:,}"
    return None


# torch.compile cannot look into driver and compiler; what they say does not change.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _machine_obstacle(device: torch.device) -> str | None:
    return _ask_machine(device)


@cache
def _ask_machine(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return f"the kernel needs an NVIDIA GPU, and this runs on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernel needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return compiler.unavailable()


@cache
def source(*, sm90: bool) -> str:
    """Return the text of the kernels, with or without those that only sm_90a can run."""
    names = ["types", "ptx", "index", "epilogue", "forward", "backward"]
    if sm90:
        names = ["types", "ptx", "ptx_sm90", "index", "epilogue", "forward", "forward_sm90", "backward"]
    folder = files("losses.maxsim") / "sources"
    return "".join(f'#line 1 "{name}.cuh"\n{(folder / f"{name}.cuh").read_text()}' for name in names)


@dataclass(frozen=True)
class Program:
    """The kernels for one embedding size and type on one device."""

    module: Module
    tensor_map: Callable[..., Any]
    """From a matrix (rows, H) and box_rows to what TMA reads it by."""
    constants: dict[str, int]
    multiprocessors: int
    shared_bytes: int
    """Of a multiprocessor."""
    sm90: bool
    """Whether the module has `forward_sm90`."""

    def launch(
        self, kernel: str, arguments: Arguments, *maps: Any, blocks: int, warps: int, shared_bytes: int = 0
    ) -> None:
        self.module.launch(
            kernel, grid=(blocks, 1), threads=32 * warps, shared_bytes=shared_bytes, arguments=[arguments, *maps]
        )


@cache
def load(device: torch.device, embedding: int, dtype: torch.dtype) -> Program:
    """Compile the kernels for a device, or take them from the cache, and load them.

    Raises RuntimeError with the compiler's log, or with what the driver says.
    """
    properties = torch.cuda.get_device_properties(device)
    sm90 = (properties.major, properties.minor) == (9, 0)
    numbers = constants(embedding, dtype)
    architecture = f"sm_{properties.major}{properties.minor}{'a' if sm90 else ''}"
    cubin = compiler.compile_cubin(source(sm90=sm90), architecture=architecture, defines=numbers)
    return Program(
        driver.Module(cubin, device),
        driver.tensor_map,
        numbers,
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
        sm90,
    )


def forward(queries: Side, documents: Side, candidates: int, *, save: bool) -> tuple[Tensor, Tensor, Index]:
    """Score queries against documents; candidates: 0 = all pairs, K = query b against documents b * K and on.

    Returns scores (Q, N), or (Q, K), float32; winners, int16 (N, rows) as `winner_rows` says, of 0 documents unless
    `save`; and the index that `backward` needs.
    """
    for name, side in (("queries", queries), ("documents", documents)):
        tokens = side.vectors.numel() // max(1, side.embedding)
        if tokens > MOST_TOKENS:
            raise ValueError(f"the kernel takes {name} of {MOST_TOKENS:,} tokens in all, not {tokens:,}: score parts")
    scores, winners, index = allocate_results(queries, documents, candidates, save=save)
    if not scores.numel():
        return scores, winners, index
    if not all(side.longest and side.vectors.numel() for side in (queries, documents)):
        return scores.zero_(), winners.fill_(-1), index
    queries, documents = _aligned(queries), _aligned(documents)
    program = load(documents.vectors.device, documents.embedding, documents.vectors.dtype)
    numbers, num_queries, num_documents = program.constants, queries.texts, documents.texts
    slabs = winner_rows(queries, candidates) // SLAB
    compacted = documents.vectors if documents.mask is None else torch.empty_like(documents.vectors)
    partial = scores.new_empty(slabs, num_documents)
    arguments = _arguments(queries, documents, candidates, winners, index)
    arguments.compacted, arguments.partial, arguments.scores = _pointers(compacted, partial, scores)
    index_warps = numbers["INDEX_WARPS"]
    program.launch("index_queries", arguments, blocks=1, warps=numbers["QUERY_INDEX_THREADS"] // 32)
    program.launch("index_documents", arguments, blocks=ceil(num_documents / index_warps), warps=index_warps)
    if documents.mask is not None:
        parts = num_documents * ceil(documents.longest / numbers["COMPACTED"])
        program.launch("compact_documents", arguments, blocks=ceil(parts / index_warps), warps=index_warps)
    if program.sm90 and not candidates:
        kernel, shared_bytes = "forward_sm90", numbers["SM90_SHARED_BYTES"]
        warps, slabs_a_block = 4 * (numbers["WARPGROUPS"] + 1), 4 * numbers["WARPGROUPS"]
        maps = [program.tensor_map(_rows(documents.vectors), box_rows=numbers["BOX"])]
        maps.append(
            maps[0] if documents.mask is None else program.tensor_map(_rows(compacted), box_rows=numbers["BOX"])
        )
    else:
        kernel, shared_bytes = "forward", numbers["FORWARD_SHARED_BYTES"]
        warps, maps = min(FORWARD_WARPS, ceil(slabs / numbers["SLABS_A_WARP"])), []
        slabs_a_block = warps * numbers["SLABS_A_WARP"]
    arguments.blocks_at_once = program.multiprocessors * _blocks_of_a_multiprocessor(program, warps, shared_bytes)
    groups, of_a_query = ceil(slabs / slabs_a_block) * (num_queries if candidates else 1), candidates or num_documents
    # Enough for any number of slabs that there may be; those without work end at once.
    blocks = min(groups * of_a_query, max(groups, numbers["MOST_WAVES"] * arguments.blocks_at_once))
    program.launch(kernel, arguments, *maps, blocks=blocks, warps=warps, shared_bytes=shared_bytes)
    sum_threads = numbers["SUM_THREADS"]
    program.launch("sum_slabs", arguments, blocks=ceil(scores.numel() / sum_threads), warps=sum_threads // 32)
    return scores, winners, index


def backward(
    gradient: Tensor,
    queries: Side,
    documents: Side,
    candidates: int,
    winners: Tensor,
    index: Index,
    *,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of both sides' vectors, in their shape and type; None for a side that is not wanted.

    gradient: of the scores; winners, index: from `forward`.
    """
    if not (gradient.numel() and all(side.longest and side.vectors.numel() for side in (queries, documents))):
        both = torch.zeros_like(queries.vectors), torch.zeros_like(documents.vectors)
        return both[0] if wanted[0] else None, both[1] if wanted[1] else None
    queries, documents = _aligned(queries), _aligned(documents)
    program = load(documents.vectors.device, documents.embedding, documents.vectors.dtype)
    numbers = program.constants
    arguments = _arguments(queries, documents, candidates, winners, index)
    gradient = gradient.float().contiguous()
    arguments.gradient = gradient.data_ptr()
    query_gradient = document_gradient = None
    if wanted[0]:
        # The kernel writes the rows of scored tokens, all others stay zero.
        query_gradient = torch.zeros_like(queries.vectors)
        arguments.query_gradient = query_gradient.data_ptr()
        program.launch(
            "query_gradient",
            arguments,
            blocks=most_slabs(queries) * (SLAB // numbers["QUERY_ROWS"]),
            warps=2 * numbers["QUERY_ROWS"],
            shared_bytes=numbers["QUERY_SHARED_BYTES"],
        )
    if wanted[1]:
        # The kernel writes every row of a text; packed vectors may have rows that are of none.
        document_gradient = (torch.empty_like if documents.offsets is None else torch.zeros_like)(documents.vectors)
        arguments.document_gradient = document_gradient.data_ptr()
        ranges, slices = ceil(documents.longest / numbers["RANGE"]), ceil(documents.embedding / numbers["SLICE"])
        program.launch(
            "document_gradient",
            arguments,
            blocks=ceil(documents.texts * ranges * slices / numbers["DOCUMENT_WARPS"]),
            warps=numbers["DOCUMENT_WARPS"],
            shared_bytes=numbers["DOCUMENT_SHARED_BYTES"],
        )
    return query_gradient, document_gradient


def allocate_results(queries: Side, documents: Side, candidates: int, *, save: bool) -> tuple[Tensor, Tensor, Index]:
    """Return what `forward` returns, with nothing in it."""
    vectors = documents.vectors
    scores = vectors.new_empty(queries.texts, candidates or documents.texts, dtype=torch.float32)
    winners = vectors.new_empty(documents.texts if save else 0, winner_rows(queries, candidates), dtype=torch.int16)
    counts = 2 * queries.texts + 1 + documents.texts + most_slabs(queries)
    positions = sum(side.mask.numel() for side in (queries, documents) if side.mask is not None)
    return (
        scores,
        winners,
        Index(vectors.new_empty(counts, dtype=torch.int32), vectors.new_empty(positions, dtype=torch.int16)),
    )


def most_slabs(queries: Side) -> int:
    """Slabs of all queries where every token is scored; how many there are, only the device knows."""
    most = queries.texts * _slabs_of_longest(queries)
    return most if queries.offsets is None else min(most, queries.vectors.shape[0] // SLAB + queries.texts)


def winner_rows(queries: Side, candidates: int) -> int:
    """Winners saved for each document: one for each row of a slab, of all queries or of the one that it belongs to."""
    return (_slabs_of_longest(queries) if candidates else most_slabs(queries)) * SLAB


def _slabs_of_longest(queries: Side) -> int:
    # Not math.ceil of a quotient: torch.compile traces this with symbols.
    return -(-queries.longest // SLAB)


def _blocks_of_a_multiprocessor(program: Program, warps: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor holds at once, of 128 registers a thread; each takes 1 KiB more than it asks for."""
    return max(1, min(program.shared_bytes // (shared_bytes + 1024), 65_536 // (128 * 32 * warps)))


def _arguments(queries: Side, documents: Side, candidates: int, winners: Tensor, index: Index) -> Arguments:
    num_queries, num_documents = queries.texts, documents.texts
    lengths = index.counts.data_ptr()
    masked = 0 if queries.mask is None else queries.mask.numel()
    starts = lengths + 4 * num_queries
    document_lengths = starts + 4 * (num_queries + 1)
    arguments = Arguments(
        query_lengths=lengths,
        slab_starts=starts,
        document_lengths=document_lengths,
        slab_queries=document_lengths + 4 * num_documents,
        query_positions=index.positions.data_ptr(),
        document_positions=index.positions.data_ptr() + 2 * masked,
        winners=winners.data_ptr() if winners.shape[0] else None,
        num_queries=num_queries,
        query_tokens=queries.longest,
        num_documents=num_documents,
        document_tokens=documents.longest,
        candidates=candidates,
        slabs=winner_rows(queries, candidates) // SLAB,
    )
    arguments.queries, arguments.query_mask, arguments.query_offsets = _pointers(*queries[:3])
    arguments.documents, arguments.document_mask, arguments.document_offsets = _pointers(*documents[:3])
    return arguments


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _rows(vectors: Tensor) -> Tensor:
    return vectors.view(-1, vectors.shape[-1])


def _aligned(side: Side) -> Side:
    """The side as the kernels read it: contiguous, from an address that 16 bytes divide."""
    vectors = side.vectors.contiguous()
    if vectors.data_ptr() % 16:
        vectors = vectors.clone()
    return Side(
        vectors,
        None if side.mask is None else side.mask.contiguous(),
        None if side.offsets is None else side.offsets.contiguous(),
        side.longest,
    )
