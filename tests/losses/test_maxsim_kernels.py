"""The CUDA kernels' own text, run on the host, against a loop in float64.

What no kernel may read is poisoned: padding and holes hold NaN and huge numbers, and memory that nobody has written
yet is NaN.

Q queries, N documents, I query tokens, J document tokens, H embedding size
"""

import ctypes
import dataclasses
import itertools
import os
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, library
from torch.nn.functional import normalize

from losses.maxsim import Packed, check_kernel, kernels, maxsim, maxsim_candidates, maxsim_packed
from losses.maxsim.kernels import SLAB, Side
from tests.losses import emulation

BF16, F16 = torch.bfloat16, torch.float16
# One panel, several, and one that 64 does not divide; narrow and wide settings of `constants`; both types.
VARIANTS = [(16, BF16), (48, F16), (96, BF16), (128, F16), (144, BF16), (256, F16)]
# Products of halves are exact in float32, so of unit vectors' similarities only sums are rounded: a few 1e-7.
SUMS = 1e-6
# Two similarities this close may change places by rounding.
TIE = 2**-17
# To the nearest of 8 or 11 significant bits.
HALF_ROUNDING = {BF16: 2**-8, F16: 2**-11}
HUGE = 3e4

each_variant = pytest.mark.parametrize(
    ("embedding", "dtype"), VARIANTS, ids=[f"{h}-{str(t).removeprefix('torch.')}" for h, t in VARIANTS]
)
each_forward = pytest.mark.parametrize("sm90", [False, True], ids=["forward", "forward_sm90"])

Use = Callable[..., kernels.Program]


@dataclasses.dataclass(frozen=True)
class Case:
    """candidates: 0 = all pairs, K = query b against documents b * K and on."""

    queries: Tensor
    documents: Tensor
    query_mask: Tensor
    document_mask: Tensor
    candidates: int = 0

    @property
    def sides(self) -> tuple[Side, Side]:
        return (
            Side(self.queries, self.query_mask, None, self.queries.shape[1]),
            Side(self.documents, self.document_mask, None, self.documents.shape[1]),
        )

    def pairs(self) -> Iterator[tuple[int, int, int]]:
        """Query, its column in the scores, and the document there."""
        for query in range(len(self.queries)):
            for column in range(self.candidates or len(self.documents)):
                yield query, column, query * self.candidates + column


@dataclasses.dataclass(frozen=True)
class Result:
    scores: Tensor
    winners: Tensor
    query_gradient: Tensor
    document_gradient: Tensor

    def equals(self, other: "Result") -> bool:
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the libraries lie; the workers of one run share it."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated"


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    with unwritten_memory_is_nan():
        yield


@contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """Memory that torch.empty gives holds NaN, or the largest integer.

    So rows of winners that belong to no slab, which nobody writes, can be compared too.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Use:
    """Let `kernels` run one emulated program, whatever it asks for next."""

    def use(
        embedding: int = 96, dtype: torch.dtype = BF16, *, sm90: bool = False, seed: int = 0, multiprocessors: int = 2
    ) -> kernels.Program:
        program = emulation.program(folder, embedding, dtype, sm90=sm90, seed=seed)
        program = dataclasses.replace(program, multiprocessors=multiprocessors)

        def load(device: torch.device, asked_embedding: int, asked_dtype: torch.dtype) -> kernels.Program:
            assert (asked_embedding, asked_dtype) == (embedding, dtype)
            return program

        monkeypatch.setattr(kernels, "load", load)
        return program

    return use


@pytest.fixture
def use_operator(use: Use, monkeypatch: pytest.MonkeyPatch) -> Use:
    """The same, also for backend="cuda" on tensors of the host."""
    monkeypatch.setattr(kernels, "obstacle", lambda *_: None)
    return use


def random_texts(
    generator: torch.Generator, scored: Sequence[int | str], longest: int, embedding: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Unit vectors and their mask.

    scored: for each text how many tokens from its first one on, or `holes`, `last` = that token alone, `late` = all but
    the first, `odd` = every second one.
    """
    vectors = normalize(torch.randn(len(scored), longest, embedding, generator=generator), dim=-1).to(dtype)
    mask = torch.zeros(len(scored), longest, dtype=torch.bool)
    for row, which in zip(mask, scored, strict=True):
        if which == "holes":
            row[:] = torch.rand(longest, generator=generator) > 0.4
        elif which == "last":
            row[-1] = True
        elif which == "late":
            row[1:] = True
        elif which == "odd":
            row[1::2] = True
        else:
            row[: int(which)] = True
    return poison(vectors, mask), mask


def poison(vectors: Tensor, mask: Tensor) -> Tensor:
    """Make tokens that are not scored NaN and huge in turn."""
    values = torch.full(mask.shape, float("nan"))
    values[:, ::2] = HUGE
    return torch.where(mask[..., None], vectors, values[..., None].to(vectors.dtype))


def random_case(
    seed: int,
    embedding: int,
    dtype: torch.dtype,
    query_scored: Sequence[int | str],
    document_scored: Sequence[int | str],
    *,
    longest: tuple[int, int],
    candidates: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    queries, query_mask = random_texts(generator, query_scored, longest[0], embedding, dtype)
    documents, document_mask = random_texts(generator, document_scored, longest[1], embedding, dtype)
    return Case(queries, documents, query_mask, document_mask, candidates)


def mixed_case(embedding: int, dtype: torch.dtype, *, candidates: int = 0) -> Case:
    """Every length and every kind of mask in one call."""
    queries: list[int | str] = [1, 16, 0, 17, 32, "holes", 40, "late"]
    documents: list[int | str] = [0, 1, 7, 8, 127, 128, 129, 300, "holes", "last", 0, "late", "odd", 300, 0, "holes"]
    return random_case(7, embedding, dtype, queries, documents, longest=(40, 300), candidates=candidates)


def random_gradient(case: Case) -> Tensor:
    columns = case.candidates or len(case.documents)
    return torch.randn(len(case.queries), columns, generator=torch.Generator().manual_seed(11))


def run(case: Case, gradient: Tensor) -> Result:
    scores, winners, index = kernels.forward(*case.sides, case.candidates, save=True)
    return Result(scores, winners, *differentiate(case, gradient, winners, index))


def differentiate(case: Case, gradient: Tensor, winners: Tensor, index: kernels.Index) -> tuple[Tensor, Tensor]:
    queries, documents = kernels.backward(gradient, *case.sides, case.candidates, winners, index, wanted=(True, True))
    assert queries is not None
    assert documents is not None
    return queries, documents


def check(case: Case, gradient: Tensor | None = None) -> Result:
    """Run forward and backward; compare scores, winners and gradients with the loop."""
    gradient = random_gradient(case) if gradient is None else gradient
    scores, winners, index = kernels.forward(*case.sides, case.candidates, save=True)
    chosen = chosen_tokens(case, winners)
    check_scores(case, scores, chosen)
    # Not before: with wrong winners it would read anywhere.
    gradients = differentiate(case, gradient, winners, index)
    check_gradients(case, gradient, chosen, gradients)
    return Result(scores, winners, *gradients)


def chosen_tokens(case: Case, winners: Tensor) -> Tensor:
    """The winner of each query token as its place in the document, -1 = none: (Q, columns, I)."""
    num_queries, query_tokens = case.query_mask.shape
    chosen = torch.full((num_queries, case.candidates or len(case.documents), query_tokens), -1)
    first_rows, row = [], 0
    for mask in case.query_mask:
        first_rows.append(0 if case.candidates else row)
        row += padded_to_slabs(int(mask.sum()))
    places = [mask.nonzero().flatten().tolist() for mask in case.document_mask]
    for query, column, document in case.pairs():
        tokens = case.query_mask[query].nonzero().flatten().tolist()
        end = first_rows[query] + padded_to_slabs(len(tokens))
        saved = [winner & 0xFFFF for winner in winners[document, first_rows[query] : end].tolist()]
        for token, winner in zip(tokens, saved, strict=False):
            assert winner == 0xFFFF or winner < len(places[document])
            chosen[query, column, token] = places[document][winner] if winner != 0xFFFF else -1
        assert saved[len(tokens) :] == [0xFFFF] * (len(saved) - len(tokens))
    return chosen


def padded_to_slabs(tokens: int) -> int:
    return -(-tokens // SLAB) * SLAB


def check_scores(case: Case, scores: Tensor, chosen: Tensor) -> None:
    queries, documents = case.queries.double(), case.documents.double()
    assert scores.dtype == torch.float32
    places_of = [mask.nonzero().flatten().tolist() for mask in case.document_mask]
    first_of = [first_equal_tokens(*of) for of in zip(case.documents, places_of, strict=True)]
    for query, column, document in case.pairs():
        similarity_IJ = (queries[query] @ documents[document].T).tolist()
        places, first_like_it = places_of[document], first_of[document]
        score = 0.0
        for i, scored in enumerate(case.query_mask[query].tolist()):
            best, second, winner = -float("inf"), -float("inf"), -1
            for j in places if scored else []:
                if similarity_IJ[i][j] > best:
                    best, second, winner = similarity_IJ[i][j], best, j
                elif similarity_IJ[i][j] > second:
                    second = similarity_IJ[i][j]
            found = int(chosen[query, column, i])
            if winner < 0:
                assert found == -1
                continue
            score += best
            if best - second > TIE:
                assert found == winner
            assert found in first_like_it
            assert best - similarity_IJ[i][found] <= TIE
            assert found == first_like_it[found]
        assert abs(float(scores[query, column]) - score) <= SUMS * max(1, len(similarity_IJ))


def first_equal_tokens(vectors: Tensor, places: list[int]) -> dict[int, int]:
    """For each place the first of the places with the same vector."""
    first: dict[bytes, int] = {}
    rows = vectors.view(torch.int16).numpy()
    return {place: first.setdefault(rows[place].tobytes(), place) for place in places}


def check_gradients(case: Case, gradient: Tensor, chosen: Tensor, found: tuple[Tensor, Tensor]) -> None:
    """Compare with sums in float64 over the winners that the kernel chose; a gradient of 0 leaves its pair out."""
    sides = case.queries.double(), case.documents.double()
    expected, magnitude = [torch.zeros_like(s) for s in sides], [torch.zeros_like(s) for s in sides]
    for query, column, document in case.pairs():
        weight = float(gradient[query, column])
        tokens = (chosen[query, column] >= 0).nonzero().flatten()
        if weight == 0 or not len(tokens):
            continue
        won = chosen[query, column, tokens]
        pair = weight * sides[0][query, tokens], weight * sides[1][document, won]
        for sums, (from_query, from_document) in ((expected, pair), (magnitude, (pair[0].abs(), pair[1].abs()))):
            sums[0][query, tokens] += from_document
            sums[1][document].index_add_(0, won, from_query)
    dtype = case.queries.dtype
    for ours, loop, size, mask in zip(found, expected, magnitude, (case.query_mask, case.document_mask), strict=True):
        assert ours.dtype == dtype
        # One rounding to the half type, a float32 sum before it, and half a place of float16's smallest numbers.
        tolerance = HALF_ROUNDING[dtype] * loop.abs() + 2**-18 * size + 2**-25
        assert not ((ours.double() - loop).abs() > tolerance).any()
        assert ours.isfinite().all()
        assert not ours[~mask].any()


@each_variant
@each_forward
def test_all_pairs_equal_the_float64_loop_in_scores_winners_and_gradients(
    use: Use, embedding: int, dtype: torch.dtype, sm90: bool
) -> None:
    program = use(embedding, dtype, sm90=sm90)
    check(mixed_case(embedding, dtype))
    assert ("forward_sm90" if sm90 else "forward") in program.module.launched  # type: ignore[attr-defined]


@each_variant
def test_candidates_equal_the_float64_loop_in_scores_winners_and_gradients(
    use: Use, embedding: int, dtype: torch.dtype
) -> None:
    use(embedding, dtype)
    check(mixed_case(embedding, dtype, candidates=2))


def test_candidates_run_the_kernel_of_all_gpus_where_both_are_there(use: Use) -> None:
    program = use(sm90=True)
    check(mixed_case(96, BF16, candidates=2))
    assert "forward" in program.module.launched  # type: ignore[attr-defined]
    assert "forward_sm90" not in program.module.launched  # type: ignore[attr-defined]


@each_forward
@pytest.mark.parametrize("candidates", [0, 1])
def test_a_score_does_not_depend_on_how_the_work_is_cut_into_blocks(use: Use, sm90: bool, candidates: int) -> None:
    # 48 slabs are several blocks, also of the widest one, which has 16.
    lengths: list[int | str] = [40, "holes", 33, 48] * 4
    case = random_case(3, 96, BF16, lengths, [40, 0, 9, "holes"] * 4, longest=(48, 70), candidates=candidates)
    use(sm90=sm90)
    first = check(case)
    for multiprocessors in (1, 7, 132):
        use(sm90=sm90, multiprocessors=multiprocessors)
        assert run(case, random_gradient(case)).equals(first)


@each_forward
def test_one_query_against_many_documents_and_many_queries_against_one(use: Use, sm90: bool) -> None:
    use(48, F16, sm90=sm90)
    check(random_case(4, 48, F16, [20], [*range(40)] * 5, longest=(20, 40)))
    # More queries than index_queries has threads.
    check(random_case(5, 48, F16, [1, 2, 0, "holes"] * 260, [9], longest=(2, 9)))
    check(random_case(6, 48, F16, [20], [*range(40)] * 2, longest=(20, 40), candidates=80))


@each_forward
@pytest.mark.parametrize("best", [0.5, -0.25], ids=["positive", "negative"])
def test_the_first_of_equal_maxima_wins_wherever_they_lie(use: Use, sm90: bool, best: float) -> None:
    use(sm90=sm90)
    places = [(4, 5), (0, 1), (2, 10), (3, 130), (1, 2), (7, 8), (5, 9), (0, 6), (6, 24), (14, 16)]
    places += [(31, 32), (63, 64), (60, 66), (127, 128), (126, 129), (120, 250), (20, 148), (299, 299), (0, 299)]
    generator = torch.Generator().manual_seed(8)
    query = normalize(torch.randn(96, generator=generator), dim=0).to(BF16)
    documents = (-0.75 * query).expand(len(places), 300, 96).clone()
    for document, tied in zip(documents, places, strict=True):
        document[list(tied)] = (best * query.float()).to(BF16)
    # Other query tokens, in all rows of the slab, tie in the same places.
    queries = torch.stack([query * 2.0**-power for power in range(16)])[None]
    everything = torch.ones(len(places), 300, dtype=torch.bool)
    case = Case(queries, documents, torch.ones(1, 16, dtype=torch.bool), everything)
    _, winners, _ = kernels.forward(*case.sides, 0, save=True)
    assert chosen_tokens(case, winners)[0].tolist() == [[first] * 16 for first, _ in places]

    # With the first of the two a hole, the second wins, though others have moved.
    everything[range(len(places)), [first for first, _ in places]] = False
    everything[-2, 299] = True
    check(case)


@each_forward
def test_a_hole_never_wins_even_if_all_similarities_are_negative_and_its_vector_is_the_best(
    use: Use, sm90: bool
) -> None:
    use(48, F16, sm90=sm90)
    generator = torch.Generator().manual_seed(9)
    queries = normalize(torch.rand(3, 17, 48, generator=generator), dim=-1).to(F16)
    documents = -normalize(torch.rand(5, 130, 48, generator=generator), dim=-1).to(F16)
    mask = torch.rand(5, 130, generator=generator) > 0.5
    mask[4, :100], mask[4, 100:] = True, False
    documents[~mask] = queries[0, 0]
    result = check(Case(queries, documents, torch.ones(3, 17, dtype=torch.bool), mask))
    assert (result.scores < 0).all()


@each_forward
@pytest.mark.parametrize("place", [0, 3, 9, 127, 128, 149, slice(None)])
def test_nan_in_a_scored_token_gives_nan_and_nothing_else_changes(use: Use, sm90: bool, place: int | slice) -> None:
    use(sm90=sm90)
    case = random_case(10, 96, BF16, [17, 5], ["holes", 150, 40], longest=(17, 150))
    before = run(case, random_gradient(case)).scores
    documents = case.documents.clone()
    documents[1, place, 3] = float("nan")
    queries = case.queries.clone()
    queries[1, 4, 0] = float("nan")
    for broken, lost, kept in (
        (dataclasses.replace(case, documents=documents), (slice(None), 1), (slice(None), [0, 2])),
        (dataclasses.replace(case, queries=queries), (1,), (0,)),
    ):
        scores, winners, index = kernels.forward(*broken.sides, 0, save=True)
        assert scores[lost].isnan().all()
        assert torch.equal(scores[kept], before[kept])
        chosen_tokens(broken, winners)  # none past a document's end, where backward would read
        query_gradient, document_gradient = differentiate(broken, random_gradient(case), winners, index)
        assert query_gradient[0].isfinite().all() or lost != (1,)
        assert not document_gradient[~case.document_mask].any()


@pytest.mark.parametrize(("embedding", "dtype"), [(16, BF16), (256, F16)])
@pytest.mark.parametrize("candidates", [0, 2])
def test_a_token_that_wins_everything_gets_the_sum_of_all(
    use: Use, embedding: int, dtype: torch.dtype, candidates: int
) -> None:
    use(embedding, dtype)
    # 13 queries of 32: 416 winners of one token, and of candidates 300 of one query.
    tokens, num_queries = (300, 2) if candidates else (32, 13)
    case = random_case(
        12, embedding, dtype, [tokens] * num_queries, [130, 70, 9, 100], longest=(tokens, 130), candidates=candidates
    )
    direction = normalize(torch.ones(embedding), dim=0)
    queries = normalize(case.queries.float() + 4 * direction, dim=-1).to(dtype)
    documents = case.documents.clone()
    documents[0, 77] = documents[1, 3] = documents[2, 8] = documents[3, 64] = direction.to(dtype)
    case = dataclasses.replace(case, queries=queries, documents=documents)
    chosen = chosen_tokens(case, check(case).winners)
    assert (chosen[0, 0] == 77).all()


@pytest.mark.parametrize("candidates", [0, 2])
def test_a_gradient_of_zero_leaves_its_pair_out_even_where_the_vectors_are_nan(use: Use, candidates: int) -> None:
    use(48, F16)
    case = random_case(13, 48, F16, [20, "holes", 9], [40, 20, "holes", 9, 70, 30], longest=(20, 70))
    case = dataclasses.replace(case, candidates=candidates)
    gradient = random_gradient(case)
    _, winners, index = kernels.forward(*case.sides, candidates, save=True)
    skipped = [(1, 0), (1, 1)] if candidates else [(query, 2) for query in range(3)]
    for query, column in skipped:
        gradient[query, column] = 0
    check(case, gradient)
    queries, documents = case.queries.clone(), case.documents.clone()
    documents[[2, 3] if candidates else [2]] = float("nan")
    if candidates:
        queries[1] = float("nan")
    broken = dataclasses.replace(case, queries=queries, documents=documents)
    found = differentiate(broken, gradient, winners, index)
    check_gradients(case, gradient, chosen_tokens(case, winners), found)


def test_a_side_that_is_not_wanted_changes_nothing_for_the_other(use: Use) -> None:
    use()
    case = mixed_case(96, BF16)
    gradient = random_gradient(case)
    both = run(case, gradient)
    _, winners, index = kernels.forward(*case.sides, 0, save=True)
    queries, nothing = kernels.backward(gradient, *case.sides, 0, winners, index, wanted=(True, False))
    assert nothing is None
    assert queries is not None
    assert torch.equal(queries, both.query_gradient)
    nothing, documents = kernels.backward(gradient, *case.sides, 0, winners, index, wanted=(False, True))
    assert nothing is None
    assert documents is not None
    assert torch.equal(documents, both.document_gradient)


def test_scores_are_the_same_where_no_winners_are_saved(use: Use) -> None:
    for sm90 in (False, True):
        use(sm90=sm90)
        case = mixed_case(96, BF16)
        scores, winners, _ = kernels.forward(*case.sides, 0, save=False)
        assert not winners.numel()
        assert torch.equal(scores, run(case, random_gradient(case)).scores)


@each_forward
@pytest.mark.parametrize("candidates", [0, 2])
def test_the_order_of_threads_changes_no_bit(use: Use, sm90: bool, candidates: int) -> None:
    case = mixed_case(48, F16, candidates=candidates)
    use(48, F16, sm90=sm90)
    first = run(case, random_gradient(case))
    for seed in range(1, 9):
        use(48, F16, sm90=sm90, seed=seed)
        assert run(case, random_gradient(case)).equals(first)


@each_variant
@each_forward
def test_a_random_order_of_threads_changes_no_bit_of_any_variant(
    use: Use, embedding: int, dtype: torch.dtype, sm90: bool
) -> None:
    case = random_case(14, embedding, dtype, [40, 17] * 7, [300, 9, "holes", 130, 128], longest=(40, 300))
    use(embedding, dtype, sm90=sm90)
    first = run(case, random_gradient(case))
    for seed in (5, 6):
        use(embedding, dtype, sm90=sm90, seed=seed)
        assert run(case, random_gradient(case)).equals(first)


def packed(vectors: Tensor, lengths: list[int], *, before: int = 3, after: int = 5) -> Packed:
    """The first tokens of each text, between rows of NaN that belong to no text."""
    rows = [text[:length] for text, length in zip(vectors, lengths, strict=True)]
    nan = torch.full((max(before, after), vectors.shape[-1]), float("nan"), dtype=vectors.dtype)
    offsets = torch.tensor([0, *lengths]).cumsum(0) + before
    return Packed(torch.cat([nan[:before], *rows, nan[:after]]), offsets, max(lengths))


def as_side(texts: Packed) -> Side:
    return Side(texts.vectors, None, texts.offsets, texts.longest)


QUERY_LENGTHS, DOCUMENT_LENGTHS = [17, 0, 5, 33], [130, 1, 0, 7, 128, 300, 0, 65]


@each_forward
@pytest.mark.parametrize("candidates", [0, 2])
def test_packed_texts_equal_padded_ones_bit_for_bit(use: Use, sm90: bool, candidates: int) -> None:
    use(sm90=sm90)
    case = random_case(15, 96, BF16, QUERY_LENGTHS, DOCUMENT_LENGTHS, longest=(33, 300), candidates=candidates)
    gradient = random_gradient(case)
    expected = check(case, gradient)
    queries, documents = packed(case.queries, QUERY_LENGTHS), packed(case.documents, DOCUMENT_LENGTHS)
    sides = as_side(queries), as_side(documents)
    scores, winners, index = kernels.forward(*sides, candidates, save=True)
    found = kernels.backward(gradient, *sides, candidates, winners, index, wanted=(True, True))
    assert torch.equal(scores, expected.scores)
    padded_gradients = expected.query_gradient, expected.document_gradient
    for ours, theirs, texts, lengths in zip(
        found, padded_gradients, (queries, documents), (QUERY_LENGTHS, DOCUMENT_LENGTHS), strict=True
    ):
        assert ours is not None
        for text, (start, length) in enumerate(zip(texts.offsets.tolist(), lengths, strict=False)):
            assert torch.equal(ours[start : start + length], theirs[text, :length])


@each_forward
def test_rows_that_belong_to_no_packed_text_get_no_gradient(use: Use, sm90: bool) -> None:
    use(sm90=sm90)
    case = random_case(15, 96, BF16, QUERY_LENGTHS, DOCUMENT_LENGTHS, longest=(33, 300))
    sides = as_side(packed(case.queries, QUERY_LENGTHS)), as_side(packed(case.documents, DOCUMENT_LENGTHS))
    _, winners, index = kernels.forward(*sides, 0, save=True)
    for found in kernels.backward(random_gradient(case), *sides, 0, winners, index, wanted=(True, True)):
        assert found is not None
        assert not found[:3].any()
        assert not found[-5:].any()


@each_forward
def test_a_packed_text_longer_than_the_longest_is_cut_and_what_is_cut_gets_no_gradient(use: Use, sm90: bool) -> None:
    use(sm90=sm90)
    case = random_case(16, 96, BF16, [17, 40, 5], [130, 7, 300], longest=(40, 300))
    cut = dataclasses.replace(case, query_mask=case.query_mask.clone(), document_mask=case.document_mask.clone())
    cut.query_mask[:, 20:], cut.document_mask[:, 140:] = False, False
    expected = check(cut)
    queries = dataclasses.replace(packed(case.queries, [17, 40, 5], before=0, after=0), longest=20)
    documents = dataclasses.replace(packed(case.documents, [130, 7, 300], before=0, after=0), longest=140)
    sides = as_side(queries), as_side(documents)
    scores, winners, index = kernels.forward(*sides, 0, save=True)
    assert torch.equal(scores, expected.scores)
    found = kernels.backward(random_gradient(case), *sides, 0, winners, index, wanted=(True, True))
    for ours, theirs, mask in zip(
        found,
        (expected.query_gradient, expected.document_gradient),
        (case.query_mask, case.document_mask),
        strict=True,
    ):
        assert ours is not None
        assert torch.equal(ours, theirs[mask])


@each_forward
def test_packed_texts_without_any_token_score_zero(use: Use, monkeypatch: pytest.MonkeyPatch, sm90: bool) -> None:
    def tensor_map(tensor: Tensor, *, box_rows: int) -> emulation.TensorMap:
        assert tensor.shape[0] > 0  # a GPU's driver refuses a matrix without rows
        return emulation.tensor_map(tensor, box_rows=box_rows)

    program = dataclasses.replace(use(48, F16, sm90=sm90), tensor_map=tensor_map)
    monkeypatch.setattr(kernels, "load", lambda *_: program)
    nothing = Side(torch.empty(0, 48, dtype=F16), None, torch.zeros(4, dtype=torch.int64), 5)
    something = Side(torch.randn(9, 48).to(F16), None, torch.tensor([0, 4, 9]), 5)
    for sides in ((nothing, something), (something, nothing), (nothing, nothing)):
        scores, winners, index = kernels.forward(*sides, 0, save=True)
        assert scores.tolist() == [[0.0] * sides[1].texts] * sides[0].texts
        found = kernels.backward(torch.ones_like(scores), *sides, 0, winners, index, wanted=(True, True))
        for ours, side in zip(found, sides, strict=True):
            assert ours is not None
            assert torch.equal(ours, torch.zeros_like(side.vectors))


@each_forward
@pytest.mark.parametrize(
    ("query_shape", "document_shape"), [((0, 3), (2, 5)), ((2, 3), (0, 5)), ((2, 0), (2, 5)), ((2, 3), (2, 0))]
)
@pytest.mark.parametrize("candidates", [0, 1])
def test_empty_sides_score_zero_and_get_zero_gradients(
    use: Use, sm90: bool, query_shape: tuple[int, int], document_shape: tuple[int, int], candidates: int
) -> None:
    if candidates and query_shape[0] != document_shape[0]:
        query_shape = document_shape = (0, 3)
    use(48, F16, sm90=sm90)
    case = Case(
        torch.ones(*query_shape, 48, dtype=F16),
        torch.ones(*document_shape, 48, dtype=F16),
        torch.ones(query_shape, dtype=torch.bool),
        torch.ones(document_shape, dtype=torch.bool),
        candidates,
    )
    result = run(case, torch.ones(query_shape[0], candidates or document_shape[0]))
    assert torch.equal(result.scores, torch.zeros(query_shape[0], candidates or document_shape[0]))
    assert torch.equal(result.query_gradient, torch.zeros_like(case.queries))
    assert torch.equal(result.document_gradient, torch.zeros_like(case.documents))


@each_forward
def test_texts_without_a_scored_token_score_zero_and_get_zero_gradients(use: Use, sm90: bool) -> None:
    use(sm90=sm90)
    case = random_case(17, 96, BF16, [0, 0], [0, 0, 0], longest=(9, 70))
    result = check(case)
    assert not result.scores.any()
    check(random_case(17, 96, BF16, [0, 0], [70, "holes", 0], longest=(9, 70)))


@each_forward
def test_strided_and_misaligned_inputs_equal_contiguous_ones(use: Use, sm90: bool) -> None:
    use(sm90=sm90)
    case = random_case(18, 96, BF16, [17, "holes"], [70, "holes", 9], longest=(20, 70))
    gradient = random_gradient(case)
    expected = run(case, gradient)
    strided = changed(case, lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1))
    assert not strided.documents.is_contiguous()
    assert run(strided, gradient.T.contiguous().T).equals(expected)
    assert run(case, gradient.double()).equals(expected)
    moved = changed(case, misalign)
    assert moved.documents.data_ptr() % 16
    assert run(moved, gradient).equals(expected)
    queries = torch.nan_to_num(case.queries)
    plain = Side(queries, torch.ones(2, 20, dtype=torch.bool), None, 20)
    padded = kernels.forward(plain, case.sides[1], 0, save=False)[0]
    rows = Packed(misalign(queries.flatten(0, 1)), torch.tensor([0, 20, 40]), 20)
    assert torch.equal(kernels.forward(as_side(rows), case.sides[1], 0, save=False)[0], padded)


def changed(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    return Case(change(case.queries), change(case.documents), change(case.query_mask), change(case.document_mask))


def misalign(tensor: Tensor) -> Tensor:
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    storage[1:] = tensor.flatten()
    return storage[1:].view(tensor.shape)


# The operator


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


@each_forward
def test_autograd_through_the_operator_equals_the_kernels(use_operator: Use, sm90: bool) -> None:
    use_operator(sm90=sm90)
    for candidates in (0, 2):
        case = mixed_case(96, BF16, candidates=candidates)
        gradient = random_gradient(case)
        expected = run(case, gradient)
        queries, documents = leaf(case.queries), leaf(case.documents)
        if candidates:
            shape = len(queries), candidates, -1
            scores = maxsim_candidates(
                queries,
                documents.view(*shape, documents.shape[-1]),
                case.query_mask,
                case.document_mask.view(shape),
                backend="cuda",
            )
        else:
            scores = maxsim(queries, documents, case.query_mask, case.document_mask, backend="cuda")
        scores.backward(gradient)
        assert queries.grad is not None
        assert documents.grad is not None
        assert Result(scores.detach(), expected.winners, queries.grad, documents.grad).equals(expected)


@pytest.mark.parametrize("candidates", [None, 2])
def test_packed_texts_through_the_operator_equal_padded_ones(use_operator: Use, candidates: int | None) -> None:
    use_operator()
    case = random_case(15, 96, BF16, QUERY_LENGTHS, DOCUMENT_LENGTHS, longest=(33, 300), candidates=candidates or 0)
    expected = run(case, random_gradient(case))
    queries = packed(case.queries, QUERY_LENGTHS, before=0, after=0)
    documents = packed(case.documents, DOCUMENT_LENGTHS, before=0, after=0)
    queries.vectors.requires_grad_()
    documents.vectors.requires_grad_()
    scores = maxsim_packed(queries, documents, candidates=candidates, backend="cuda")
    scores.backward(random_gradient(case))
    assert torch.equal(scores, expected.scores)
    assert queries.vectors.grad is not None
    assert documents.vectors.grad is not None
    assert torch.equal(queries.vectors.grad, expected.query_gradient[case.query_mask])
    assert torch.equal(documents.vectors.grad, expected.document_gradient[case.document_mask])


def test_only_the_side_that_requires_a_gradient_gets_one(use_operator: Use) -> None:
    use_operator()
    case = mixed_case(96, BF16)
    expected = run(case, torch.ones_like(random_gradient(case)))
    queries = leaf(case.queries)
    maxsim(queries, case.documents, case.query_mask, case.document_mask, backend="cuda").sum().backward()
    assert queries.grad is not None
    assert torch.equal(queries.grad, expected.query_gradient)


BACKENDS = pytest.mark.parametrize("backend", ["cuda", "reference"])


@BACKENDS
@pytest.mark.parametrize("candidates", [0, 2])
def test_opcheck_finds_nothing(use_operator: Use, backend: str, candidates: int) -> None:
    use_operator(48, F16)
    case = random_case(19, 48, F16, [17, "holes"], [70, "holes", 9, 0], longest=(17, 70), candidates=candidates)
    queries, documents = case.queries.nan_to_num(), case.documents.nan_to_num()
    arguments = (case.query_mask, case.document_mask, None, None, 17, 70, candidates, backend, True)
    library.opcheck(torch.ops.lateforge.maxsim.default, (leaf(queries), leaf(documents), *arguments))
    outputs = torch.ops.lateforge.maxsim(queries, documents, *arguments)
    gradient = random_gradient(case)
    library.opcheck(
        torch.ops.lateforge.maxsim_backward.default,
        (gradient, queries, documents, *arguments[:-1], *outputs[1:], True, False),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_opcheck_finds_nothing_for_packed_texts(use_operator: Use) -> None:
    use_operator(48, F16)
    case = random_case(20, 48, F16, [17, 3], [70, 9, 0], longest=(17, 70))
    queries = packed(case.queries, [17, 3], before=0, after=0)
    documents = packed(case.documents, [70, 9, 0], before=0, after=0)
    library.opcheck(
        torch.ops.lateforge.maxsim.default,
        (
            *(leaf(queries.vectors), leaf(documents.vectors), None, None),
            *(queries.offsets, documents.offsets, 17, 70, 0, "cuda", True),
        ),
    )


@BACKENDS
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_compiled_call_gives_the_same_values_and_gradients(use_operator: Use, backend: str, dynamic: bool) -> None:
    use_operator(48, F16)
    torch.compiler.reset()

    def score(queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
        return 2 * maxsim(queries, documents, query_mask, document_mask, backend=backend)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(score, fullgraph=True, backend=counter)
    sizes: list[tuple[list[int | str], list[int | str], tuple[int, int]]] = [
        ([17, 9], [70, "holes", 9], (17, 70)),
        ([40, "holes", 3], [60, 9, "holes", 0, 20], (40, 60)),
        ([3, 2, 1, 5], [200, 3], (5, 200)),
    ]
    for query_scored, document_scored, longest in sizes if dynamic else sizes[:1]:
        case = random_case(21, 48, F16, query_scored, document_scored, longest=longest)
        results = []
        for function in (score, compiled):
            queries, documents = leaf(case.queries.nan_to_num()), leaf(case.documents.nan_to_num())
            tensors = queries, documents, case.query_mask.clone(), case.document_mask.clone()
            if dynamic:
                for tensor in tensors:
                    torch._dynamo.mark_dynamic(tensor, 0)
                    torch._dynamo.mark_dynamic(tensor, 1)
            scores = function(*tensors)
            scores.backward(random_gradient(case))
            assert queries.grad is not None
            assert documents.grad is not None
            results.append((scores.detach(), queries.grad, documents.grad))
        for eager, ours in zip(*results, strict=True):
            assert torch.equal(ours, eager)
    assert counter.frame_count == 1


def test_a_compiled_call_on_packed_texts_gives_the_same_values_and_gradients(use_operator: Use) -> None:
    use_operator(48, F16)
    torch.compiler.reset()

    def score(queries: Tensor, query_offsets: Tensor, documents: Tensor, document_offsets: Tensor) -> Tensor:
        return maxsim_packed(
            Packed(queries, query_offsets, 40), Packed(documents, document_offsets, 200), backend="cuda"
        )

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(score, fullgraph=True, backend=counter)
    for query_lengths, document_lengths in (([17, 9], [70, 0, 9]), ([40, 3, 0], [200, 9, 100, 1])):
        case = random_case(22, 48, F16, query_lengths, document_lengths, longest=(40, 200))
        results = []
        for function in (score, compiled):
            queries = packed(case.queries, query_lengths, before=0, after=0)
            documents = packed(case.documents, document_lengths, before=0, after=0)
            tensors = leaf(queries.vectors), queries.offsets, leaf(documents.vectors), documents.offsets
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0)
            scores = function(*tensors)
            scores.sum().backward()
            assert tensors[0].grad is not None
            assert tensors[2].grad is not None
            results.append((scores.detach(), tensors[0].grad, tensors[2].grad))
        for eager, ours in zip(*results, strict=True):
            assert torch.equal(ours, eager)
    assert counter.frame_count == 1


def test_under_autocast_float32_vectors_are_scored_as_their_casts_with_a_float32_gradient(use_operator: Use) -> None:
    use_operator()
    case = mixed_case(96, BF16)
    gradient = random_gradient(case)
    expected = run(case, gradient)
    queries, documents = leaf(case.queries.float()), leaf(case.documents.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = maxsim(queries, documents, case.query_mask, case.document_mask, backend="cuda")
        packed_scores = maxsim_packed(
            Packed(queries.flatten(0, 1), torch.arange(9) * 40, 40),
            Packed(documents.flatten(0, 1), torch.arange(17) * 300, 300),
            backend="cuda",
        )
    scores.backward(gradient)
    assert torch.equal(scores, expected.scores)
    assert torch.equal(packed_scores[6, [7, 13]], expected.scores[6, [7, 13]])
    assert queries.grad is not None
    assert documents.grad is not None
    assert queries.grad.dtype == documents.grad.dtype == torch.float32
    assert torch.equal(queries.grad, expected.query_gradient.float())
    assert torch.equal(documents.grad, expected.document_gradient.float())


def test_there_is_no_second_derivative(use_operator: Use) -> None:
    use_operator()
    case = mixed_case(96, BF16)
    queries = leaf(case.queries)
    scores = maxsim(queries, case.documents, case.query_mask, case.document_mask, backend="cuda")
    weights = torch.ones_like(scores, requires_grad=True)
    (gradient,) = torch.autograd.grad(scores, queries, weights, create_graph=True)
    with pytest.raises(NotImplementedError, match="MaxSim has no second derivative"):
        gradient.sum().backward()


# What the kernels refuse


def score_on_cuda(vectors: Tensor) -> Tensor:
    mask = torch.ones(vectors.shape[:2], dtype=torch.bool)
    return maxsim(vectors, vectors, mask, mask, backend="cuda")


def test_vectors_on_the_cpu_are_refused_with_what_to_use_instead() -> None:
    remedy = r"maxsim=cuda: .* needs an NVIDIA GPU, .* on cpu; or use maxsim=auto or maxsim=reference"
    with pytest.raises(ValueError, match=remedy):
        score_on_cuda(torch.ones(1, 1, 16, dtype=BF16))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 1, 16), torch.float32, "takes bfloat16 and float16, not float32: set trainer.precision=bf16"),
        ((1, 1, 16), torch.float64, "takes bfloat16 and float16, not float64"),
        ((1, 1, 100), BF16, "takes embedding sizes that 16 divides, up to 256, not 100"),
        ((1, 1, 272), BF16, "takes embedding sizes that 16 divides, up to 256, not 272"),
        ((1, 1, 0), BF16, "takes embedding sizes that 16 divides, up to 256, not 0"),
        ((1, 65_536, 16), F16, "takes texts of up to 65,535 tokens, not 65,536"),
    ],
)
def test_what_the_kernels_cannot_score_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    monkeypatch.setattr(kernels, "_machine_obstacle", lambda _: None)
    with pytest.raises(ValueError, match=f"maxsim=cuda: the kernel {message}.*or use maxsim=auto or maxsim=reference"):
        score_on_cuda(torch.ones(shape, dtype=dtype))


def test_what_the_kernels_can_score_has_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_machine_obstacle", lambda _: None)
    for embedding in range(16, 257, 16):
        for dtype in (BF16, F16):
            assert kernels.obstacle(torch.device("cuda"), dtype, embedding, 65_535) is None


def test_a_document_of_65535_tokens_can_win_with_its_last(use: Use) -> None:
    use(16, BF16)
    documents = torch.zeros(1, 65_535, 16, dtype=BF16)
    documents[0, -1] = documents[0, 40_000] = 0.25
    documents[0, -1, 0] = 0.5
    everything = torch.ones(1, 65_535, dtype=torch.bool)
    query = torch.ones(1, 1, 16, dtype=BF16)
    result = run(Case(query, documents, torch.ones(1, 1, dtype=torch.bool), everything), torch.ones(1, 1))
    assert result.scores.item() == 4.25
    assert torch.equal(result.query_gradient[0, 0], documents[0, -1])
    assert torch.equal(result.document_gradient[0, -1], query[0, 0])
    assert not result.document_gradient[0, :-1].any()


# Their check at the start of a run


@each_forward
@pytest.mark.parametrize(("embedding", "dtype"), [(128, F16), (96, BF16)])
def test_the_check_of_the_kernels_passes(use_operator: Use, sm90: bool, embedding: int, dtype: torch.dtype) -> None:
    program = use_operator(embedding, dtype, sm90=sm90)
    check_kernel(torch.device("cpu"), dtype, embedding)
    assert isinstance(program.module, emulation.EmulatedModule)
    assert ("forward_sm90" if sm90 else "forward") in program.module.launched


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        ("sum_slabs", "scores"),
        ("query_gradient", "gradients of queries"),
        ("document_gradient", "gradients of documents"),
    ],
)
def test_the_check_of_the_kernels_fails_where_one_of_them_does_nothing(
    use_operator: Use, monkeypatch: pytest.MonkeyPatch, kernel: str, what: str
) -> None:
    launch = use_operator(96, BF16).module.launch

    def skip(name: str, **options: Any) -> None:
        if name != kernel:
            launch(name, **options)

    program = dataclasses.replace(use_operator(96, BF16), module=SimpleNamespace(launch=skip))
    monkeypatch.setattr(kernels, "load", lambda *_: program)
    with (
        unwritten_memory_is_nan(),
        pytest.raises(RuntimeError, match=f"^the MaxSim kernel does not agree .*: {what} differ by "),
    ):
        check_kernel(torch.device("cpu"), BF16, 96)


def test_no_two_similarities_of_the_check_are_as_close_as_rounding() -> None:
    for embedding, dtype in itertools.product(range(16, 257, 16), (BF16, F16)):
        generator = torch.Generator().manual_seed(4)
        queries = normalize(torch.randn(2, 20, embedding, generator=generator), dim=-1).to(dtype).double()
        documents = normalize(torch.randn(3, 150, embedding, generator=generator), dim=-1).to(dtype).double()
        query_mask = torch.rand(2, 20, generator=generator) > 0.2
        document_mask = torch.rand(3, 150, generator=generator) > 0.2
        similarity = torch.einsum("qih,njh->qinj", queries, documents).masked_fill(~document_mask, -2)[query_mask]
        best, second = similarity.topk(2, dim=-1).values.unbind(-1)
        assert (best - second).min() > 6e-5


# How they are launched


def test_document_parts_are_no_more_than_documents_and_leave_no_wave_half_empty(folder: Path) -> None:
    module = emulation.program(folder, 96, BF16, sm90=True).module
    assert isinstance(module, emulation.EmulatedModule)
    numbers = random.Random(1)
    for _ in range(300):
        groups, documents = numbers.randint(1, 600), numbers.choice([1, 2, 5, 64, 1000, 10_000])
        blocks_at_once = numbers.choice([1, 4, 132, 216, 264])
        parts = module.document_parts(groups, documents, blocks_at_once)
        assert 1 <= parts <= documents
        if groups <= 4 * blocks_at_once and documents >= 1000:
            waves = groups * parts / blocks_at_once
            assert waves / -(-groups * parts // blocks_at_once) > 0.75
        if groups >= 8 * blocks_at_once:
            assert parts == 1


def test_arguments_are_laid_out_as_the_struct_of_the_kernels(tmp_path: Path) -> None:
    names = [field[0] for field in kernels.Arguments._fields_]
    lines = "".join(f"PRINT({name})" for name in names)
    (tmp_path / "layout.cpp").write_text(
        "#include <algorithm>\n#include <cstddef>\n#include <cstdio>\nusing std::min;\nusing std::max;\n"
        f'#include "{emulation.SOURCES / "types.cuh"}"\n'
        '#define PRINT(f) printf("%zu %zu\\n", offsetof(Arguments, f), sizeof(((Arguments*)nullptr)->f));\n'
        f'int main() {{ {lines} printf("%zu\\n", sizeof(Arguments)); }}\n'
    )
    macros = ["-DEMBEDDING=16", "-D__device__=", "-D__forceinline__=inline"]
    program = tmp_path / "layout"
    subprocess.run(["c++", "-std=c++20", *macros, str(tmp_path / "layout.cpp"), "-o", str(program)], check=True)
    *fields, size = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    mirrored: list[Any] = [getattr(kernels.Arguments, name) for name in names]
    assert fields == [f"{field.offset} {field.size}" for field in mirrored]
    assert int(size) == ctypes.sizeof(kernels.Arguments)
