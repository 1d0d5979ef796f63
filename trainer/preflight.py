"""`mode=check`: all that can be said of a run before its weights are loaded, and a verdict."""

import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from configs.schema import BackboneConfig, Config, ConfigError
from trainer.data import Data, load_sets
from trainer.data.check import (
    data_warnings,
    describe_evaluation,
    describe_set,
    length_warnings,
    project,
    sample,
)
from trainer.data.order import count_steps_per_epoch
from trainer.data.tables import IntArray
from trainer.display import print_facts
from trainer.loop import count_steps
from trainer.plan import check_batch, check_teacher

# What a checkpoint that says nothing gets, as in PyLate.
LENGTHS = {"query": 32, "document": 180}
# The share of a matrix product's speed that a small encoder reaches.
EFFICIENCY = 0.6


def check_run(config: Config, source: str, settings: BackboneConfig, console: Console) -> list[str]:
    """Print what the data is and what the run would do with it. Return the errors, each a line.

    source: folder or Hub name of the backbone; settings: its own, where its files say them.
    """
    loaded, errors = load_sets(config.data)
    tokenizer = AutoTokenizer.from_pretrained(
        source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )
    caps, tokens, warnings = dict[str, dict[str, int]](), dict[str, dict[str, IntArray]](), list[str]()
    for examples in loaded.sets:
        name = examples.name
        caps[name] = {
            task: getattr(examples.config, f"{task}_length") or getattr(settings, f"{task}_length") or length
            for task, length in LENGTHS.items()
        }
        tokens[name] = {task: _lengths(tokenizer, sample(examples, task)) for task in LENGTHS}
        print_facts(console, {name: "", **describe_set(config, examples, tokens[name], caps[name])})
        warnings += length_warnings(name, tokens[name], caps[name])
    facts = describe_evaluation(loaded.evaluation)
    warnings = [*data_warnings(loaded.sets, loaded.evaluation), *warnings]
    if not errors:
        errors = list(_refused(config, loaded, settings))
    if not errors:
        steps = count_steps(config, loaded.size)
        cut = {name: {task: np.minimum(own[task], caps[name][task]) for task in own} for name, own in tokens.items()}
        epochs = steps / count_steps_per_epoch(loaded.size, config.trainer.batch_size)
        facts |= project(
            config, loaded, cut, steps=steps, epochs=epochs, seconds_a_token=_seconds_a_token(source, settings)
        )
    print_facts(console, facts)
    for warning in warnings:
        console.print(f"warning: {warning}")
    counted = f"{len(errors)} error(s), {len(warnings)} warning(s)"
    console.print(f"{counted}: {'this would not train' if errors else 'ready to train'}")
    return errors


def _refused(config: Config, data: Data, settings: BackboneConfig) -> Iterator[str]:
    for check in (
        lambda: check_batch(config, data, 1),
        lambda: check_teacher(config, data, query_length=settings.query_length),
    ):
        try:
            check()
        except ConfigError as error:
            yield str(error)


def _lengths(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> IntArray:
    """Tokens of each text, special ones and a marker included."""
    return np.array([len(ids) + 1 for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]])


def _seconds_a_token(source: str, settings: BackboneConfig) -> float:
    """Of a forward pass, from the backbone's size and a matrix product's speed here; nan where its code is its own."""
    with suppress(ValueError, OSError, ImportError, KeyError), torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(source, revision=settings.revision))
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        parameters = sum(each.numel() for each in model.parameters() if id(each) not in embeddings)
        return float(2 * parameters / (EFFICIENCY * _product_rate()))
    return float("nan")


def _product_rate() -> float:
    """Floating-point operations a second of a matrix product on the device that would train."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    factor = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        float((factor @ factor)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds))
