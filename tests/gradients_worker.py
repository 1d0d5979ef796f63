"""What one optimiser step leaves for many losses, in one process or in each of several.

torchrun --nproc_per_node 2 -m tests.gradients_worker <folder>
"""

import faulthandler
import pickle
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from architectures.factory import build_encoder
from configs.schema import Config
from losses.factory import build_loss
from tests.conftest import WORDS
from tests.trainer.made import to_set
from trainer.data.tables import TrainingSet, with_texts
from trainer.loop import build_batches, build_model
from trainer.optim import freeze
from trainer.plan import build_accelerator
from trainer.step import compute_gradient

# Micro-batches of seven and eight queries: neither two nor three processes have as many queries each.
EXAMPLES = 15
STEP = [
    "data=distillation_ids",
    "data.path=unused",
    f"trainer.batch_size={EXAMPLES + 1}",
    "trainer.accumulation_steps=2",
    # A few texts.
    "trainer.chunk_tokens=40",
    # Queries of different lengths too: from six tokens on as long as they are.
    "backbone.expansion=min",
    "backbone.query_length=6",
    "backbone.dropout=0",
]
_LEARNT = ["loss.contrastive.learn_temperature=true", "loss.contrastive.temperature=0.5"]
ALL_TERMS = [
    *("loss=distillation_contrastive", "loss.terms.contrastive=0.5", "loss.terms.margin_mse=0.1"),
    *("loss.contrastive.own_negatives=false", "loss.contrastive.max_negative_ratio=1.1", *_LEARNT),
    *("loss.distillation.student_temperature=0.5", "loss.margin_mse.score=mean_maxsim"),
    *("loss.matryoshka.widths=[128,64,32]", "loss.matryoshka.weights=[1,0.5,0.25]"),
]
LOSSES = {
    "contrastive": ["loss.contrastive.temperature=0.5"],
    "contrastive_symmetric": ["loss.contrastive.symmetric=true", *_LEARNT],
    "distillation": ["loss=distillation", "loss.distillation.student_temperature=0.5"],
    "distillation_of_scores": ["loss=distillation", "loss.distillation.normalization=none"],
    "margin_mse": ["loss=margin_mse", "loss.margin_mse.teacher_temperature=2"],
    "mean_maxsim": [
        *("loss=distillation_contrastive", "loss.terms.margin_mse=1", *_LEARNT),
        *(f"loss.{term}.score=mean_maxsim" for term in ("contrastive", "distillation", "margin_mse")),
        # Means lie closer together than sums.
        "loss.contrastive.temperature=0.05",
    ],
    "all_terms": ALL_TERMS,
}
FROZEN = "optimizer.groups=[{pattern:backbone.embeddings.*,learning_rate:0},{pattern:*.layer.0.*,learning_rate:0}]"


@dataclass(frozen=True)
class Case:
    config: Config
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    gradients: dict[str, Tensor | None]
    """By the parameter's name; those of the loss begin with `loss.`."""
    logged: dict[str, float]
    """What this process adds to the means."""
    synchronisations: int


def make_examples() -> TrainingSet:
    """Texts of different lengths with holes, one to five documents a query, and documents that answer several queries
    or stand several times in a micro-batch."""
    generator = random.Random(1)
    words = [*WORDS, "a", "x", ",", "."]

    def text(longest: int) -> str:
        return " ".join(["the", *generator.choices(words, k=generator.randint(1, longest))])

    texts = [text(14) for _ in range(3 * EXAMPLES)]

    def example(row: int) -> dict[str, object]:
        ids = generator.sample(range(len(texts)), generator.choice([1, 2, 3, 5]))
        # Two rows a query, each of which knows the other's positive.
        query_id = row // 2
        query, own = f"what {' '.join(words[: query_id % 7])}", [texts[identity] for identity in ids]
        scores = sorted((generator.uniform(0, 8) for _ in ids), reverse=True)
        identities = {"query_identity": query_id + 1, "document_identities": [identity + 1 for identity in ids]}
        return with_texts(f"made:{row + 1}", query, own, scores=scores) | identities

    return to_set([example(row) for row in range(EXAMPLES)])


def take_step(accelerator: Accelerator, case: Case, *, cache_tokens: int | None = None) -> Step:
    """Build as train.py does and take the gradient of the first step, with or without the cache."""
    config = case.config
    set_seed(config.seed)
    encoder = build_encoder(config.backbone, config.head)
    loss = build_loss(config.loss, width=encoder.get_embedding_dimension() or 0, maxsim="reference")
    freeze(encoder, loss.learnt, config.optimizer)
    batches = build_batches(config, [replace(make_examples(), config=config.data)], encoder, accelerator)
    batches.chunk_tokens = cache_tokens or config.trainer.chunk_tokens
    whole = build_model(encoder, loss, config).to(case.dtype)
    model = accelerator.prepare(whole)
    synchronisations = 0

    def count(group: ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal synchronisations
        synchronisations += bucket.is_last()
        return allreduce_hook(group, bucket)

    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(model.process_group, count)
    # Each process drops other activations.
    set_seed(config.seed, device_specific=True)
    model.train()
    logged = compute_gradient(accelerator, model, loss, batches[0], cached=cache_tokens is not None)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    return Step(gradients, {name: float(value) for name, value in logged.items()}, synchronisations)


def largest_error(found: Step, expected: Step) -> tuple[float, str]:
    """Of all parameters' gradients, each by its largest component; and whose it is.

    Each that is trained must have a gradient, and one that is not 0.
    """
    assert list(found.gradients) == list(expected.gradients)
    errors = []
    for name, gradient in expected.gradients.items():
        ours = found.gradients[name]
        if ours is None or gradient is None:
            assert ours is gradient, name
            continue
        # A key's bias adds the same to all scores of a query, which the softmax takes away: what is left is rounding.
        of_size = expected.gradients[name.replace("key.bias", "key.weight")]
        assert of_size is not None
        assert of_size.any(), f"{name} is 0"
        assert ours.isfinite().all(), name
        errors.append((((ours - gradient).abs().max() / of_size.abs().max()).item(), name))
    return max(errors)


def main(folder: Path) -> None:
    """Take each step of the folder's cases, plain and cached with the same chunks."""
    # Processes that wait for each other for ever say where, and end, before the test stops waiting for the launcher.
    faulthandler.dump_traceback_later(150, exit=True)
    cases: dict[str, Case] = pickle.loads((folder / "cases").read_bytes())
    accelerator = build_accelerator(next(iter(cases.values())).config)
    steps = {}
    for name, case in cases.items():
        for kind, cache_tokens in (("plain", None), ("cached", case.config.trainer.chunk_tokens)):
            steps[name, kind] = take_step(accelerator, case, cache_tokens=cache_tokens)
    path = folder / f"{accelerator.process_index}_of_{accelerator.num_processes}"
    path.write_bytes(pickle.dumps(steps))
    accelerator.end_training()


if __name__ == "__main__":
    # Classes are pickled by the name under which the tests know them.
    from tests import gradients_worker

    gradients_worker.main(Path(sys.argv[1]))
