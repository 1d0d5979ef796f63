"""Hold the CUDA kernels of MaxSim against float64 on random shapes. It needs a GPU, and torch alone.

    python scripts/check_maxsim.py [shapes=1000] [seed=0] [only=<number>] [small=true] [seconds=420]

Each shape is drawn from the seed and its number, so that only=<number> repeats one. small=true takes ten tiny shapes
once each, for compute-sanitizer. The status is 1 where anything differs, or the time ends before the last shape.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from losses import maxsim
from losses.maxsim import kernels
from scripts.benchmark_maxsim import options_on_gpu
from scripts.maxsim_contestants import padded, similarities, token_offsets

WINNER_TOLERANCE = 2.0**-17
SHOWN = 10  # failures


@dataclass(frozen=True)
class Case:
    """Padded vectors and masks, and how the operator gets them.

    queries: (Q, I, H); documents: (N, J, H), for candidates (Q, K, J, H); gradient: of the scores.
    """

    number: int
    queries: Tensor
    documents: Tensor
    query_mask: Tensor
    document_mask: Tensor
    gradient: Tensor
    later_twin: Tensor
    """Like document_mask: tokens equal to a scored one before them, which must never win."""
    layout: str
    """`padded`, `strided`, `shifted` by one element from its alignment, or `packed`."""

    @property
    def candidates(self) -> int:
        return self.documents.shape[1] if self.documents.dim() == 4 else 0

    def to(self, device: torch.device) -> "Case":
        moved: dict[str, Any] = {name: field.to(device) for name, field in vars(self).items() if torch.is_tensor(field)}
        return replace(self, **moved)

    def __str__(self) -> str:
        kind = "candidates" if self.candidates else "pairs"
        shape = "x".join(map(str, self.documents.shape))
        dtype = str(self.queries.dtype).removeprefix("torch.")
        return f"shape {self.number}: {kind} {self.layout} {dtype} {'x'.join(map(str, self.queries.shape))} {shape}"


@dataclass(frozen=True)
class Result:
    scores: Tensor
    query_gradient: Tensor
    document_gradient: Tensor
    """Both padded, zero where packed vectors have no token."""

    def equals(self, other: "Result") -> bool:
        """Whether all bits are the same."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(torch.equal(_bits(left), _bits(right)) for left, right in pairs)


def main(arguments: Sequence[str]) -> int:
    chosen = options_on_gpu("check_maxsim", arguments, shapes=1000, seed=0, only=-1, small=False, seconds=420)
    if chosen is None:
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if obstacle := kernels.obstacle(device, torch.bfloat16, 128, 1):
        print(f"check_maxsim: {obstacle}", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, seed {chosen['seed']}")
    draw = partial(draw_case, seed=chosen["seed"], device=device, small=chosen["small"])
    end = time.monotonic() + chosen["seconds"]
    if chosen["only"] >= 0:
        return report("shapes", [chosen["only"]], partial(check_shape, draw), end)
    if chosen["small"]:
        # Under the sanitizer the references stay on the host, so that little but our kernels is watched.
        return report("tiny shapes", range(10), partial(check_shape, draw, reference_device=torch.device("cpu")), end)
    status = report("20 runs, bit for bit", range(10), partial(check_repeats, draw), end)
    status |= report("a side stream", range(10), partial(check_stream, draw), end)
    status |= report("torch.compile(fullgraph=True)", range(3), partial(check_compile, draw), end)
    if kernels.load(device, 128, torch.bfloat16).sm90:
        status |= report("both forward kernels", range(100), partial(check_both_kernels, draw), end)
    else:
        print("both forward kernels: NOT done, only compute capability 9.0 has two")
    return status | report("shapes", range(chosen["shapes"]), partial(check_shape, draw), end)


def report(part: str, numbers: Sequence[int], check: Callable[[int], list[str]], end: float) -> int:
    """Run one part and print its line and its first failures; end: of the time, by time.monotonic."""
    began, done, failed, lines = time.monotonic(), 0, 0, []
    for number in numbers:
        if time.monotonic() > end:
            break
        found = check(number)
        failed += bool(found)
        lines += found
        done += 1
    late = f", OUT OF TIME before the other {len(numbers) - done}" if done < len(numbers) else ""
    print(f"{part}: {done - failed} of {done} right in {time.monotonic() - began:.1f} s{late}", flush=True)
    for line in lines[:SHOWN]:
        print(f"    {line}", flush=True)
    return int(failed > 0 or done < len(numbers))


def check_shape(draw: Callable[[int], Case], number: int, reference_device: torch.device | None = None) -> list[str]:
    """Return what is wrong with scores, winners, ties, gradients, and a second run."""
    case = draw(number)
    result, winners = run(case), decode_winners(case)
    wrong = [] if result.equals(run(case)) else [f"{case}: a second run differs"]
    where = reference_device or case.queries.device
    result, winners = Result(*(value.to(where) for value in vars(result).values())), winners.to(where)
    case = case.to(where)
    return wrong + [f"{case}: {problem}" for problem in compare(case, result, winners)]


def compare(case: Case, result: Result, winners: Tensor) -> Iterator[str]:
    """Yield what is wrong. winners: (Q, N, I), for candidates (Q, K, I): tokens of the padded documents, -1 = none."""
    # One masked token more, so that documents without any have a maximum.
    documents = torch.nn.functional.pad(case.documents, (0, 0, 0, 1))
    mask = torch.nn.functional.pad(case.document_mask, (0, 1))
    queries_64, documents_64 = case.queries.double(), documents.double()
    similarity = similarities(queries_64, documents_64, mask)
    best = similarity.amax(dim=-1)
    scored = case.query_mask[:, None] & mask.any(dim=-1)[..., None]
    expected = torch.where(scored, best, 0.0).sum(dim=-1)
    half = similarities(case.queries, documents, mask).amax(dim=-1).float()
    bound = 2 * _largest(torch.where(scored, half, 0.0).sum(dim=-1) - expected) + 1e-6 * max(1, case.queries.shape[1])
    if not (error := _largest(result.scores - expected)) <= bound:
        yield f"scores off by {error:.2e}, allowed {bound:.2e}"
    if ((winners >= 0) != scored).any():
        yield f"{((winners >= 0) != scored).sum()} winners where none is, or none where one is"
        return
    choice = winners.clamp(min=0)
    chosen = similarity.gather(-1, choice[..., None])[..., 0]
    if not (short := _largest(torch.where(scored, best - chosen, 0.0))) <= WINNER_TOLERANCE:
        yield f"a winner is {short:.2e} below the maximum"
    twin = torch.nn.functional.pad(case.later_twin, (0, 1))
    twins = twin[..., None, :].expand_as(similarity).gather(-1, choice[..., None])[..., 0] & scored
    if twins.any():
        yield f"{twins.sum()} winners are the later of two equal tokens"
    # Gradients given the operator's own winners: a near tie may fall either way.
    weight = one_hot(choice, mask.shape[-1]) * (case.gradient[..., None] * scored).double()[..., None]
    letters = ("qkij,qkjh->qih", "qkij,qih->qkjh") if case.candidates else ("qnij,njh->qih", "qnij,qih->njh")
    for name, found, formula, vectors in (
        ("query", result.query_gradient, letters[0], documents_64),
        ("document", torch.nn.functional.pad(result.document_gradient, (0, 0, 0, 1)), letters[1], queries_64),
    ):
        exact, size = torch.einsum(formula, weight, vectors), torch.einsum(formula, weight.abs(), vectors.abs())
        limits = torch.finfo(found.dtype)
        # Half a unit in the last place of the type, and what a sum in float32 may lose before.
        allowed = limits.eps / 2 * exact.abs() + 2.0**-19 * size + limits.smallest_normal * limits.eps
        excess = ((found.double() - exact).abs() - allowed).flatten()
        if not (worst := _largest(excess.clamp(min=0))) <= 0:
            yield f"{name} gradient {worst:.2e} further off than one rounding, at {(excess > 0).sum()} elements"


def check_repeats(draw: Callable[[int], Case], number: int) -> list[str]:
    case = draw(number)
    first = run(case)
    differ = sum(not first.equals(run(case)) for _ in range(19))
    return [f"{case}: {differ} of 19 runs differ from the first"] if differ else []


def check_stream(draw: Callable[[int], Case], number: int) -> list[str]:
    """Let a side stream make the vectors late: a kernel on another stream would read what is not there yet."""
    case = draw(number)
    first, stream = run(case), torch.cuda.Stream()
    late = replace(case, queries=torch.full_like(case.queries, 7), documents=torch.full_like(case.documents, 7))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.queries.copy_(case.queries)
        late.documents.copy_(case.documents)
        second = run(late)
    stream.synchronize()
    return [] if first.equals(second) else [f"{case}: differs on a side stream"]


def check_compile(draw: Callable[[int], Case], number: int) -> list[str]:
    case = draw(number)
    torch.compiler.reset()
    compiled = run(case, torch.compile(score, fullgraph=True))
    return [] if run(case).equals(compiled) else [f"{case}: differs when compiled"]


def check_both_kernels(draw: Callable[[int], Case], number: int) -> list[str]:
    """Compare the kernel of compute capability 9.0 with that of all GPUs, where the winner is unique."""
    case = draw(number)
    scores, winners = run(case).scores, decode_winners(case)
    with other_kernel():
        other_scores, other_winners = run(case).scores, decode_winners(case)
    if not winners.numel() or not case.document_mask.shape[-1]:
        return []
    similarity = similarities(case.queries.double(), case.documents.double(), case.document_mask)
    best = similarity.topk(min(2, similarity.shape[-1]), dim=-1).values
    unique = (best[..., 0] - best[..., -1] > WINNER_TOLERANCE) | (case.document_mask.sum(dim=-1) <= 1)[..., None]
    different = ((winners != other_winners) & unique).sum().item()
    apart = _largest(scores - other_scores)
    wrong = [f"{case}: {different} unique winners differ between the kernels"] if different else []
    return wrong + (
        [f"{case}: scores of the kernels {apart:.2e} apart"]
        if not apart <= 1e-6 * max(1, case.queries.shape[1])
        else []
    )


@contextmanager
def other_kernel() -> Iterator[None]:
    """Within it the forward kernel of all GPUs runs where that of compute capability 9.0 would."""
    load = kernels.load
    setattr(kernels, "load", lambda *arguments: replace(load(*arguments), sm90=False))  # noqa: B010 - mypy
    try:
        yield
    finally:
        setattr(kernels, "load", load)  # noqa: B010


def score(queries: Tensor, documents: Tensor, case: Case, offsets: tuple[Tensor, Tensor] | None) -> Tensor:
    """Score by the kernels."""
    if offsets is not None:
        left = maxsim.Packed(queries, offsets[0], case.queries.shape[1])
        right = maxsim.Packed(documents, offsets[1], case.documents.shape[-2])
        return maxsim.maxsim_packed(left, right, candidates=case.candidates or None, backend="cuda")
    operator = maxsim.maxsim_candidates if case.candidates else maxsim.maxsim
    return operator(queries, documents, case.query_mask, case.document_mask, backend="cuda")


def run(case: Case, scored_by: Callable[..., Tensor] = score) -> Result:
    """Forward and backward of the public functions, in the layout of the case."""
    queries, documents, offsets = arrange(case)
    queries, documents = queries.requires_grad_(), documents.requires_grad_()
    scores = scored_by(queries, documents, case, offsets)
    left, right = torch.autograd.grad(scores, (queries, documents), case.gradient)
    if offsets is not None:
        left, right = padded(left, case.query_mask), padded(right, case.document_mask)
    return Result(scores.detach(), left, right)


def arrange(case: Case) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return the vectors as the layout says, and the offsets of packed ones."""
    queries, documents = case.queries, case.documents
    if case.layout == "packed":
        offsets = token_offsets(case.query_mask), token_offsets(case.document_mask)
        return queries[case.query_mask], documents[case.document_mask], offsets
    if case.layout == "strided":
        return _strided(queries), _strided(documents), None
    if case.layout == "shifted":
        return _shifted(queries), _shifted(documents), None
    return queries.clone(), documents.clone(), None


def decode_winners(case: Case) -> Tensor:
    """Return (Q, N, I), for candidates (Q, K, I): the token of the padded document that won, -1 = none."""
    queries, documents, offsets = arrange(case)
    num_queries, tokens = case.query_mask.shape
    document_tokens = case.document_mask.shape[-1]
    masks = (None, None) if offsets else (case.query_mask, case.document_mask.flatten(0, -2))
    if case.candidates and offsets is None:
        documents = documents.flatten(0, 1)
    operator: Any = torch.ops.lateforge.maxsim
    _, saved, counts, positions = operator(
        queries.contiguous(), documents.contiguous(), *masks, *(offsets or (None, None)),
        tokens, document_tokens, case.candidates, "cuda", True,
    )  # fmt: skip
    if not (tokens and document_tokens and case.gradient.numel()):
        return torch.full((*case.gradient.shape, tokens), -1, device=queries.device)
    # Rows of a query are its scored tokens from its first slab on; candidates have only their own query's.
    starts = counts[num_queries : 2 * num_queries] * kernels.SLAB
    rank = (case.query_mask.cumsum(dim=1) - 1).clamp(min=0)
    rows = rank if case.candidates else rank + starts[:, None]
    numbers = saved.int() & 0xFFFF
    if case.candidates:
        index = rows[:, None].expand(-1, case.candidates, -1)
        found = numbers.view(num_queries, case.candidates, -1).gather(2, index)
    else:
        found = numbers[:, rows].movedim(0, 1)
    none = (found == kernels.LONGEST_TEXT) | ~case.query_mask[:, None]
    found = found.masked_fill(none, 0).long()
    if offsets is None:
        # From scored tokens of a document to all of its tokens.
        places = (positions[case.query_mask.numel() :].int() & 0xFFFF).view(*case.document_mask.shape).long()
        found = (
            places[..., None, :].expand(*found.shape[:2], tokens, document_tokens).gather(-1, found[..., None])[..., 0]
        )
    winners: Tensor = found.masked_fill(none, -1)
    return winners


def draw_case(number: int, *, seed: int, device: torch.device, small: bool = False) -> Case:
    """Draw a case on the host, so that every machine gets the same."""
    random = torch.Generator().manual_seed(seed * 1_000_003 + number)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    def chance(share: float) -> bool:
        return bool(torch.rand((), generator=random) < share)

    candidates, negative, planted = chance(0.35), chance(0.15), chance(0.5)
    dtype = torch.bfloat16 if chance(0.6) else torch.float16
    embedding = 128 if small or chance(0.7) else 16 * integer(1, 16)
    layout = ("padded", "strided", "shifted", "packed")[integer(0, 3)]
    sizes: tuple[int, ...]
    if small:
        sizes = integer(1, 3), integer(1, 5), integer(1, 40), integer(1, 140)
    elif chance(0.1):
        sizes = integer(1, 3), integer(1, 6), integer(1, 600), integer(1, 3000)
    else:
        sizes = integer(1, 24), integer(1, 40), integer(1, 48), integer(1, 400)
    if not small and chance(0.03):
        empty = integer(0, 3)
        sizes = tuple(0 if place == empty else size for place, size in enumerate(sizes))
    num_queries, num_documents, query_tokens, document_tokens = sizes
    if candidates:
        num_documents = math.ceil(num_documents / 4)
    texts = (num_queries, num_documents) if candidates else (num_documents,)
    queries = torch.randn(num_queries, query_tokens, embedding, generator=random)
    documents = torch.randn(*texts, document_tokens, embedding, generator=random)
    if negative:
        queries, documents = queries.abs(), -documents.abs()
    queries, documents = (normalize(side, dim=-1).to(dtype) for side in (queries, documents))
    query_mask = _draw_mask((num_queries, query_tokens), random, packed=layout == "packed")
    document_mask = _draw_mask((*texts, document_tokens), random, packed=layout == "packed")
    later_twin = torch.zeros_like(document_mask)
    if planted and document_tokens > 1 and queries.numel() and documents.numel():
        # In each document two tokens equal a query token, the best there is (or, negative, equal each other).
        places = torch.rand(*texts, document_tokens, generator=random).topk(2, dim=-1).indices.sort(dim=-1).values
        flat = queries.flatten(0, 1)
        vectors = documents[..., 0, :] if negative else flat[torch.randint(len(flat), texts, generator=random)]
        for place in places.unbind(-1):
            index = place[..., None, None].expand(*texts, 1, embedding)
            documents.scatter_(-2, index, vectors[..., None, :].clone())
        first_scored = document_mask.gather(-1, places[..., :1])
        later_twin.scatter_(-1, places[..., 1:], first_scored)
    gradient = torch.randn(num_queries, num_documents, generator=random)
    case = Case(number, queries, documents, query_mask, document_mask, gradient, later_twin, layout)
    return case.to(device)


def _draw_mask(shape: tuple[int, ...], random: torch.Generator, *, packed: bool) -> Tensor:
    """Lengths from 0 to all; in most padded ones holes."""
    lengths = torch.randint(0, shape[-1] + 1, (*shape[:-1], 1), generator=random)
    full = torch.rand(lengths.shape, generator=random) < 0.3
    mask = torch.arange(shape[-1]) < torch.where(full, shape[-1], lengths)
    holes = torch.rand(shape, generator=random) < torch.rand(lengths.shape, generator=random) ** 2
    return mask if packed else mask & ~(holes & (torch.rand(lengths.shape, generator=random) < 0.5))


def _strided(vectors: Tensor) -> Tensor:
    """The same numbers, of which no two are neighbours in memory."""
    return torch.stack([vectors, -vectors], dim=-1)[..., 0]


def _shifted(vectors: Tensor) -> Tensor:
    """The same numbers, contiguous, from an address that 16 bytes do not divide."""
    memory = vectors.new_empty(vectors.numel() + 1)
    return memory[1:].view(vectors.shape).copy_(vectors)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
