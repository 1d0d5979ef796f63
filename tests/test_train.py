"""Commands as a user types them: what they leave, what they show, and what a mistake gets."""

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from sentence_transformers import MultiVectorEncoder

from tests.conftest import lines_of, refused, run_command, tiny_overrides, type_here

pytestmark = pytest.mark.usefixtures("own_caches")

PAIRS = [
    ("what is a cat", "a cat is an animal that meows", "a fish swims"),
    ("what is a dog", "a dog is an animal that barks", "a cat meows"),
    ("which animal swims", "a fish is an animal that swims", "the dog barks"),
    ("which animal meows", "the cat is the animal that meows", "the fish swims"),
    ("which animal barks", "the dog is the animal that barks", "the cat meows"),
    ("what is a fish", "a fish swims", "a dog barks"),
    ("what meows", "the cat meows", "a dog"),
    ("what barks", "the dog barks", "a fish"),
]


def write_pairs(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    rows = [{"query": query, "positive": positive, "negative": negative} for query, positive, negative in PAIRS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_distillation(folder: Path, *, scores: list[float]) -> Path:
    """The pairs as rows that a teacher has ranked: positive, negative, and a text of the next row."""
    texts = list(dict.fromkeys(text for _, *documents in PAIRS for text in documents))
    ranked = [[*PAIRS[row][1:], PAIRS[row - 1][1]] for row in range(len(PAIRS))]
    files: dict[str, list[dict[str, Any]]] = {
        "queries": [{"query_id": row, "text": query} for row, (query, *_) in enumerate(PAIRS)],
        "documents": [{"document_id": row, "text": text} for row, text in enumerate(texts)],
        "train": [
            {"query_id": row, "document_ids": [texts.index(text) for text in own], "scores": scores}
            for row, own in enumerate(ranked)
        ],
    }
    folder.mkdir()
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    return write_pairs(tmp_path)


@pytest.fixture
def tiny_run(tiny_bert: Path, tmp_path: Path, pairs_file: Path) -> list[str]:
    """Arguments of a run of seconds: tiny weights, eight pairs, scored on themselves."""
    return [
        *tiny_overrides(tiny_bert, tmp_path),
        "data=pairs",
        f"data.path={pairs_file}",
        f"data.evaluation_path={pairs_file}",
        "trainer.batch_size=4",
        "trainer.steps=3",
    ]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- what a run leaves ---


def test_the_embedded_default_trains_real_weights_and_leaves_a_model_that_stock_code_loads(tmp_path: Path) -> None:
    output = tmp_path / "run"
    # A small share of the modules is held out: scoring it takes longer than two steps.
    few = ["trainer.steps=2", "trainer.batch_size=8", "data.evaluation_fraction=0.02"]
    done = run_command(*few, f"output_dir={output}", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    result = read_json(output / "result.json")
    assert result["steps"] == 2
    # An epoch is cut evenly: its steps have seven or eight queries, these two seven and eight.
    assert result["queries"] == 15
    assert result["processes"] == 1
    assert result["maxsim"] == "reference"
    assert (result["head_parameters"], result["embedding_size"]) == (384 * 128, 128)
    assert 0.4 < result["before"]["ndcg@10"] < 1
    assert result["after"]["ndcg@10"] != result["before"]["ndcg@10"]
    assert 0 <= result["padding_fraction"] < 1
    for key in ("seconds", "queries_per_second", "document_tokens_per_second", "peak_memory_bytes"):
        assert result[key] > 0, key
    lines = read_lines(output / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["eval/ndcg@10"] == result["before"]["ndcg@10"]
    assert lines[2]["eval/ndcg@10"] == result["after"]["ndcg@10"]
    assert all(line["train/loss"] > 0 for line in lines[1:])
    for name, means in (("scores_before.jsonl", result["before"]), ("scores.jsonl", result["after"])):
        scores = read_lines(output / name)
        assert [row["query"] for row in scores] == [f"q{number}" for number in range(len(scores))]
        for metric, mean in means.items():
            assert fmean(row[metric] for row in scores) == pytest.approx(mean, rel=1e-12), metric

    code = (
        "from sentence_transformers import MultiVectorEncoder\n"
        f"model = MultiVectorEncoder({result['model']!r})\n"
        "scores = model.similarity(model.encode_query(['round it']), model.encode_document(['def round(x): x']))\n"
        "print(scores.shape, model.get_embedding_dimension())"
    )
    stock = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert stock.stdout == "torch.Size([1, 1]) 128\n", stock.stderr
    assert f'MultiVectorEncoder("{result["model"]}")' in done.stdout


def test_the_saved_model_scores_as_the_run_said(tiny_run: list[str], tmp_path: Path) -> None:
    done = type_here(*tiny_run)
    assert done.returncode == 0, done.stderr
    model = MultiVectorEncoder(str(tmp_path / "run" / "model"), device="cpu")
    documents = list(dict.fromkeys(text for _, positive, negative in PAIRS for text in (positive, negative)))
    scores = model.similarity(model.encode_query([query for query, *_ in PAIRS]), model.encode_document(documents))
    ranks = [
        sum(bool(other > row[documents.index(positive)]) for other in row) + 1
        for row, (_, positive, _) in zip(scores, PAIRS, strict=True)
    ]
    expected = sum(1 / rank if rank <= 10 else 0 for rank in ranks) / len(ranks)
    assert read_json(tmp_path / "run" / "result.json")["after"]["mrr@10"] == pytest.approx(expected, rel=1e-5)


def test_a_rerun_repeats_every_loss(tiny_run: list[str], tmp_path: Path) -> None:
    first = type_here(*tiny_run, "seed=7")
    assert first.returncode == 0, first.stderr
    again = type_here(f"rerun={tmp_path}/run", f"output_dir={tmp_path}/again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    losses = [
        [line.get("train/loss") for line in read_lines(tmp_path / run / "metrics.jsonl")] for run in ("run", "again")
    ]
    assert losses[0] == losses[1]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"run", "again", "pairs.jsonl"}


def test_twenty_steps_on_pairs_of_ones_own_learn_them(tiny_run: list[str], tmp_path: Path) -> None:
    done = type_here(*tiny_run, "trainer.steps=20", "optimizer.learning_rate=3e-3", "evaluation.every_steps=5")
    assert done.returncode == 0, done.stderr
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    losses = [line["train/loss"] for line in lines[1:]]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert [line["step"] for line in lines if "eval/ndcg@10" in line] == [0, 5, 10, 15, 20]
    best = read_json(tmp_path / "run" / "result.json")["best"]
    assert best["ndcg@10"] == max(line["eval/ndcg@10"] for line in lines[1:] if "eval/ndcg@10" in line)


def test_epochs_set_the_number_of_steps(tiny_run: list[str], tmp_path: Path) -> None:
    done = type_here(*tiny_run, "trainer.steps=null", "trainer.epochs=1.5", "trainer.batch_size=3")
    assert done.returncode == 0, done.stderr
    # 8 examples in batches of 3 are 3 steps an epoch.
    assert read_json(tmp_path / "run" / "result.json")["steps"] == 5


def test_bfloat16_and_accumulation_train(tiny_run: list[str], tmp_path: Path) -> None:
    done = type_here(*tiny_run, "trainer.precision=bf16", "trainer.accumulation_steps=2", "optimizer.schedule=cosine")
    assert done.returncode == 0, done.stderr
    assert "bf16 on cpu" in done.stdout
    assert "2 micro-batch(es) of 2" in done.stdout
    assert all(line["train/loss"] > 0 for line in read_lines(tmp_path / "run" / "metrics.jsonl")[1:])


def test_training_goes_on_from_a_saved_model_with_its_own_settings(tiny_run: list[str], tmp_path: Path) -> None:
    first = type_here(*tiny_run, "head=mlp", "head.layers.0.out_features=48")
    assert first.returncode == 0, first.stderr
    data = [argument for argument in tiny_run if argument.startswith(("data", "trainer"))]
    done = type_here(
        *("backbone=checkpoint", f"backbone.name={tmp_path}/run/model", f"output_dir={tmp_path}/more"),
        *data,
    )
    assert done.returncode == 0, done.stderr
    assert "32 -> 48, GELU, bias" in done.stdout
    assert "48 -> 128, Identity, no bias" in done.stdout
    assert f"filled to 8 with unattended mask tokens; prefix {'[Q] '!r}" in done.stdout
    results = [read_json(tmp_path / run / "result.json") for run in ("run", "more")]
    assert results[0]["after"] == results[1]["before"]


def test_a_run_with_a_teacher_says_what_it_does_and_logs_each_part(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_distillation(tmp_path / "set", scores=[3.0, 1.0, 0.0])
    done = run_command(
        *tiny_overrides(tiny_bert, tmp_path),
        *(
            "data=distillation_ids",
            f"data.path={folder}",
            "data.evaluation_fraction=0.25",
            "data.documents_per_query=2",
        ),
        *("loss=distillation_contrastive", "loss.contrastive.learn_temperature=true"),
        "loss.distillation.normalization=none",
        *("loss.matryoshka={widths: [128, 32], weights: [1, 0.5]}", "optimizer=muon", "trainer.cache_tokens=64"),
        *("optimizer.groups=[{pattern: backbone.embeddings.*, learning_rate: 0}]", "trainer.batch_size=3"),
        *("trainer.steps=2", "trainer.gradient_checkpointing=true", "backbone.skiplist=['.']"),
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    lines = lines_of(done)
    assert "data set, 6 training examples" in lines
    # Of rows 6 and 7: "the cat meows", "a dog", "a fish swims", "the dog barks", "a fish".
    assert "evaluation 2 queries, 5 documents, each query's own re-ranked" in lines
    assert "documents a query its positive and 1 more, drawn from up to 2 anew each epoch" in lines
    assert (
        "negatives a query 2 in the batch + 2 explicit of other queries + 1 of its own; known positives masked "
        "(train/..._masked)" in lines
    )
    assert any(line.endswith("a step and process, of at most 64 tokens, each encoded twice") for line in lines)
    assert "synchronisations none, one process" in lines
    assert "loss 0.1 contrastive of maxsim + 1 distillation of maxsim, at the widths 128 x 1, 32 x 0.5" in lines
    # Four numbers a score, and an index for each of 8 query tokens, at two widths.
    assert "scores 3 queries x 6 documents of all, 1.73 kB with gradients and winners" in lines
    assert (
        "optimizer muon 0.001 for 13 matrices, adamw 8e-05 for the rest; frozen: backbone.embeddings.* (5,504 "
        "parameters)" in lines
    )

    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert {"eval/ndcg@10", "eval/ndcg@10/32"} <= set(metrics[0])
    terms = {f"train/{term}@{width}" for term in ("contrastive", "distillation") for width in (128, 32)}
    rates = {f"train/learning_rate/{name}" for name in ("adamw", "muon")}
    assert terms | rates | {"train/temperature", "train/known_positives_masked"} <= set(metrics[1])
    assert any(line.startswith("step 1/2 loss ") and " (contrastive " in line for line in lines)
    change = read_json(tmp_path / "run" / "result.json")["change"]
    assert (
        f"change of ndcg@10: {change['change']:+.4f}, 95 % interval over the queries {change['low']:+.4f} to "
        f"{change['high']:+.4f}" in lines
    )


# --- what a person sees ---


def test_the_start_up_table_shows_the_widths_and_the_batch(tiny_run: list[str]) -> None:
    done = type_here(*tiny_run, "head=mlp_residual", "head.layers.0.out_features=512", "trainer.steps=1")
    assert done.returncode == 0, done.stderr
    lines = lines_of(done)
    # 32 x 512 weights, as many of the residual's map, 512 biases
    assert "Dense 32 -> 512, GELU, bias, residual over a learned map 33,280" in lines
    assert "Dense 512 -> 128, Identity, no bias 65,536" in lines
    assert "batch 4 queries a step, 1 micro-batch(es) of 4, 1 process(es)" in lines
    assert "documents a query its positive and 1 more" in lines
    assert (
        "negatives a query 3 in the batch + 3 explicit of other queries + 1 of its own; known positives masked "
        "(train/..._masked)" in lines
    )
    assert "loss 1 contrastive of maxsim" in lines
    assert "optimizer adamw 0.0001" in lines
    assert "MaxSim reference, as the kernel needs an NVIDIA GPU, and this runs on cpu" in lines


def test_two_linear_layers_are_called_what_they_are(tiny_run: list[str]) -> None:
    done = type_here(*tiny_run, "head=ettin_mlp", "trainer.steps=1")
    assert "32 -> 64 -> 32, 6,144 parameters; linear in disguise: it folds to one 32 -> 32 matrix" in done.stdout


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step_and_the_examples(
    tiny_run: list[str], tmp_path: Path
) -> None:
    done = type_here(*tiny_run, "optimizer.learning_rate=1e30", "optimizer.warmup_fraction=0", "trainer.steps=9")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"error: step 2: the loss is nan; the batch is {tmp_path}/pairs.jsonl:" in done.stderr
    batch = read_lines(tmp_path / "run" / "failed_batch.jsonl")
    assert len(batch) == 4
    assert {example["query"] for example in batch} <= {query for query, *_ in PAIRS}
    assert not (tmp_path / "run" / "model").exists()


# --- what a mistake gets ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["head.layer=[]"], "head.layer is no key; the nearest is head.layers "),
        (["+head.foo=1"], "head.foo is no key; the nearest is head.seed "),
        (["trainer.stepz=5"], "trainer.stepz is no key; the nearest is trainer.steps "),
        (["hed=mlp"], "hed is no key; the nearest is head "),
        (["head.layers=[{foo:1}]"], "head.layers[0].foo is no key; the nearest is head.layers.0.factor "),
        (["head=mlp_residul"], "head=mlp_residul is no member; the nearest is mlp_residual, of deep, default"),
        (["head=null"], "head=null: a group takes the name of a member"),
        (["head=linear,mlp"], "head=linear,mlp lists several values: python train.py -m head=linear,mlp runs them"),
        (["trainer.steps=abc"], "trainer.steps=abc must be of type integer"),
        (["tracker.name=tensorboard"], "tracker.name=tensorboard must be one of none, wandb"),
        (["trainer.precision=int8"], "trainer.precision=int8 must be one of float32, bf16, fp16"),
        (
            ["head=linear", "head.layers.0.out_features=wide"],
            "head.layers[0].out_features=wide must be of type integer",
        ),
        (
            ["head=linear", "head.layers.0.activation=gelu2"],
            "head.layers[0].activation=gelu2 must be one of identity, relu",
        ),
        (["head=linear", "head.layers.0.out_features=0"], "head.layers[0].out_features=0 must be positive"),
        (
            ["head=linear", "head.layers.3.bias=true"],
            "head.layers[3] does not exist: to lengthen a list, give it whole",
        ),
        (
            ["head=linear", "head.layers=[]"],
            "head.layers=[] with head.keep=none leaves no layer: add one, set head.embedding_size, or set "
            "head.keep=all",
        ),
        (["loss.contrastive.temperature=0"], "loss.contrastive.temperature=0.0 must be positive"),
        (["loss.temperature=0.5"], "loss.temperature is no key; the nearest is loss.contrastive.temperature "),
        (
            ["data=pairs", "data.path=mine.jsonl", "loss=distillation"],
            "loss.terms.distillation=1 needs teacher scores, and data=pairs has none: "
            "use data=scored, distillation_ids or stanford, or set it to 0",
        ),
        (
            ["optimizer.groups=[{patern:head.*}]"],
            "optimizer.groups[0].patern is no key; the nearest is optimizer.groups.0.pattern ",
        ),
        (
            ["optimizer.muon_momentum=0.9"],
            "optimizer.muon_momentum=0.9 has no effect on optimizer=adamw: use optimizer=muon",
        ),
        (["trainer.epochs=1"], "trainer.steps=110 and trainer.epochs=1.0: exactly one must be set"),
        (["seed=["], "seed=[ cannot be parsed: write key=value"),
        (["backbone=checkpoint"], "backbone.name has no value: set backbone.name=..."),
        (
            ["backbone.query_length=600"],
            "backbone.query_length=600 exceeds the backbone's 512 positions: set 512 or less",
        ),
        (["backbone.document_length=9999"], "backbone.document_length=9999 exceeds the backbone's 512 positions"),
        (["backbone.name=package:no_such/model"], "backbone.name=package:no_such/model: no Python package no_such"),
        (["backbone.name=no/such-model"], "backbone.name=no/such-model is neither a folder, an installed package"),
        ([f"backbone.sha256={'0' * 64}"], f"backbone.sha256={'0' * 64}: "),
        (["trainer.maxsim=cuda"], "trainer.maxsim=cuda: the kernel needs an NVIDIA GPU, and this runs on cpu"),
        (["rerun=no/such/run"], "rerun=no/such/run: the folder has no config.yaml"),
        (["resume=no/such/run"], "resume=no/such/run: the folder has no config.yaml"),
        (["rerun=a", "resume=b"], "rerun=a resume=b: give one folder, to repeat its run or to go on with it"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_in_the_config_gets_one_line_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    assert refused(type_here(*arguments, cwd=tmp_path)).startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", [], "{path} holds no example: give a file with"),
        ('{"query": "a", "positive": "b"}\n{"query": "a", \n', [], "{path}:2 is no JSON ("),
        (
            '{"query": "a", "positive": "b"}\n\n{"query": " ", "positive": "b"}\n',
            [],
            "1 of 2 examples of {path} have an empty text, first {path}:3, more than data.max_empty=0.01",
        ),
        (
            '{"query": "a", "positive": "b"}\n{"query": "a"}\n',
            [],
            "1 of 2 examples of {path} have an empty text, first {path}:2, more than data.max_empty=0.01",
        ),
        ('{"query": "a", "positive": 3}\n', [], "{path}:1: positive=3 must be a text"),
        (
            '{"question": "a", "positive": "b"}\n',
            [],
            "data.query_column=query: {path} has the columns question, positive: name one with data.query_c",
        ),
        (
            "".join(f'{{"query": "a{row}", "positive": "b"}}\n' for row in range(5)),
            ["data.evaluation_fraction=0"],
            "trainer.batch_size=32 is larger than the 5 training examples: set 5 or less",
        ),
    ],
    ids=["empty file", "malformed", "empty query", "no positive", "number", "missing column", "large batch"],
)
def test_a_mistake_in_the_data_gets_one_line_with_its_place(
    content: str, arguments: list[str], message: str, tiny_bert: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    done = type_here(*tiny_overrides(tiny_bert, tmp_path), "data=pairs", f"data.path={path}", *arguments)
    assert refused(done).startswith(message.format(path=path))
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_leaves_one_document_gets_one_line(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_distillation(tmp_path / "set", scores=[30.0, 10.0, 0.0])
    done = type_here(
        *(*tiny_overrides(tiny_bert, tmp_path), "data=distillation_ids", f"data.path={folder}", "loss=distillation"),
        *("trainer.batch_size=4", "data.evaluation_fraction=0"),
    )
    assert refused(done) == (
        "loss.distillation.teacher_temperature=1 leaves one document more than 99% in 100% of 8 queries, such as "
        f"{folder}/train.jsonl:1 (30, 10, 0, ...): raise it; the scores of a query have a standard deviation of 12.5"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "optimizer.groups=[{pattern: backbone.*, learning_rate: 0}, {pattern: head.*, learning_rate: 0}]",
            "optimizer.groups freeze every parameter of the encoder: with learning_rate=0 for backbone.*, head.* "
            "there is nothing left to train: give one a rate above 0",
        ),
        (
            "loss.matryoshka={widths: [64, 32], weights: [1, 1]}",
            "loss.matryoshka.widths=[64, 32] must begin with the model's own width, 128: "
            "set it to [128, 64, 32], or give the head another width",
        ),
    ],
    ids=["all frozen", "widths"],
)
def test_what_the_model_cannot_do_gets_one_line(
    argument: str, message: str, tiny_run: list[str], tmp_path: Path
) -> None:
    assert refused(type_here(*tiny_run, argument)).startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("trainer.stepz=5", "trainer.stepz is no key; "),
        ("optimizer.groups=[{pattern: '*', learning_rate: 0}]", "optimizer.groups freeze every parameter "),
    ],
    ids=["before torch is imported", "after the model is built"],
)
def test_a_mistake_is_all_that_a_process_says_and_its_status(
    argument: str, message: str, tiny_run: list[str], tmp_path: Path
) -> None:
    assert refused(run_command(*tiny_run, argument)).startswith(message)
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there_says_where_it_was_looked_for(tiny_bert: Path, tmp_path: Path) -> None:
    done = type_here(
        *tiny_overrides(tiny_bert, tmp_path), "data=pairs", "data.path=mine.jsonl", cwd=tmp_path, LATEFORGE_DATA="sets"
    )
    assert refused(done) == (
        "data.path=mine.jsonl: there is no sets/mine.jsonl or mine.jsonl: give an existing file, or set data.root"
    )


def test_a_finished_run_is_not_overwritten_unasked(tiny_run: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "result.json").write_text("{}")
    message = refused(type_here(*tiny_run))
    assert message.startswith(
        f"output_dir={folder} holds a finished run: set another name= or output_dir=, or overwrite"
    )
    assert (folder / "result.json").read_text() == "{}"
    done = type_here(*tiny_run, "overwrite=true", "trainer.steps=1")
    assert done.returncode == 0, done.stderr
    assert read_json(folder / "result.json")["steps"] == 1


def test_a_full_disk_while_saving_leaves_no_half_written_model(tiny_run: list[str], tmp_path: Path) -> None:
    def limit() -> None:
        # Files may grow to 20 kB: logs fit, the weights do not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run_command(*tiny_run, "trainer.steps=1", before=limit)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: output_dir={tmp_path}/run: model cannot be written (")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *(".lock", "config.yaml", "metrics.jsonl", "scores_before.jsonl")
    }


def test_half_precision_that_needs_a_gpu_says_so(tiny_run: list[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert refused(type_here(*tiny_run, "trainer.precision=fp16")).startswith("trainer.precision=fp16 needs a GPU")


def test_help_is_a_page_of_its_own() -> None:
    done = type_here("--help")
    assert done.returncode == 0
    assert "mlp_residual    Widen by 2 with GELU and a residual" in done.stdout
    assert "python train.py rerun=outputs/quickstart output_dir=outputs/again" in done.stdout


# --- real data, where it lies on this machine ---


def test_squad_sentences_train_by_their_name(tiny_bert: Path, tmp_path: Path, real_data: Path) -> None:
    done = type_here(
        *tiny_overrides(tiny_bert, tmp_path),
        *("data=pairs", "data.path=squad_sentences", "trainer.steps=3", "data.evaluation_fraction=0.01"),
        LATEFORGE_DATA=str(real_data),
    )
    assert done.returncode == 0, done.stderr
    with gzip.open(real_data / "squad_sentences" / "train.jsonl.gz", "rt") as file:
        examples = sum(1 for _ in file)
    assert examples > 11_000
    # At most 32 a step: an epoch is cut evenly.
    assert 93 <= read_json(tmp_path / "run" / "result.json")["queries"] <= 96


def test_the_teacher_of_trec_dl_trains_by_its_experiment(tiny_bert: Path, tmp_path: Path, real_data: Path) -> None:
    done = type_here(
        *("experiment=distillation_trec_dl", *tiny_overrides(tiny_bert, tmp_path), "trainer.steps=2"),
        LATEFORGE_DATA=str(real_data),
    )
    assert done.returncode == 0, done.stderr
    lines = lines_of(done)
    assert "data trec_dl_distillation, 100 training examples" in lines
    assert any(line.startswith("evaluation 29 queries, ") for line in lines)
    assert all(line["train/distillation"] > 0 for line in read_lines(tmp_path / "run" / "metrics.jsonl")[1:])
