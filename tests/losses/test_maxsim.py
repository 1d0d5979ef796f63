"""MaxSim against a triple loop in float64, at every corner of its contract."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from losses.maxsim import choose_backend, maxsim, maxsim_candidates, reference

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

    def spy(queries: Tensor, documents: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        sizes.append(queries.shape[0] * queries.shape[1] * documents.shape[0] * documents.shape[1])
        return similarity(queries, documents, mask, dtype)

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


Break = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"documents": torch.randn(2, 5, 3)}, "embedding sizes differ: queries 4, documents 3"),
        ({"query_mask": torch.ones(2, 3)}, "query_mask must be bool"),
        ({"document_mask": torch.ones(2, 4, dtype=torch.bool)}, "document_mask is"),
        ({"documents": torch.randn(2, 5, 4, dtype=torch.float64)}, "they must be of one type"),
        ({"queries": torch.randn(3, 4)}, "queries must have 3"),
        ({"queries": torch.ones(2, 3, 4, dtype=torch.int64)}, "query vectors must be floating point"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(broken: dict[str, Tensor], message: str) -> None:
    inputs = {
        "queries": torch.randn(2, 3, 4),
        "documents": torch.randn(2, 5, 4),
        "query_mask": torch.ones(2, 3, dtype=torch.bool),
        "document_mask": torch.ones(2, 5, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=message):
        maxsim(**(inputs | broken))


def test_auto_takes_the_reference_and_cuda_says_what_to_use_instead() -> None:
    assert choose_backend("auto") == "reference"
    with pytest.raises(ValueError, match=r"maxsim=cuda: .* use maxsim=auto or maxsim=reference"):
        choose_backend("cuda")
