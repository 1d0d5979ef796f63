"""MaxSim against a triple loop in float64, at every corner of its contract."""

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from losses.maxsim import (
    BACKENDS,
    Packed,
    choose_backend,
    compiler,
    kernels,
    maxsim,
    maxsim_candidates,
    maxsim_packed,
    reference,
)

# Sums of a few products of float32 numbers near 1.
FLOAT32 = 1e-5


def loop_score(
    query: Tensor, document: Tensor, query_mask: Tensor, document_mask: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Score of one pair and its gradient for both sides, token by token, in Python floats."""
    query_gradient, document_gradient = torch.zeros_like(query), torch.zeros_like(document)
    total = 0.0
    for i in range(len(query)):
        best, winner = -float("inf"), -1
        for j in range(len(document)):
            similarity = sum(float(a) * float(b) for a, b in zip(query[i], document[j], strict=True))
            if document_mask[j] and similarity > best:
                best, winner = similarity, j
        if query_mask[i] and winner >= 0:
            total += best
            query_gradient[i] += document[winner]
            document_gradient[winner] += query[i]
    return total, query_gradient, document_gradient


def loop_all(
    queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.zeros(len(queries), len(documents), dtype=torch.float64)
    query_gradients, document_gradients = torch.zeros_like(queries), torch.zeros_like(documents)
    for q in range(len(queries)):
        for n in range(len(documents)):
            scores[q, n], dq, dd = loop_score(queries[q], documents[n], query_mask[q], document_mask[n])
            query_gradients[q] += gradient[q, n] * dq
            document_gradients[n] += gradient[q, n] * dd
    return scores, query_gradients, document_gradients


def holey_masks(generator: torch.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.rand(shape, generator=generator) > 0.4 for shape in shapes]


@pytest.mark.parametrize("block_elements", [2**22, 64, 1], ids=["one block", "several blocks", "a pair a block"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_pairs_equal_the_triple_loop_in_value_and_gradient(
    dtype: torch.dtype, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", block_elements)
    monkeypatch.setattr(reference, "BLOCK_ROWS", 5)
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    documents = torch.randn(6, 7, 5, generator=generator, dtype=torch.float64)
    query_mask, document_mask = holey_masks(generator, (3, 4), (6, 7))
    document_mask[2] = False
    gradient = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    expected = loop_all(queries, documents, query_mask, document_mask, gradient)

    queries = queries.to(dtype).requires_grad_()
    documents = documents.to(dtype).requires_grad_()
    scores = maxsim(queries, documents, query_mask, document_mask)
    scores.backward(gradient.to(dtype))

    assert scores.dtype == dtype
    assert queries.grad is not None
    assert documents.grad is not None
    for ours, loop in zip((scores, queries.grad, documents.grad), expected, strict=True):
        torch.testing.assert_close(ours.double(), loop, atol=FLOAT32, rtol=FLOAT32)


@pytest.mark.parametrize("block_elements", [2**22, 64, 1], ids=["one block", "several blocks", "a pair a block"])
def test_candidates_equal_the_triple_loop_in_value_and_gradient(
    block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", block_elements)
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    documents = torch.randn(3, 2, 7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    query_mask, document_mask = holey_masks(generator, (3, 4), (3, 2, 7))
    gradient = torch.randn(3, 2, generator=generator, dtype=torch.float64)

    scores = maxsim_candidates(queries, documents, query_mask, document_mask)
    scores.backward(gradient)

    assert queries.grad is not None
    assert documents.grad is not None
    for b in range(3):
        expected = loop_all(
            queries[b : b + 1].detach(),
            documents[b].detach(),
            query_mask[b : b + 1],
            document_mask[b],
            gradient[b : b + 1],
        )
        torch.testing.assert_close(scores[b : b + 1], expected[0])
        torch.testing.assert_close(queries.grad[b : b + 1], expected[1])
        torch.testing.assert_close(documents.grad[b], expected[2])


@pytest.mark.parametrize("operator", [maxsim, maxsim_candidates])
def test_float32_gradients_are_within_a_millionth_of_float64(operator: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(13)
    candidates = (4,) if operator is maxsim_candidates else ()
    queries = F.normalize(torch.randn(8, 32, 128, generator=generator), dim=-1)
    documents = F.normalize(torch.randn(8, *candidates, 90, 128, generator=generator), dim=-1)
    query_mask, document_mask = holey_masks(generator, (8, 32), documents.shape[:-1])
    gradient = torch.randn(8, *(candidates or (8,)), generator=generator)

    exact = queries.double().requires_grad_(), documents.double().requires_grad_()
    pairs = "qih,qkjh->qkij" if candidates else "qih,kjh->qkij"
    masked = document_mask[:, :, None] if candidates else document_mask[None, :, None]
    best = torch.einsum(pairs, *exact).masked_fill(~masked, -math.inf).amax(dim=-1)
    (best * query_mask[:, None]).sum(dim=-1).backward(gradient.double())

    ours = queries.requires_grad_(), documents.requires_grad_()
    operator(*ours, query_mask, document_mask).backward(gradient)
    for side, expected in zip(ours, exact, strict=True):
        assert side.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(side.grad.double(), expected.grad, atol=1e-6, rtol=1e-6)


def test_gradcheck_agrees_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    documents = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    query_mask, document_mask = holey_masks(generator, (2, 3), (3, 5))
    assert torch.autograd.gradcheck(
        lambda q, d: maxsim(q, d, query_mask, document_mask), (queries, documents), raise_exception=True
    )


def test_a_masked_token_never_wins_even_when_all_similarities_are_negative() -> None:
    queries = torch.tensor([[[1.0, 0.0]]])
    documents = torch.tensor([[[-0.5, 0.0], [0.0, 0.0], [0.9, 0.0]]])
    mask = torch.tensor([[True, False, False]])
    assert maxsim(queries, documents, torch.ones(1, 1, dtype=torch.bool), mask).item() == -0.5


def test_a_masked_query_token_adds_nothing_and_gets_no_gradient() -> None:
    queries = torch.tensor([[[1.0, 0.0], [float("nan"), 1.0]]], requires_grad=True)
    documents = torch.tensor([[[0.25, 0.5]]])
    score = maxsim(queries, documents, torch.tensor([[True, False]]), torch.ones(1, 1, dtype=torch.bool))
    score.sum().backward()
    assert score.item() == 0.25
    assert queries.grad is not None
    assert queries.grad.tolist() == [[[0.25, 0.5], [0.0, 0.0]]]


@pytest.mark.parametrize("operator", [maxsim, maxsim_candidates])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_a_masked_vector_holds_reaches_no_score_and_no_gradient(
    wrong: float, operator: Callable[..., Tensor]
) -> None:
    generator = torch.Generator().manual_seed(10)
    candidates = (3,) if operator is maxsim_candidates else ()
    queries = torch.randn(2, 4, 8, generator=generator, dtype=torch.float64)
    documents = torch.randn(2, *candidates, 6, 8, generator=generator, dtype=torch.float64)
    query_mask, document_mask = holey_masks(generator, (2, 4), documents.shape[:-1])
    document_mask[1] = False
    found = []
    for value in (0.0, wrong):
        left = queries.masked_fill(~query_mask[..., None], value).requires_grad_()
        right = documents.masked_fill(~document_mask[..., None], value).requires_grad_()
        scores = operator(left, right, query_mask, document_mask)
        scores.square().sum().backward()
        found.append((scores, left.grad, right.grad))
    for clean, ours in zip(*found, strict=True):
        assert ours is not None
        assert ours.isfinite().all()
        assert torch.equal(clean, ours)


def test_a_document_without_a_scored_token_scores_zero_and_gets_no_gradient() -> None:
    queries = torch.randn(2, 3, 4, requires_grad=True)
    documents = torch.randn(2, 5, 4, requires_grad=True)
    mask = torch.tensor([[True] * 5, [False] * 5])
    scores = maxsim(queries, documents, torch.ones(2, 3, dtype=torch.bool), mask)
    scores[:, 1].sum().backward()
    assert scores[:, 1].tolist() == [0.0, 0.0]
    assert queries.grad is not None
    assert documents.grad is not None
    assert not queries.grad.any()
    assert not documents.grad.any()


def test_the_gradient_goes_to_the_first_of_equal_maxima() -> None:
    queries = torch.tensor([[[1.0, 0.0]]])
    documents = torch.tensor([[[0.1, 0.0], [0.5, 0.0], [0.5, 0.0]]], requires_grad=True)
    maxsim(queries, documents, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)).sum().backward()
    assert documents.grad is not None
    assert documents.grad.tolist() == [[[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_also_under_autocast(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(2, 32, 16, generator=generator).to(dtype)
    documents = torch.randn(3, 20, 16, generator=generator).to(dtype)
    masks = torch.ones(2, 32, dtype=torch.bool), torch.ones(3, 20, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = maxsim(queries, documents, *masks)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(
        scores.double(), maxsim(queries.double(), documents.double(), *masks), atol=FLOAT32, rtol=FLOAT32
    )


def test_scores_are_the_same_whether_or_not_a_gradient_is_asked_for() -> None:
    generator = torch.Generator().manual_seed(6)
    queries = torch.randn(3, 4, 5, generator=generator)
    documents = torch.randn(6, 7, 5, generator=generator)
    query_mask, document_mask = holey_masks(generator, (3, 4), (6, 7))
    scores = maxsim(queries, documents, query_mask, document_mask)
    assert torch.equal(scores, maxsim(queries.requires_grad_(), documents, query_mask, document_mask))


def test_the_same_inputs_give_the_same_bits_forward_and_backward() -> None:
    def run() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(5)
        queries = torch.randn(8, 32, 64, generator=generator, requires_grad=True)
        documents = torch.randn(16, 90, 64, generator=generator, requires_grad=True)
        query_mask, document_mask = holey_masks(generator, (8, 32), (16, 90))
        scores = maxsim(queries, documents, query_mask, document_mask)
        scores.square().sum().backward()
        assert queries.grad is not None
        assert documents.grad is not None
        return scores.detach(), queries.grad, documents.grad

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_similarities_of_all_pairs_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    similarity = reference._similarity

    def spy(documents: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
        result = similarity(documents, rows, buffer)
        assert result.numel() <= buffer.numel() <= 1000
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(reference, "_similarity", spy)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1000)
    masks = torch.ones(10, 8, dtype=torch.bool), torch.ones(20, 9, dtype=torch.bool)
    maxsim(torch.randn(10, 8, 4), torch.randn(20, 9, 4), *masks)
    assert max(sizes) <= 1000
    assert sum(sizes) == 10 * 8 * 20 * 9


@pytest.mark.parametrize(
    ("queries", "documents"),
    [((0, 3, 4), (2, 5, 4)), ((2, 3, 4), (0, 5, 4)), ((2, 0, 4), (2, 5, 4)), ((2, 3, 4), (2, 0, 4))],
)
def test_empty_sides_score_zero(queries: tuple[int, ...], documents: tuple[int, ...]) -> None:
    left, right = torch.randn(queries, requires_grad=True), torch.randn(documents, requires_grad=True)
    scores = maxsim(left, right, torch.ones(queries[:2], dtype=torch.bool), torch.ones(documents[:2], dtype=torch.bool))
    scores.sum().backward()
    assert scores.shape == (queries[0], documents[0])
    assert not scores.any()
    assert left.grad is not None
    assert not left.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("broken", "kind", "message"),
    [
        ({"documents": torch.randn(2, 5, 3)}, ValueError, "embedding sizes differ: queries 4, documents 3"),
        ({"query_mask": torch.ones(2, 3)}, TypeError, "query_mask must be bool, got torch.float32"),
        (
            {"document_mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            "document_mask is (2, 4), its vectors are (2, 5, 4)",
        ),
        (
            {"documents": torch.randn(2, 5, 4, dtype=torch.float64)},
            TypeError,
            "queries are torch.float32 and documents torch.float64: they must be of one type",
        ),
        (
            {"queries": torch.randn(3, 4)},
            ValueError,
            "queries must have 3 and documents 3 dimensions; got (3, 4) and (2, 5, 4)",
        ),
        (
            {"queries": torch.ones(2, 3, 4, dtype=torch.int64)},
            TypeError,
            "query vectors must be floating point, got torch.int64",
        ),
        (
            {"documents": torch.empty(2, 5, 4, device="meta"), "document_mask": torch.ones(2, 5, dtype=torch.bool)},
            ValueError,
            "queries are on cpu and documents on meta: put them on one",
        ),
        (
            {"document_mask": torch.empty(2, 5, dtype=torch.bool, device="meta")},
            ValueError,
            "document_mask is on meta, its vectors are on cpu",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    broken: dict[str, Tensor], kind: type[Exception], message: str, backend: str
) -> None:
    inputs = {
        "queries": torch.randn(2, 3, 4),
        "documents": torch.randn(2, 5, 4),
        "query_mask": torch.ones(2, 3, dtype=torch.bool),
        "document_mask": torch.ones(2, 5, dtype=torch.bool),
    }
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        maxsim(**(inputs | broken), backend=backend)


@pytest.mark.parametrize(
    ("broken", "kind", "message"),
    [
        (
            Packed(torch.randn(2, 3, 4), torch.tensor([0, 2]), 2),
            ValueError,
            "packed queries must be (tokens, H) with offsets (texts + 1,); got (2, 3, 4) and (2,)",
        ),
        (
            Packed(torch.randn(3, 4), torch.tensor([0, 3], dtype=torch.int32), 3),
            TypeError,
            "the offsets of packed queries must be int64, got torch.int32",
        ),
        (
            Packed(torch.randn(3, 4), torch.tensor([0, 3], device="meta"), 3),
            ValueError,
            "the offsets of packed queries are on meta, the vectors on cpu",
        ),
        (
            Packed(torch.randn(3, 5), torch.tensor([0, 3]), 3),
            ValueError,
            "embedding sizes differ: queries 5, documents 4",
        ),
        (
            Packed(torch.randn(3, 4), torch.tensor([0, 2, 3]), 2),
            ValueError,
            "2 queries with 2 candidates each, but 2 documents",
        ),
        *(
            (
                Packed(torch.randn(3, 4), torch.tensor(offsets), 3),
                ValueError,
                "the offsets of packed queries must rise from 0 or more to 3 at most",
            )
            for offsets in ([0, 4], [-1, 3], [3, 2])
        ),
        (
            Packed(torch.randn(3, 4), torch.tensor([0, 3]), -1),
            ValueError,
            "longest=-1 of packed queries must be 0 or more tokens",
        ),
    ],
)
def test_packed_inputs_that_do_not_fit_are_refused(broken: Packed, kind: type[Exception], message: str) -> None:
    documents = Packed(torch.randn(7, 4), torch.tensor([0, 3, 7]), 4)
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        maxsim_packed(broken, documents, candidates=2)


@pytest.mark.parametrize("candidates", [None, 2])
def test_packed_vectors_score_as_padded_ones_in_value_and_gradient(candidates: int | None) -> None:
    generator = torch.Generator().manual_seed(7)
    sides: list[tuple[Tensor, Packed]] = []
    for lengths in ([3, 0, 2], [4, 1, 0, 5, 2, 2]):
        vectors = torch.randn(sum(lengths), 4, generator=generator, dtype=torch.float64, requires_grad=True)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        sides.append((vectors, Packed(vectors, offsets, max(lengths))))
    (queries, packed_queries), (documents, packed_documents) = sides
    scores = maxsim_packed(packed_queries, packed_documents, candidates=candidates)
    weights = torch.randn(scores.shape, generator=generator, dtype=torch.float64)
    (scores * weights).sum().backward()

    expected, gradients = torch.zeros_like(scores), (torch.zeros_like(queries), torch.zeros_like(documents))
    for q in range(3):
        own = slice(packed_queries.offsets[q], packed_queries.offsets[q + 1])
        for column in range(scores.shape[1]):
            n = column if candidates is None else q * candidates + column
            other = slice(packed_documents.offsets[n], packed_documents.offsets[n + 1])
            left, right = queries[own].detach(), documents[other].detach()
            all_left, all_right = (torch.ones(len(side), dtype=torch.bool) for side in (left, right))
            expected[q, column], dq, dd = loop_score(left, right, all_left, all_right)
            gradients[0][own] += weights[q, column] * dq
            gradients[1][other] += weights[q, column] * dd
    torch.testing.assert_close(scores, expected)
    for side, gradient in zip((queries, documents), gradients, strict=True):
        assert side.grad is not None
        torch.testing.assert_close(side.grad, gradient)


def test_auto_takes_the_reference_on_a_cpu_and_cuda_says_what_to_use_instead() -> None:
    machine = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "embedding_size": 128, "longest_text": 32}
    assert choose_backend("auto", **machine) == "reference"  # type: ignore[arg-type]
    assert choose_backend("reference", **machine) == "reference"  # type: ignore[arg-type]
    message = (
        "maxsim=cuda: the kernel needs an NVIDIA GPU, and this runs on cpu; or use maxsim=auto or maxsim=reference"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        choose_backend("cuda", **machine)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^maxsim=fast must be one of auto, cuda, reference$"):
        choose_backend("fast", **machine)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_operator_passes_the_checks_of_torch(backend: str) -> None:
    generator = torch.Generator().manual_seed(8)
    queries = torch.randn(2, 3, 4, generator=generator, requires_grad=True)
    documents = torch.randn(4, 5, 4, generator=generator, requires_grad=True)
    query_mask, document_mask = holey_masks(generator, (2, 3), (4, 5))
    for candidates in (0, 2):
        inputs = queries, documents, query_mask, document_mask, None, None, 3, 5, candidates, backend, True
        assert set(library.opcheck(torch.ops.lateforge.maxsim, inputs).values()) == {"SUCCESS"}


@pytest.mark.parametrize("operator", [maxsim, maxsim_candidates])
def test_a_compiled_function_has_one_graph_and_the_same_bits(operator: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(9)

    def run(score: Callable[..., Tensor], texts: int) -> tuple[Tensor, ...]:
        generator.manual_seed(texts)
        shape = (texts, 5, 4) if operator is maxsim else (texts, 3, 5, 4)
        queries = torch.randn(texts, 3, 4, generator=generator, requires_grad=True)
        documents = torch.randn(shape, generator=generator, requires_grad=True)
        masks = holey_masks(generator, (texts, 3), shape[:-1])
        scores = score(queries, documents, *masks)
        scores.square().sum().backward()
        assert queries.grad is not None
        assert documents.grad is not None
        return scores.detach(), queries.grad, documents.grad

    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager", dynamic=True)
    for texts in (2, 6, 9):
        for ours, eager in zip(run(compiled, texts), run(operator, texts), strict=True):
            assert torch.equal(ours, eager)


def test_a_compiled_function_asks_driver_and_compiler_outside_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(device: torch.device) -> str:
        return compiler.unavailable() or "another reason"

    monkeypatch.setattr(kernels, "_ask_machine", ask)
    generator = torch.Generator().manual_seed(11)
    vectors, offsets = torch.randn(7, 4, generator=generator), torch.tensor([0, 3, 7])

    def score(vectors: Tensor, offsets: Tensor) -> Tensor:
        packed = Packed(vectors, offsets, 4)
        return maxsim_packed(packed, packed)

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(vectors, offsets), score(vectors, offsets))


@pytest.mark.parametrize("operator", [maxsim, maxsim_candidates])
def test_auto_that_takes_the_reference_rounds_nothing_under_autocast(
    operator: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_ask_machine", lambda device: None)  # the embedding size alone forbids the kernel
    generator = torch.Generator().manual_seed(12)
    queries = torch.randn(2, 3, 20, generator=generator)
    documents = torch.randn((4, 5, 20) if operator is maxsim else (2, 4, 5, 20), generator=generator)
    masks = holey_masks(generator, (2, 3), documents.shape[:-1])
    plain = operator(queries, documents, *masks, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operator(queries, documents, *masks, backend="auto"), plain)


def test_a_second_derivative_is_refused() -> None:
    queries = torch.randn(1, 2, 4, requires_grad=True)
    masks = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    (gradient,) = torch.autograd.grad(
        maxsim(queries, torch.randn(1, 3, 4, requires_grad=True), *masks).sum(), queries, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="MaxSim has no second derivative"):
        gradient.sum().backward()
