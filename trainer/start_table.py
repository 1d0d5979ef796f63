"""What a run will do, in global terms: the start-up table."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer

from configs.schema import Config, LossConfig
from losses.factory import Loss
from losses.maxsim import kernel_obstacle
from trainer.data import Data
from trainer.data.batches import Batch, StepBatches
from trainer.data.check import data_warnings, describe_evaluation, describe_set, evaluation_size, sample
from trainer.data.order import count_steps_per_epoch
from trainer.data.tables import IntArray, TrainingSet, column
from trainer.loop import count_steps
from trainer.optim import describe_optimizer
from trainer.plan import maxsim_inputs, token_cap

# Texts whose length is measured.
SAMPLE = 512


def describe_run(
    config: Config, data: Data, batches: StepBatches, encoder: MultiVectorEncoder, loss: Loss, accelerator: Accelerator
) -> dict[str, str]:
    """The facts of the start-up table, by name; those of a batch are the first step's."""
    trainer = config.trainer
    micro_batch = trainer.batch_size // trainer.accumulation_steps
    processes = accelerator.num_processes
    each = f"{micro_batch // processes}" if micro_batch % processes == 0 else f"about {micro_batch / processes:.1f}"
    evaluation = "none: data.evaluation_fraction holds out no example"
    if data.evaluation:
        queries, documents = evaluation_size(data.evaluation)
        evaluation = f"{queries:,} queries, {documents:,} documents"
        if own := [name for name, each in data.evaluation.items() if each.candidates is not None]:
            only_some = f" of {', '.join(own)}" if len(own) < len(data.evaluation) else ""
            evaluation += f", each query's own re-ranked{only_some}"
    steps = count_steps(config, data.size)
    reasons = [kernel_obstacle(**each) for each in maxsim_inputs(config, accelerator.device, encoder)]
    reason = next(filter(None, reasons), None)
    # Of each example: documents beside its positives, and how many of them a step takes.
    counts = [each.document_counts - column(each.examples, "positives") for each in data.sets]
    taken = np.concatenate(
        [
            np.minimum(own, each.config.documents_per_query - 1) if each.config.documents_per_query else own
            for own, each in zip(counts, data.sets, strict=True)
        ]
    )
    available, others = np.concatenate(counts), taken.mean()
    micro_batches = batches[0]
    queries, documents = (
        sum(len(getattr(batch, side).chunks) for batch in micro_batches) for side in ("queries", "documents")
    )
    kept = f"of at most {batches.chunk_tokens:,} tokens" + (", each encoded twice" if trainer.cache_tokens else "")
    gradients = sum(4 * parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    return {
        "data": _data(config, data, batches),
        **({"warnings": "\n".join(warnings)} if (warnings := list(data_warnings(data.sets, data.evaluation))) else {}),
        "evaluation": evaluation,
        "queries": _lengths(encoder, data.sets, "query"),
        "documents": _lengths(encoder, data.sets, "document"),
        "batch": f"{trainer.batch_size} queries a step, {trainer.accumulation_steps} micro-batch(es) of {micro_batch}, "
        f"{processes} process(es)" + (f" of {each} queries each" if processes > 1 else ""),
        "documents a query": _documents(available, others),
        "negatives a query": _negatives(config.loss, others, micro_batch, processes),
        "chunks": f"{queries} of queries and {documents} of documents a step and process, {kept}",
        "padding": f"to the longest of a chunk: {batches.padded_because}" if batches.padded_because else "none",
        "synchronisations": f"1 a step, of {_size(gradients)} of gradients" if processes > 1 else "none, one process",
        "loss": _loss(loss),
        "scores": _scores(micro_batches, loss, processes),
        "optimizer": describe_optimizer(encoder, loss.learnt, config.optimizer),
        "steps": f"{steps:,}, {steps / count_steps_per_epoch(data.size, trainer.batch_size):.2f} epochs",
        "precision": f"{trainer.precision.name} on {accelerator.device.type}",
        "MaxSim": loss.maxsim + (f", as {reason}" if loss.maxsim != trainer.maxsim.name and reason else ""),
        "output": config.output_dir,
    }


def describe_data(config: Config, data: Data, encoder: MultiVectorEncoder) -> dict[str, Any]:
    """What `mode=check` says of the data, for the report: facts by name, of each set and of the evaluation."""
    sets = {}
    for examples in data.sets:
        counted = {task: _token_counts(encoder, examples, task) for task in ("query", "document")}
        tokens = {task: counts for task, (counts, _) in counted.items()}
        sets[examples.name] = describe_set(config, examples, tokens, {task: cap for task, (_, cap) in counted.items()})
    return {"sets": sets, **describe_evaluation(data.evaluation)}


def _documents(counts: "np.ndarray[tuple[int], np.dtype[np.int64]]", others: float) -> str:
    if not others:
        return "1, its positive"
    drawn = f", drawn from up to {counts.max()} anew each epoch" if others < counts.mean() else ""
    return f"its positive and {others:.4g} more{drawn}"


def _negatives(loss: LossConfig, others: float, micro_batch: int, processes: int) -> str:
    if not loss.terms.contrastive:
        return "none: no contrastive term"
    own = micro_batch / processes
    words = f"{own - 1:.4g} in the batch"
    words += f" + {micro_batch - own:.4g} gathered from other processes" if processes > 1 else ""
    if others:
        words += f" + {others * (micro_batch - 1):.4g} explicit of other queries"
        words += f" + {others:.4g} of its own" if loss.contrastive.own_negatives else ""
    masked = ["known positives"] if loss.contrastive.mask_known_positives else []
    if loss.contrastive.max_negative_ratio is not None:
        masked.append(f"those above {loss.contrastive.max_negative_ratio:g} of the positive's score")
    return words + (f"; {' and '.join(masked)} masked (train/..._masked)" if masked else "")


def _loss(loss: Loss) -> str:
    words = " + ".join(f"{weight:g} {name} of {loss.reads[name].name}" for name, weight in loss.weights.items())
    if len(loss.widths) > 1:
        words += ", at the widths " + ", ".join(f"{width} x {weight:g}" for width, weight in loss.widths.items())
    return words


def _scores(micro_batches: list[Batch], loss: Loss, processes: int) -> str:
    """How many there are on one process, and the memory that they and the winners for their gradient take."""
    largest = max(micro_batches, key=lambda batch: len(batch.places))
    queries, documents = largest.candidates.shape
    whose = "of its own"
    if "contrastive" in loss.terms:
        documents, whose = len(largest.document_ids) * processes, "of all processes" if processes > 1 else "of all"
    tokens = max(chunk["input_ids"].shape[1] for chunk in largest.queries.chunks)
    # A float32 for each score, its softmax and the gradients of both, and the winner for each of the query's tokens.
    size = len(loss.widths) * queries * documents * (16 + tokens * (2 if loss.maxsim == "cuda" else 4))
    return f"{queries:,} queries x {documents:,} documents {whose}, {_size(size)} with gradients and winners"


def _size(count: float) -> str:
    """Bytes, as a person reads them."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 999.5 else f"{count:,.0f} GB"


def _data(config: Config, data: Data, batches: StepBatches) -> str:
    """The sets, their examples, and in a mix their share of the queries."""
    if len(data.sets) == 1:
        return f"{data.sets[0].name}, {data.size:,} training examples"
    shares = np.array(batches.order.shares) / sum(batches.order.shares)
    sets = [f"{each.name} {share:.0%} of {len(each):,}" for each, share in zip(data.sets, shares, strict=True)]
    kind = "steps of one set each" if batches.order.one_set else "steps of all sets"
    return f"mix of {', '.join(sets)} training examples; {kind}"


def _lengths(encoder: MultiVectorEncoder, sets: Sequence[TrainingSet], task: str) -> str:
    """The cap of a side, how much of a sample it cuts, and what is added to a text."""
    cut, every = 0, list[int]()
    for each in sets:
        lengths, cap = _token_counts(encoder, each, task)
        cut += int((lengths > cap).sum())
        every += lengths.tolist()
    measured = f", which cuts {cut / len(every):.0%} of {len(every)}, whose median is {statistics.median_low(every)}"
    own = [f"{each.name} {length}" for each in sets if (length := getattr(each.config, f"{task}_length")) is not None]
    return describe_side(encoder, task, measured=(f" ({', '.join(own)})" if own else "") + measured)


def _token_counts(encoder: MultiVectorEncoder, examples: TrainingSet, task: str) -> tuple[IntArray, int]:
    """Tokens of each of a sample of a side's texts, what is added to them included, and the cap that cuts them."""
    transformer = encoder[0]
    assert isinstance(transformer, Transformer)
    assert transformer.tokenizer is not None
    prefix, length = (getattr(examples.config, f"{task}_{key}") for key in ("prefix", "length"))
    prompt = (encoder.prompts.get(task) or "") if prefix is None else prefix
    texts = [prompt + text for text in sample(examples, task, most=SAMPLE)]
    lengths = [len(tokens) for tokens in transformer.tokenizer(texts)["input_ids"]]
    return np.array(lengths), length or token_cap(transformer, task)


def describe_side(encoder: MultiVectorEncoder, task: str, *, measured: str = "") -> str:
    """The cap of a side and what is added to a text. measured: what the cap does to texts."""
    transformer = encoder[0]
    assert isinstance(transformer, Transformer)
    cap, prompt = token_cap(transformer, task), encoder.prompts.get(task) or ""
    limit = f"at most {cap} tokens" if cap < 10**9 else "no limit"  # tokenizers without one say 10^30
    words = f"{limit}{measured}"
    if task == "query" and (expansion := transformer.query_expansion):
        least = "" if expansion["strategy"] == "fixed" else "at least "
        seen = "attended" if expansion["attend"] else "unattended"
        words += f"; filled to {least}{expansion['length']} with {seen} mask tokens"
    return f"{words}; prefix {prompt!r}" if prompt else words
