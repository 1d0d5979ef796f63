"""Train with sentence-transformers' or with PyLate's own trainer, for benchmark_step.py, in a process of its own.

    python scripts/peer_trainer.py '{"library": "st", "model": ..., "examples": ..., "steps": 3, "result": ...}'

Nothing of lateforge is imported. library: st or pylate; model: a folder in its layout; examples: JSON lines of query,
documents, of which the first is the positive, and for loss=distillation their scores, batch after batch; loss:
contrastive, cached or distillation, mini_batch: texts that cached encodes at once; batch_size, learning_rate,
weight_decay and device: as the names say; threads: of torch. result: the JSON file that receives, a step each, seconds,
loss, document tokens, those padded, and seconds by phase; and the peak memory.
"""

import json
import re
import resource
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Seconds of each step, from the end of the one before, and where they went."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.steps: list[float] = []
        self.phases: list[dict[str, float]] = []
        self.losses: list[torch.Tensor] = []
        self.reset()

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset(self) -> None:
        self.marks = {"end": self.now()}

    def mark(self, name: str) -> None:
        self.marks[name] = self.now()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.mark("backward")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        marks, end = self.marks, self.now()
        self.steps.append(end - marks["end"])
        self.phases.append(
            {
                "data": marks["begin"] - marks["end"],
                "encode and loss": marks["forward"] - marks["begin"],
                "backward": marks["backward"] - marks["forward"],
                "optimizer": end - marks["backward"],
            }
        )
        self.reset()


class Counted:
    """A collator, and the document tokens of each batch, those of text and those that are computed."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.tokens: list[int] = []
        self.padded: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)

    def __call__(self, features: Any) -> Any:
        batch = self.collator(features)
        masks = [batch[name] for name in batch if re.fullmatch("document.*_attention_mask", name)]
        self.tokens.append(sum(int(mask.sum()) for mask in masks))
        self.padded.append(sum(mask.numel() for mask in masks))
        return batch


def rows_of(task: dict[str, Any]) -> list[dict[str, Any]]:
    """The examples in the columns that the library takes."""
    lines = Path(task["examples"]).read_text(encoding="utf-8").splitlines()
    examples = [json.loads(line) for line in lines]
    if task["loss"] == "distillation" and task["library"] == "pylate":
        return examples
    return [
        {"query": each["query"]}
        | {f"document_{place}": text for place, text in enumerate(each["documents"])}
        | ({"label": each["scores"]} if "scores" in each else {})
        for each in examples
    ]


def loss_of(task: dict[str, Any], model: Any) -> Any:
    """The library's loss, without a temperature, and of PyLate's without the scores made 0 to 1 first."""
    name, pieces = task["loss"], {"mini_batch_size": task["mini_batch"]}
    if task["library"] == "pylate":
        losses = import_module("pylate.losses")
        if name == "distillation":
            return losses.Distillation(model=model, normalize_scores=False)
        return losses.CachedContrastive(model=model, **pieces) if name == "cached" else losses.Contrastive(model=model)
    losses = import_module("sentence_transformers.multi_vector_encoder.losses")
    if name == "distillation":
        return losses.MultiVectorDistillKLDivLoss(model)
    if name == "cached":
        return losses.CachedMultiVectorMultipleNegativesRankingLoss(model, **pieces)
    return losses.MultiVectorMultipleNegativesRankingLoss(model)


def main(task: dict[str, Any]) -> None:
    """Train and write what was measured."""
    torch.set_num_threads(task["threads"])
    torch.manual_seed(1)
    rows = Dataset.from_list(rows_of(task))
    clock = Clock(task["device"])
    library = import_module("sentence_transformers")
    if task["library"] == "pylate":
        model = import_module("pylate.models").ColBERT(task["model"], device=task["device"])
        collator, prompts = Counted(import_module("pylate.utils").ColBERTCollator(model.tokenize)), {}
        trainer, arguments = library.SentenceTransformerTrainer, library.SentenceTransformerTrainingArguments
    else:
        model = library.MultiVectorEncoder(task["model"], device=task["device"])
        # Those of the model are for encoding alone.
        collator, prompts = None, {"query": model.prompts["query"]}
        prompts |= {name: model.prompts["document"] for name in rows.column_names if name.startswith("document")}
        trainer, arguments = library.MultiVectorEncoderTrainer, library.MultiVectorEncoderTrainingArguments

    class InOrder(trainer):  # type: ignore[misc,valid-type]
        """The library's trainer, over the batches as they are given."""

        def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
            return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

        def compute_loss(self, *given: Any, **named: Any) -> Any:
            clock.mark("begin")
            computed = super().compute_loss(*given, **named)
            value = computed[0] if isinstance(computed, tuple) else computed
            clock.losses.append(value.detach())
            clock.mark("forward")
            return computed

    with tempfile.TemporaryDirectory() as folder:
        trained = InOrder(
            model=model,
            args=arguments(
                output_dir=folder,
                max_steps=task["steps"],
                per_device_train_batch_size=task["batch_size"],
                learning_rate=task["learning_rate"],
                weight_decay=task["weight_decay"],
                lr_scheduler_type="linear",
                warmup_steps=0,
                max_grad_norm=1.0,
                bf16=task["precision"] == "bf16",
                use_cpu=task["device"] == "cpu",
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                **({"prompts": prompts} if prompts else {}),
                disable_tqdm=True,
                seed=1,
            ),
            train_dataset=rows,
            loss=loss_of(task, model),
            **({"data_collator": collator} if collator else {}),
            callbacks=[clock],
        )
        if collator is None:
            collator = trained.data_collator = Counted(trained.data_collator)
        clock.reset()
        trained.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = {
        "seconds": clock.steps,
        "losses": [float(value) for value in clock.losses],
        "tokens": collator.tokens[: task["steps"]],
        "padded_tokens": collator.padded[: task["steps"]],
        "phases": clock.phases,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if task["device"] == "cuda" else peak,
    }
    Path(task["result"]).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
