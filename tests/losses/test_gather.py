"""Rows gathered from two and three real processes, and the whole loss there, against one process that has all."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from configs.schema import MatryoshkaConfig
from losses.batch import EncodedBatch
from losses.factory import Loss, build_loss
from losses.gather import gather_rows, gather_texts
from tests.losses.batches import SIZE, averaged, make_batch, make_loss_config

# Texts, their tokens and the columns of a table about them on each process: no two alike, one text alone, none at all;
# and all alike, nothing to pad.
SHAPES = {
    "unequal": {2: [(3, 5, 1), (1, 2, 4)], 3: [(2, 4, 3), (0, 0, 0), (1, 7, 1)]},
    "equal": {2: [(2, 3, 2)] * 2, 3: [(2, 3, 2)] * 3},
}
# Documents of each query, query tokens and document tokens on each process.
BATCHES = {
    2: [([3, 1, 2], 4, 5), ([2], 6, 7)],
    3: [([1, 3], 3, 4), ([2], 5, 6), ([1, 1, 4], 4, 3)],
}
WIDTH = 5  # of the gathered vectors
Results = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each process of a group of three found and, of the first two, in a group of two."""
    folder = tmp_path_factory.mktemp("groups")
    spawn(check_groups, args=(folder,), nprocs=3)
    return folder


@pytest.fixture(params=[2, 3], ids=["two processes", "three processes"])
def results(request: pytest.FixtureRequest, folder: Path) -> Results:
    """What each process of one group found."""
    return [torch.load(folder / f"{process}_of_{request.param}.pt") for process in range(request.param)]


def check_groups(process: int, folder: Path) -> None:
    """What one process does: starting it takes longer than all of its groups."""
    torch.set_num_threads(1)
    for processes in (3, 2):
        if process < processes:
            group = f"file://{folder}/group_of_{processes}"
            dist.init_process_group("gloo", init_method=group, rank=process, world_size=processes)
            torch.save(check(process, processes), folder / f"{process}_of_{processes}.pt")
            # Whoever ends first would take the connection from the others.
            dist.barrier()
            dist.destroy_process_group()


def check(process: int, processes: int) -> dict[str, Tensor]:
    """What one process of the group finds."""
    found: dict[str, Tensor] = {}
    for shapes in SHAPES:
        rows = make_rows(shapes, processes)[process]
        gathered, first = gather_rows(*rows.values())
        found |= {f"{shapes} {name}": tensor for name, tensor in zip(rows, gathered, strict=True)}
        found[f"{shapes} first"] = torch.tensor(first)
        *texts, first = gather_texts(rows["vectors"], rows["mask"])
        found[f"{shapes} texts are the rows"] = torch.tensor(
            first == found[f"{shapes} first"]
            and torch.equal(texts[0], found[f"{shapes} vectors"])
            and torch.equal(texts[1], found[f"{shapes} mask"])
        )
        for name, loss in LOSSES.items():
            for side in ("vectors", "scores"):
                for dtype in (torch.float64, torch.float32):
                    leaf = rows[side].to(dtype, copy=True).requires_grad_()
                    # The others do not have the gradient's type, nor its shape.
                    (_, of_all, _), _ = gather_rows(rows["ids"], leaf, rows["mask"])
                    [gradient] = torch.autograd.grad(loss(of_all, process), leaf)
                    found[f"{shapes} {side} {name} {dtype}"] = gradient

    half = torch.zeros(1, 1, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    # A gradient of 256 from the first process and of 1 from each other.
    (of_all,), _ = gather_rows(half)
    [found["bfloat16"]] = torch.autograd.grad(of_all.sum() * (256 if process == 0 else 1), half)

    batches = make_batches(processes)
    share = len(batches[process].queries) / sum(len(batch.queries) for batch in batches)
    return found | weigh(make_loss(), batches[process], share)


def make_rows(shapes: str, processes: int) -> list[dict[str, Tensor]]:
    """Tensors of several ranks, types and widths of each process; some masks have holes."""
    generator = torch.Generator().manual_seed(processes)
    return [
        {
            # More than float32, or float64, could carry.
            "ids": torch.randint(2**60, 2**62, (count,), generator=generator),
            "vectors": torch.randn(count, tokens, WIDTH, generator=generator, dtype=torch.float64),
            "mask": torch.rand(count, tokens, generator=generator) > 0.3,
            "table": torch.randint(-1, 9, (count, columns), generator=generator),
            "scores": torch.randn(count, columns, generator=generator, dtype=torch.float64),
        }
        for count, tokens, columns in SHAPES[shapes][processes]
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
    turned = vectors.permute(*reversed(range(vectors.dim())))
    return turned.reshape(-1) @ weights(turned.shape, process).to(vectors.dtype).reshape(-1)


LOSSES = {"weighted": weighted, "expanded": expanded, "transposed": transposed}


def make_loss() -> Loss:
    """All terms, two widths, and whatever meets the documents or the queries of other processes."""
    config = replace(
        make_loss_config(contrastive=0.5, distillation=2.0, margin_mse=0.25),
        matryoshka=MatryoshkaConfig(widths=[SIZE, 3], weights=[1.0, 0.5]),
    )
    loss = build_loss(config, width=SIZE, maxsim="reference")
    loss.learnt.double()
    return loss


def make_batches(processes: int) -> list[EncodedBatch]:
    """What each process has of a micro-batch: some documents stand on several, some answer queries of others."""
    generator = torch.Generator().manual_seed(processes)
    batches = []
    for seed, (counts, query_tokens, document_tokens) in enumerate(BATCHES[processes]):
        batch = make_batch(counts, seed=seed, query_tokens=query_tokens, document_tokens=document_tokens)
        document_ids = torch.randint(1, 10, (sum(counts),), generator=generator)
        others = torch.randint(0, 10, (len(counts), 1 + seed), generator=generator)
        known_positives = torch.cat([others, document_ids[batch.candidates[:, :1]]], dim=1)
        batches.append(replace(batch, document_ids=document_ids, known_positives=known_positives))
    return batches


def weigh(loss: Loss, batch: EncodedBatch, share: float) -> dict[str, Tensor]:
    """What a process adds to the mean over all queries: of the loss, of its gradients and of what is logged."""
    total, logged = averaged(loss)(batch)
    [log_temperature] = loss.learnt.parameters()
    leaves = {"queries": batch.queries, "documents": batch.documents, "log_temperature": log_temperature}
    gradients = torch.autograd.grad(total * share, list(leaves.values()))
    return {
        "loss": total.detach() * share,
        **{f"gradient {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)},
        **{f"logged {name}": value * share for name, value in logged.items()},
    }


def join(parts: Sequence[Tensor], *, fill: int = 0) -> Tensor:
    """The rows of all processes, each filled up to the widest."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    widest = max(part.shape[1] for part in parts)
    whole = parts[0].new_full((sum(map(len, parts)), widest, *parts[0].shape[2:]), fill)
    row = 0
    for part in parts:
        for values in part:
            whole[row, : len(values)] = values
            row += 1
    return whole


def join_batches(batches: list[EncodedBatch]) -> EncodedBatch:
    """What one process has that has all."""
    candidates, first, teachers = [], 0, []
    for batch in batches:
        assert batch.teacher_scores is not None
        teachers.append(batch.teacher_scores)
        candidates.append((batch.candidates + first).where(batch.candidates >= 0, -1))
        first += len(batch.documents)
    return EncodedBatch(
        queries=join([batch.queries.detach() for batch in batches]).requires_grad_(),
        query_mask=join([batch.query_mask for batch in batches]),
        documents=join([batch.documents.detach() for batch in batches]).requires_grad_(),
        document_mask=join([batch.document_mask for batch in batches]),
        candidates=join(candidates, fill=-1),
        teacher_scores=join(teachers),
        document_ids=join([batch.document_ids for batch in batches]),
        known_positives=join([batch.known_positives for batch in batches]),
    )


@pytest.mark.parametrize("shapes", SHAPES)
def test_every_process_gets_the_rows_of_all_in_their_order(shapes: str, results: Results) -> None:
    rows = make_rows(shapes, len(results))
    for process, found in enumerate(results):
        for name in rows[0]:
            gathered, expected = found[f"{shapes} {name}"], join([part[name] for part in rows])
            assert gathered.dtype == expected.dtype
            assert torch.equal(gathered, expected), name
        assert found[f"{shapes} first"].item() == sum(len(part["ids"]) for part in rows[:process])
        assert found[f"{shapes} texts are the rows"]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("side", ["vectors", "scores"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_one_process_which_adds_up_all_losses(
    name: str, side: str, shapes: str, results: Results
) -> None:
    leaves = [part[side].requires_grad_() for part in make_rows(shapes, len(results))]
    whole = join(leaves)
    total = sum((LOSSES[name](whole, process) for process in range(len(results))), torch.zeros(()))
    expected = torch.autograd.grad(total, leaves, materialize_grads=True)
    for found, gradient in zip(results, expected, strict=True):
        # The processes' parts are added up in another order.
        for dtype, rtol, atol in ((torch.float64, 1e-12, 1e-12), (torch.float32, 1e-6, 1e-5)):
            ours = found[f"{shapes} {side} {name} {dtype}"]
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), gradient, rtol=rtol, atol=atol)


def test_gradients_of_bfloat16_vectors_are_added_up_in_float32(results: Results) -> None:
    # In bfloat16, 256 + 1 is 256, and so is 256 + 1 + 1; of float32's 258 nothing is lost at the end.
    expected = {2: 256, 3: 258}[len(results)]
    for found in results:
        assert found["bfloat16"].dtype == torch.bfloat16
        assert found["bfloat16"].flatten().tolist() == [expected] * WIDTH


def test_by_their_shares_the_losses_of_the_processes_sum_to_that_of_one_process(results: Results) -> None:
    expected = weigh(make_loss(), join_batches(make_batches(len(results))), 1.0)
    logged = {name for name in expected if name.startswith("logged")}
    assert {name for found in results for name in found if name.startswith("logged")} == logged
    for name in ("loss", "gradient log_temperature", *logged):
        # Facts are means of counts, in float32.
        tolerance = 1e-10 if expected[name].dtype == torch.float64 else 1e-6
        assert sum(found[name].item() for found in results) == pytest.approx(expected[name].item(), rel=tolerance), name
    # The masks had something to do.
    for name in ("same_document_masked", "known_positives_masked", "above_ratio_masked"):
        assert expected[f"logged {name}"] > 0, name


@pytest.mark.parametrize("side", ["queries", "documents"])
def test_by_their_shares_the_gradients_are_those_of_one_process(side: str, results: Results) -> None:
    expected = weigh(make_loss(), join_batches(make_batches(len(results))), 1.0)[f"gradient {side}"]
    found = join([part[f"gradient {side}"] for part in results])
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_some_documents_are_masked_on_the_process_of_another_query_alone(results: Results) -> None:
    alone = [make_loss()(batch)[1] for batch in make_batches(len(results))]
    shares = [len(batch.queries) for batch in make_batches(len(results))]
    for name in ("same_document_masked", "known_positives_masked"):
        together = sum(found[f"logged {name}"].item() for found in results)
        apart = sum(logged[name].item() * share for logged, share in zip(alone, shares, strict=True)) / sum(shares)
        assert together > apart, name


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_other_processes_the_same_tensors_come_back() -> None:
    rows = make_rows("unequal", 2)[0]
    gathered, first = gather_rows(*rows.values())
    assert all(found is given for found, given in zip(gathered, rows.values(), strict=True))
    assert first == 0
    vectors, mask, first = gather_texts(rows["vectors"], rows["mask"])
    assert vectors is rows["vectors"]
    assert mask is rows["mask"]
    assert first == 0


@pytest.mark.usefixtures("group_of_one")
def test_in_a_group_of_one_the_same_tensors_come_back() -> None:
    test_without_other_processes_the_same_tensors_come_back()
