"""Texts gathered from two and three real processes, against one process that has all of them, in float64."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from losses.batch import EncodedBatch
from losses.contrastive import ContrastiveLoss
from losses.gather import gather_texts

# Texts and their tokens on each process: no two alike, one text alone, none at all; and all alike, nothing to pad.
SHAPES = {
    "unequal": {2: [(3, 5), (1, 2)], 3: [(2, 4), (0, 0), (1, 7)]},
    "equal": {2: [(2, 3)] * 2, 3: [(2, 3)] * 3},
}
# Queries and their tokens, explicit negatives, document tokens on each process.
BATCHES = {2: [(3, 4, 0, 5), (1, 4, 2, 7)], 3: [(2, 3, 3, 4), (1, 5, 0, 6), (3, 4, 1, 2)]}
WIDTH = 5  # of the vectors
TEMPERATURE = 0.2
Results = list[dict[str, Tensor]]


@pytest.fixture(scope="module", params=[2, 3], ids=["two processes", "three processes"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each process of one group found."""
    folder, processes = tmp_path_factory.mktemp("group"), request.param
    spawn(check, args=(processes, folder), nprocs=processes)
    return [torch.load(folder / f"{process}.pt") for process in range(processes)]


def check(process: int, processes: int, folder: Path) -> None:
    """What one process of the group does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=process, world_size=processes)
    found: dict[str, Tensor] = {}

    for shapes in SHAPES:
        vectors, mask = make_texts(shapes, processes)[process]
        gathered, gathered_mask, first = gather_texts(vectors, mask)
        found |= {
            f"{shapes} vectors": gathered,
            f"{shapes} mask": gathered_mask,
            f"{shapes} first": torch.tensor(first),
        }
        for name, loss in LOSSES.items():
            for dtype in (torch.float64, torch.float32):
                leaf = vectors.to(dtype, copy=True).requires_grad_()
                loss_of_all = loss(gather_texts(leaf, mask)[0], process)
                [found[f"{shapes} {name} {dtype}"]] = torch.autograd.grad(loss_of_all, leaf)

    half = torch.zeros(1, 1, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    # A gradient of 256 from the first process and of 1 from each other.
    loss_of_all = gather_texts(half, one)[0].sum() * (256 if process == 0 else 1)
    [found["bfloat16"]] = torch.autograd.grad(loss_of_all, half)

    batches = make_batches(processes)
    batch = batches[process]
    share = len(batch.queries) / sum(len(other.queries) for other in batches)
    weighted_loss = ContrastiveLoss(temperature=TEMPERATURE, maxsim="reference")(batch) * share
    found["queries"], found["documents"] = torch.autograd.grad(weighted_loss, [batch.queries, batch.documents])
    found["loss"] = weighted_loss.detach()

    torch.save(found, folder / f"{process}.pt")
    # Whoever ends first would take the connection from the others.
    dist.barrier()
    dist.destroy_process_group()


def make_texts(shapes: str, processes: int) -> list[tuple[Tensor, Tensor]]:
    """Vectors and masks of each process; some masks have holes."""
    generator = torch.Generator().manual_seed(processes)
    return [
        (
            torch.randn(count, tokens, WIDTH, generator=generator, dtype=torch.float64),
            torch.rand(count, tokens, generator=generator) > 0.3,
        )
        for count, tokens in SHAPES[shapes][processes]
    ]


def weights(shape: torch.Size, process: int) -> Tensor:
    """Arbitrary numbers, other ones on each process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + process), dtype=torch.float64)


def weighted(vectors: Tensor, process: int) -> Tensor:
    return (vectors.square() * weights(vectors.shape, process).to(vectors.dtype)).sum()


def expanded(vectors: Tensor, process: int) -> Tensor:
    # The gradient of a sum is one number, seen at every place.
    return vectors.sum() * (process + 1)


def transposed(vectors: Tensor, process: int) -> Tensor:
    turned = vectors.permute(2, 1, 0)
    return turned.reshape(-1) @ weights(turned.shape, process).to(vectors.dtype).reshape(-1)


LOSSES = {"weighted": weighted, "expanded": expanded, "transposed": transposed}


def make_batches(processes: int) -> list[EncodedBatch]:
    """What each process has of a micro-batch: unit-length float64 vectors, with holes in every mask."""
    generator = torch.Generator().manual_seed(10 * processes)

    def side(count: int, tokens: int) -> tuple[Tensor, Tensor]:
        vectors = torch.randn(count, tokens, WIDTH, generator=generator, dtype=torch.float64)
        mask = torch.rand(count, tokens, generator=generator) > 0.3
        mask[:, 0] = True
        return F.normalize(vectors, dim=-1).requires_grad_(), mask

    batches = []
    for queries, query_tokens, negatives, document_tokens in BATCHES[processes]:
        query_vectors, query_mask = side(queries, query_tokens)
        document_vectors, document_mask = side(queries + negatives, document_tokens)
        batches.append(
            EncodedBatch(
                queries=query_vectors,
                query_mask=query_mask,
                documents=document_vectors,
                document_mask=document_mask,
                positive_index=torch.arange(queries),
            )
        )
    return batches


def joined(texts: list[Tensor]) -> Tensor:
    """All texts of all processes, each filled up with zeros to the longest."""
    longest = max(part.shape[1] for part in texts)
    whole = texts[0].new_zeros(sum(map(len, texts)), longest, *texts[0].shape[2:])
    row = 0
    for part in texts:
        for text in part:
            whole[row, : len(text)] = text
            row += 1
    return whole


def plain_loss(batches: list[EncodedBatch]) -> Tensor:
    """Mean cross-entropy over all queries of one process that has every batch, one pair of texts at a time."""
    documents = [
        (vectors, mask) for batch in batches for vectors, mask in zip(batch.documents, batch.document_mask, strict=True)
    ]
    losses, first = [], 0
    for batch in batches:
        for row, (query, query_mask) in enumerate(zip(batch.queries, batch.query_mask, strict=True)):
            scores = [(query[query_mask] @ vectors[mask].T).amax(dim=1).sum() for vectors, mask in documents]
            losses.append(-torch.log_softmax(torch.stack(scores) / TEMPERATURE, dim=0)[first + row])
        first += len(batch.documents)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("shapes", SHAPES)
def test_every_process_gets_the_vectors_and_masks_of_all_in_their_order(shapes: str, results: Results) -> None:
    texts = make_texts(shapes, len(results))
    vectors, mask = joined([part for part, _ in texts]), joined([part for _, part in texts])
    for process, found in enumerate(results):
        assert torch.equal(found[f"{shapes} vectors"], vectors)
        assert torch.equal(found[f"{shapes} mask"], mask)
        assert found[f"{shapes} first"].item() == sum(len(part) for part, _ in texts[:process])


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_one_process_which_adds_up_all_losses(name: str, shapes: str, results: Results) -> None:
    leaves = [vectors.requires_grad_() for vectors, _ in make_texts(shapes, len(results))]
    whole = joined(leaves)
    total = sum((LOSSES[name](whole, process) for process in range(len(results))), torch.zeros(()))
    expected = torch.autograd.grad(total, leaves, materialize_grads=True)
    for found, gradient in zip(results, expected, strict=True):
        # The processes' parts are added up in another order.
        torch.testing.assert_close(found[f"{shapes} {name} {torch.float64}"], gradient, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[f"{shapes} {name} {torch.float32}"].double(), gradient, rtol=1e-6, atol=1e-5)


def test_gradients_of_bfloat16_vectors_are_added_up_in_float32(results: Results) -> None:
    # In bfloat16, 256 + 1 is 256, and so is 256 + 1 + 1; of float32's 258 nothing is lost at the end.
    expected = {2: 256, 3: 258}[len(results)]
    for found in results:
        assert found["bfloat16"].dtype == torch.bfloat16
        assert found["bfloat16"].flatten().tolist() == [expected] * WIDTH


def test_the_contrastive_losses_by_their_shares_sum_to_the_loss_and_gradients_of_one_process(results: Results) -> None:
    batches = make_batches(len(results))
    expected = plain_loss(batches)
    # Scores of up to 5 / 0.2 in float64.
    assert math.fsum(found["loss"].item() for found in results) == pytest.approx(expected.item(), rel=1e-12)
    for side in ("queries", "documents"):
        gradients = torch.autograd.grad(expected, [getattr(batch, side) for batch in batches], retain_graph=True)
        for found, gradient in zip(results, gradients, strict=True):
            torch.testing.assert_close(found[side], gradient, rtol=1e-9, atol=1e-12)


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_other_processes_the_same_tensors_come_back() -> None:
    vectors, mask = make_texts("unequal", 2)[0]
    gathered, gathered_mask, first = gather_texts(vectors, mask)
    assert gathered is vectors
    assert gathered_mask is mask
    assert first == 0


@pytest.mark.usefixtures("group_of_one")
def test_in_a_group_of_one_the_same_tensors_come_back() -> None:
    test_without_other_processes_the_same_tensors_come_back()
