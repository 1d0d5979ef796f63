"""The whole loss: from the config to the weighted sum of terms."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import Config, ContrastiveConfig, LossConfig, MatryoshkaConfig, Normalization, Score
from losses import factory, scores
from losses.batch import EncodedBatch
from losses.contrastive import ContrastiveLoss
from losses.distillation import DistillationLoss
from losses.factory import build_loss
from losses.margin_mse import MarginMSELoss
from losses.maxsim import maxsim, maxsim_candidates
from losses.temperature import LearntTemperature
from tests.losses.batches import (
    SIZE,
    add_up,
    assert_equal,
    averaged,
    contrastive,
    distillation,
    loop,
    make_batch,
    make_loss_config,
    margin_mse,
    take_gradients,
)

TERMS = ("contrastive", "distillation", "margin_mse")


def plain(config: LossConfig) -> LossConfig:
    """The same with a contrastive term that leaves out nothing and learns nothing."""
    return replace(
        config,
        contrastive=ContrastiveConfig(
            score=Score.maxsim,
            temperature=0.5,
            learn_temperature=False,
            temperature_bounds=[0.1, 2.0],
            symmetric=False,
            own_negatives=True,
            mask_known_positives=False,
            max_negative_ratio=None,
        ),
    )


def test_the_loss_is_the_sum_of_its_terms_by_their_weights_and_logs_each_before_its_weight() -> None:
    batch = make_batch([3, 1, 2])
    config = plain(make_loss_config(contrastive=0.5, distillation=2.0, margin_mse=0.25))
    expected = {
        "contrastive": loop(batch, contrastive(batch, temperature=0.5)),
        "distillation": loop(
            batch,
            distillation(batch, student_temperature=0.75, teacher_temperature=2.0, min_max=True),
            kind=Score.mean_maxsim,
        ),
        "margin_mse": loop(batch, margin_mse(batch, teacher_temperature=4.0), kind=Score.mean_maxsim),
    }
    values, logged = build_loss(config, width=SIZE, maxsim="reference")(batch)
    assert_equal(
        values.mean(),
        batch,
        add_up((0.5, expected["contrastive"]), (2.0, expected["distillation"]), (0.25, expected["margin_mse"])),
    )
    for query, value in enumerate(values):
        parts = {
            "contrastive": loop(batch, contrastive(batch, temperature=0.5, only=query)),
            "distillation": loop(
                batch,
                distillation(batch, student_temperature=0.75, teacher_temperature=2.0, min_max=True, only=query),
                kind=Score.mean_maxsim,
            ),
            "margin_mse": loop(batch, margin_mse(batch, teacher_temperature=4.0, only=query), kind=Score.mean_maxsim),
        }
        assert_equal(
            value, batch, add_up((0.5, parts["contrastive"]), (2.0, parts["distillation"]), (0.25, parts["margin_mse"]))
        )
    assert list(logged) == list(TERMS)
    for name, value in logged.items():
        assert value.item() == pytest.approx(expected[name][0], rel=1e-10)
        assert not value.requires_grad


@pytest.mark.parametrize("name", TERMS)
def test_a_term_of_weight_0_is_neither_computed_nor_logged(name: str) -> None:
    batch = make_batch([3, 1, 2])
    both = {other: 0.5 for other in TERMS if other != name}
    loss = build_loss(plain(make_loss_config(**both)), width=SIZE, maxsim="reference")
    total, logged = averaged(loss)(batch)
    parts = [build_loss(plain(make_loss_config(**{other: 0.5})), width=SIZE, maxsim="reference") for other in both]
    assert list(loss.terms) == list(logged) == list(both)
    assert total.item() == pytest.approx(sum(averaged(part)(batch)[0].item() for part in parts), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_vectors_of_up_to_32_bits_is_float32(dtype: torch.dtype) -> None:
    batch = make_batch([3, 1, 2], dtype=dtype)
    config = replace(
        make_loss_config(contrastive=0.5, distillation=2.0, margin_mse=0.25),
        matryoshka=MatryoshkaConfig(widths=[6, 3], weights=[1.0, 0.5]),
    )
    loss = build_loss(config, width=SIZE, maxsim="reference")
    total, _ = averaged(loss)(batch)
    wide = replace(
        batch,
        queries=batch.queries.detach().double().requires_grad_(),
        documents=batch.documents.detach().double().requires_grad_(),
    )
    expected, _ = averaged(loss)(wide)
    assert total.dtype == torch.float32
    # bfloat16 vectors are cut and brought to unit length in bfloat16, in steps of 2^-8.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    assert total.item() == pytest.approx(expected.item(), rel=tolerance)
    for found, gradient in zip(take_gradients(total, batch), take_gradients(expected, wide), strict=True):
        assert found.dtype == dtype
        error = (found.double() - gradient).abs().max() / gradient.abs().max()
        assert error < 8 * tolerance, error


class Calls:
    """Count the calls of a function, and keep what backend they ask for."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.backends: list[str] = []

    def __call__(self, *inputs: Tensor, backend: str) -> Any:
        self.backends.append(backend)
        return self.function(*inputs, backend=backend)


@pytest.mark.parametrize(
    ("terms", "all_pairs"),
    [
        (dict.fromkeys(TERMS, 1.0), True),
        ({"contrastive": 1.0}, True),
        ({"distillation": 1.0, "margin_mse": 1.0}, False),
    ],
    ids=["all terms", "contrastive", "taught"],
)
def test_maxsim_runs_once_for_all_terms_of_a_width(
    terms: dict[str, float], all_pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch([3, 1, 2])
    config = replace(make_loss_config(**terms), matryoshka=MatryoshkaConfig(widths=[6, 4, 2], weights=[1.0, 1.0, 1.0]))
    pairs, candidates = Calls(maxsim), Calls(maxsim_candidates)
    monkeypatch.setattr(scores, "maxsim", pairs)
    monkeypatch.setattr(scores, "maxsim_candidates", candidates)
    for backend in ("reference", "auto"):
        build_loss(config, width=SIZE, maxsim=backend)(batch)
    used, unused = (pairs, candidates) if all_pairs else (candidates, pairs)
    assert used.backends == ["reference"] * 3 + ["auto"] * 3
    assert unused.backends == []


def test_documents_are_gathered_once_and_for_the_contrastive_term_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([3, 1, 2])
    gathered: list[EncodedBatch] = []

    def count(given: EncodedBatch) -> scores.Pool:
        gathered.append(given)
        return scores.gather_pool(given)

    monkeypatch.setattr(factory, "gather_pool", count)
    matryoshka = MatryoshkaConfig(widths=[6, 2], weights=[1.0, 1.0])
    taught = make_loss_config(distillation=1.0, margin_mse=1.0)
    build_loss(replace(taught, matryoshka=matryoshka), width=SIZE, maxsim="reference")(batch)
    assert gathered == []
    everything = make_loss_config(contrastive=1.0, distillation=1.0)
    build_loss(replace(everything, matryoshka=matryoshka), width=SIZE, maxsim="reference")(batch)
    assert len(gathered) == 1


def test_every_key_of_the_config_reaches_its_term() -> None:
    config = replace(
        make_loss_config(contrastive=0.5, distillation=2.0, margin_mse=0.25),
        matryoshka=MatryoshkaConfig(widths=[6, 3], weights=[1.0, 0.5]),
    )
    loss = build_loss(config, width=SIZE, maxsim="cuda")
    temperature = loss.learnt["temperature"]
    assert isinstance(temperature, LearntTemperature)
    assert temperature().item() == pytest.approx(0.5, rel=1e-6)
    assert temperature.bounds == (0.1, 2.0)
    assert loss.terms == {
        "contrastive": ContrastiveLoss(
            temperature=temperature,
            symmetric=True,
            own_negatives=False,
            mask_known_positives=True,
            max_negative_ratio=1.25,
        ),
        "distillation": DistillationLoss(student_temperature=0.75, teacher_temperature=2.0, min_max=True),
        "margin_mse": MarginMSELoss(teacher_temperature=4.0),
    }
    assert loss.weights == {"contrastive": 0.5, "distillation": 2.0, "margin_mse": 0.25}
    assert loss.reads == {
        "contrastive": Score.maxsim,
        "distillation": Score.mean_maxsim,
        "margin_mse": Score.mean_maxsim,
    }
    assert loss.widths == {6: 1.0, 3: 0.5}
    assert loss.maxsim == "cuda"


def test_every_other_value_of_a_key_reaches_its_term() -> None:
    config = make_loss_config(contrastive=1.0, distillation=1.0)
    config = replace(
        config,
        contrastive=replace(plain(config).contrastive, score=Score.mean_maxsim, temperature=0.25),
        distillation=replace(config.distillation, score=Score.maxsim, normalization=Normalization.none),
    )
    loss = build_loss(config, width=SIZE, maxsim="reference")
    assert loss.terms == {
        "contrastive": ContrastiveLoss(
            temperature=0.25,
            symmetric=False,
            own_negatives=True,
            mask_known_positives=False,
            max_negative_ratio=None,
        ),
        "distillation": DistillationLoss(student_temperature=0.75, teacher_temperature=2.0, min_max=False),
    }
    assert loss.reads == {"contrastive": Score.mean_maxsim, "distillation": Score.maxsim}
    assert list(loss.learnt.parameters()) == []


def test_a_temperature_is_learnt_for_the_contrastive_term_alone() -> None:
    config = make_loss_config(distillation=1.0)
    assert config.contrastive.learn_temperature
    assert list(build_loss(config, width=SIZE, maxsim="reference").learnt.parameters()) == []


def test_without_widths_the_loss_is_computed_at_the_model_s_own() -> None:
    loss = build_loss(make_loss_config(contrastive=1.0), width=SIZE, maxsim="reference")
    assert loss.widths == {SIZE: 1.0}


# The terms and weights of each file of configs/loss.
FILES = {
    "contrastive": {"contrastive": 1.0},
    "distillation": {"distillation": 1.0},
    "distillation_contrastive": {"contrastive": 0.1, "distillation": 1.0},
    "margin_mse": {"margin_mse": 1.0},
}


@pytest.mark.parametrize("name", FILES)
def test_each_file_of_the_group_names_its_terms(name: str, make_config: Callable[..., Config]) -> None:
    config = make_config(f"loss={name}", "data=distillation_ids", "data.path=here").loss
    assert {term: weight for term, weight in asdict(config.terms).items() if weight} == FILES[name]
    assert list(build_loss(config, width=SIZE, maxsim="reference").terms) == list(FILES[name])


def test_the_files_state_pylate_s_conventions(make_config: Callable[..., Config]) -> None:
    loss = build_loss(
        make_config("loss=distillation_contrastive", "data=distillation_ids", "data.path=here").loss,
        width=SIZE,
        maxsim="reference",
    )
    assert loss.terms == {
        "contrastive": ContrastiveLoss(
            temperature=1.0,
            symmetric=False,
            own_negatives=True,
            mask_known_positives=True,
            max_negative_ratio=None,
        ),
        "distillation": DistillationLoss(student_temperature=1.0, teacher_temperature=1.0, min_max=True),
    }
    assert set(loss.reads.values()) == {Score.maxsim}
