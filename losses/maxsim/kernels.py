"""MaxSim by the CUDA kernels in `sources/`: what they are compiled with, what they are given, how they are launched.

The module that runs them is an argument of `load`, so that a test can run the kernels' own text on the host.

Q queries, N documents, I query tokens, J document tokens, H embedding size; for packed vectors I and J are the longest.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
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
INDEX_WARPS = 8
SUM_THREADS = 256
# A block reads its queries and fills its pipeline before the first document: about as long as two documents take.
START_UP_DOCUMENTS = 2


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
        *(
            (name, ctypes.c_int)
            for name in ("num_queries", "query_tokens", "num_documents", "document_tokens", "candidates", "slabs")
        ),
    ]


def constants(embedding: int, dtype: torch.dtype) -> dict[str, int]:
    """The numbers that the sources are compiled with, and that say how to launch them.

    Shared memory: 99 KiB is what every GPU from sm_80 on has for a block, 227 KiB what sm_90 has.
    """
    narrow = embedding <= 128
    numbers = {
        "EMBEDDING": embedding,
        "BFLOAT16": int(dtype == torch.bfloat16),
        # forward: document tokens of a tile, buffers of tiles, slabs that a warp holds in registers.
        "TILE": 64,
        "STAGES": 3 if narrow else 2,
        "SLABS_A_WARP": 2 if narrow else 1,
        # forward_sm90: the same, consumer warpgroups of four slabs, and tokens that TMA brings at once.
        "TILE_90": 128,
        "STAGES_90": 4 if narrow else 3,
        "WARPGROUPS": 3 if narrow else 2,
        "BOX": 32,
        # query_gradient: warps of a block, documents whose winners it stages.
        "QUERY_WARPS": 8,
        "STAGED": 32,
        # document_gradient: warps of a block, each of which owns SLICE dimensions of RANGE tokens.
        "DOCUMENT_WARPS": 4,
        "RANGE": 64,
        "SLICE": 64,
        "SCANNED": 256,
    }
    n = numbers
    row_bytes, panels = 2 * embedding + 16, ceil(embedding / 64)
    return numbers | {
        "FORWARD_SHARED_BYTES": n["STAGES"] * n["TILE"] * row_bytes,
        "SM90_SHARED_BYTES": n["STAGES_90"] * (panels * n["TILE_90"] * 128 + 16),
        "QUERY_SHARED_BYTES": n["STAGED"] * (SLAB * 8 + 4),
        "DOCUMENT_SHARED_BYTES": n["DOCUMENT_WARPS"] * (n["RANGE"] * n["SLICE"] * 4 + (n["SCANNED"] + 32) * 8),
    }


def obstacle(device: torch.device, dtype: torch.dtype, embedding_size: int, longest_text: int) -> str | None:
    """Return why the kernels cannot score such vectors on this device, with the remedy, or None where they can."""
    if machine := _machine_obstacle(device):
        return machine
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the kernel takes bfloat16 and float16, not {name}: set trainer.precision=bf16"
    if embedding_size % SLAB or not 0 < embedding_size <= LARGEST_EMBEDDING:
        return f"the kernel takes embedding sizes that 16 divides, up to {LARGEST_EMBEDDING}, not {embedding_size}"
    if longest_text > LONGEST_TEXT:
        return f"the kernel takes texts of up to {LONGEST_TEXT:,} tokens, not {longest_text:,}"
    return None


@cache
def _machine_obstacle(device: torch.device) -> str | None:
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
    sm90: bool
    """Whether the module has `forward_sm90`."""


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
    return Program(driver.Module(cubin, device), driver.tensor_map, numbers, properties.multi_processor_count, sm90)


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
    launch, numbers = program.module.launch, program.constants
    num_queries, num_documents = queries.texts, documents.texts
    slabs = winner_rows(queries, candidates) // SLAB
    compacted = documents.vectors if documents.mask is None else torch.empty_like(documents.vectors)
    partial = scores.new_empty(slabs, num_documents)
    arguments = _arguments(queries, documents, candidates, winners, index)
    arguments.compacted, arguments.partial, arguments.scores = _pointers(compacted, partial, scores)
    launch("index_queries", grid=(1, 1), threads=1024, shared_bytes=0, arguments=[arguments])
    launch(
        "index_documents",
        grid=(ceil(num_documents / INDEX_WARPS), 1),
        threads=32 * INDEX_WARPS,
        shared_bytes=0,
        arguments=[arguments],
    )
    of_a_query = candidates or num_documents
    if program.sm90 and not candidates:
        groups = ceil(slabs / (4 * numbers["WARPGROUPS"]))
        maps = [program.tensor_map(_rows(side), box_rows=numbers["BOX"]) for side in (documents.vectors, compacted)]
        launch(
            "forward_sm90",
            grid=(groups, document_parts(groups, of_a_query, program.multiprocessors)),
            threads=128 * (numbers["WARPGROUPS"] + 1),
            shared_bytes=numbers["SM90_SHARED_BYTES"],
            arguments=[arguments, *maps],
        )
    else:
        warps = min(8, ceil(slabs / numbers["SLABS_A_WARP"]))
        groups = ceil(slabs / (warps * numbers["SLABS_A_WARP"])) * (num_queries if candidates else 1)
        blocks_at_once = program.multiprocessors * (2 if warps > 4 else 4)
        launch(
            "forward",
            grid=(groups, document_parts(groups, of_a_query, blocks_at_once)),
            threads=32 * warps,
            shared_bytes=numbers["FORWARD_SHARED_BYTES"],
            arguments=[arguments],
        )
    blocks = ceil(num_queries * of_a_query / SUM_THREADS)
    launch("sum_slabs", grid=(blocks, 1), threads=SUM_THREADS, shared_bytes=0, arguments=[arguments])
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
    launch, numbers = program.module.launch, program.constants
    arguments = _arguments(queries, documents, candidates, winners, index)
    gradient = gradient.float().contiguous()
    arguments.gradient = gradient.data_ptr()
    query_gradient = document_gradient = None
    if wanted[0]:
        # The kernel writes the rows of scored tokens, all others stay zero.
        query_gradient = torch.zeros_like(queries.vectors)
        arguments.query_gradient = query_gradient.data_ptr()
        launch(
            "query_gradient",
            grid=(most_slabs(queries), 1),
            threads=32 * numbers["QUERY_WARPS"],
            shared_bytes=numbers["QUERY_SHARED_BYTES"],
            arguments=[arguments],
        )
    if wanted[1]:
        # The kernel writes every row of a text; packed vectors may have rows that are of none.
        document_gradient = (torch.empty_like if documents.offsets is None else torch.zeros_like)(documents.vectors)
        arguments.document_gradient = document_gradient.data_ptr()
        ranges, slices = ceil(documents.longest / numbers["RANGE"]), ceil(documents.embedding / numbers["SLICE"])
        launch(
            "document_gradient",
            grid=(ceil(documents.texts * ranges * slices / numbers["DOCUMENT_WARPS"]), 1),
            threads=32 * numbers["DOCUMENT_WARPS"],
            shared_bytes=numbers["DOCUMENT_SHARED_BYTES"],
            arguments=[arguments],
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
    if queries.offsets is None:
        return queries.texts * -(-queries.longest // SLAB)
    return min(queries.texts * -(-queries.longest // SLAB), queries.vectors.shape[0] // SLAB + queries.texts)


def winner_rows(queries: Side, candidates: int) -> int:
    """Winners saved for each document: one for each row of a slab, of all queries or of the one that it belongs to."""
    return (-(-queries.longest // SLAB) if candidates else most_slabs(queries)) * SLAB


@lru_cache(maxsize=4096)
def document_parts(groups: int, documents: int, blocks_at_once: int) -> int:
    """Parts to cut the documents of each group of slabs into, so that the last wave of blocks is nearly full."""
    most = min(documents, max(1, 8 * blocks_at_once // groups))

    def time(parts: int) -> int:
        return ceil(groups * parts / blocks_at_once) * (ceil(documents / parts) + START_UP_DOCUMENTS)

    return min(range(1, most + 1), key=time)


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
