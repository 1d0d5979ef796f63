"""Scores of saved models as a user asks for them, held against trec_eval and against every score by itself."""

import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import pytrec_eval
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder

from scripts import evaluate
from scripts.models import compose_config, load_model
from tests.conftest import ROOT, WORDS, run_command
from trainer.data import load_evaluation
from trainer.data.retrieval import RetrievalSet
from trainer.metrics import read_scores

pytestmark = pytest.mark.usefixtures("own_caches", "as_loud_as_before")

QUERIES, DOCUMENTS = 12, 60
METRICS = ("ndcg@10", "mrr@10", "map", "recall@100")


@pytest.fixture(autouse=True)
def new_accelerator_state() -> Iterator[None]:
    """Each test chooses its precision and its device, which the state of a process otherwise keeps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def model(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny backbone with a head, as a run saves it."""
    torch.manual_seed(0)
    encoder = load_model(str(tiny_bert), "backbone.query_length=8", "backbone.document_length=16")
    folder = tmp_path_factory.mktemp("model") / "model"
    encoder.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="module")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of graded judgements, of documents some of which are copies of others, and of ids in no order."""
    folder = tmp_path_factory.mktemp("root") / "scifact"
    write_beir(folder, seed=1)
    return folder


def retrieval_of(*composed: str) -> RetrievalSet:
    """What a config is scored on."""
    retrieval, _ = load_evaluation("set", compose_config(*composed).data)
    assert retrieval is not None
    return retrieval


def write_beir(folder: Path, *, seed: int, split: str = "test") -> None:
    generator = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, longest)))

    texts = [text(9) for _ in range(DOCUMENTS - 10)]
    texts += texts[:10]
    names = [f"d{number}" for number in generator.sample(range(1000), DOCUMENTS)]
    (folder / "qrels").mkdir(parents=True)
    rows = {
        "queries": [{"_id": f"q{number}", "text": text(5)} for number in range(QUERIES + 3)],
        "corpus": [{"_id": name, "title": "", "text": each} for name, each in zip(names, texts, strict=True)],
    }
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    judged = [
        (f"q{number}", document, generator.randint(0, 2))
        for number in range(QUERIES)
        for document in generator.sample(names, 6)
    ]
    judged += [(f"q{number}", names[number], 1) for number in range(QUERIES)]
    lines = {(query, document): f"{query}\t{document}\t{grade}\n" for query, document, grade in judged}
    (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines.values()))


@pytest.fixture
def score(
    model: Path, beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Type the command, and return its status and what it printed to both streams."""

    def run(*arguments: str) -> tuple[int, str, str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        keys = {argument.partition("=")[0] for argument in arguments}
        given = (
            [] if keys & {"data", "benchmark", "data.mix"} else ["data=beir", f"data.path={beir}", "data.split=test"]
        )
        own = {"model": model, "output_dir": tmp_path / "scores"}
        status = evaluate.main(
            [*(f"{key}={value}" for key, value in own.items() if key not in keys), *given, *arguments]
        )
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def error_of(done: tuple[int, str, str]) -> str:
    """The one line that a mistake gets."""
    status, _, error = done
    assert status == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error.removeprefix("error: ").rstrip("\n")


def read_qrels(folder: Path) -> dict[str, dict[str, int]]:
    judgements: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        judgements.setdefault(query, {})[document] = int(grade)
    return judgements


def trec_eval(run: Path, judgements: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
    """The metrics of a run file by pytrec_eval alone, by query, by name."""
    with run.open() as file:
        ranked = pytrec_eval.parse_run(file)
    cut = {
        query: dict(sorted(own.items(), key=lambda item: (item[1], item[0]), reverse=True)[:10])
        for query, own in ranked.items()
    }
    names = {"ndcg@10": "ndcg_cut_10", "map": "map", "recall@100": "recall_100"}
    found = pytrec_eval.RelevanceEvaluator(judgements, set(names.values())).evaluate(ranked)
    reciprocal = pytrec_eval.RelevanceEvaluator(judgements, {"recip_rank"}).evaluate(cut)
    values = {name: {query: own[measure] for query, own in found.items()} for name, measure in names.items()}
    return values | {"mrr@10": {query: own["recip_rank"] for query, own in reciprocal.items()}}


def test_the_files_hold_what_trec_eval_says_of_the_run(
    score: Callable[..., tuple[int, str, str]], beir: Path, tmp_path: Path
) -> None:
    status, printed, error = score("batch_size=7", "block=16")
    assert (status, error) == (0, "")
    folder = tmp_path / "scores"
    assert {path.name for path in folder.iterdir()} == {"run.trec", "scores.jsonl", "result.json"}
    result = json.loads((folder / "result.json").read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    values, expected = read_scores(folder / "scores.jsonl"), trec_eval(folder / "run.trec", read_qrels(beir))
    assert list(values) == list(METRICS)
    for name in METRICS:
        assert values[name] == pytest.approx(expected[name], abs=1e-9)
        assert result[name] == pytest.approx(math.fsum(expected[name].values()) / QUERIES, abs=1e-9)
        assert list(values[name]) == list(read_qrels(beir))
    assert 0 < result["ndcg@10"] < 1
    assert (result["queries"], result["documents"], result["processes"]) == (QUERIES, DOCUMENTS, 1)
    for speed, count in (("documents_per_second", DOCUMENTS), ("queries_per_second", QUERIES)):
        assert result[speed] == pytest.approx(count / result["seconds"])
    assert result["versions"]["torch"] == torch.__version__
    assert result["data"] == ["data=beir", f"data.path={beir}", "data.evaluation_split=test"]
    table = [line.split() for line in printed.splitlines()]
    assert ["queries", "documents", *METRICS, "documents/s"] in table
    assert [str(QUERIES), str(DOCUMENTS), *(f"{result[name]:.4f}" for name in METRICS)] in [row[1:7] for row in table]


def test_the_run_is_the_ranking_of_every_score_by_itself(
    score: Callable[..., tuple[int, str, str]], beir: Path, model: Path, tmp_path: Path
) -> None:
    assert score()[0] == 0
    encoder = MultiVectorEncoder(str(model), device="cpu")
    retrieval = retrieval_of(str(model), "data=beir", f"data.path={beir}", "data.evaluation_split=test")
    rows = [line.split() for line in (tmp_path / "scores" / "run.trec").read_text().splitlines()]
    assert len(rows) == QUERIES * DOCUMENTS
    for query, text in retrieval.queries.items():
        own = [row for row in rows if row[0] == query]
        assert [row[3] for row in own] == [str(place) for place in range(1, DOCUMENTS + 1)]
        assert {(row[1], row[5]) for row in own} == {("Q0", "lateforge")}
        vectors = encoder.encode_query([text])
        for _, _, document, _, value, _ in own:
            expected = float(encoder.similarity(vectors, encoder.encode_document([retrieval.corpus[document]])))
            assert float(value) == pytest.approx(expected, abs=1e-5)
        ranked = [(float(row[4]), row[2]) for row in own]
        assert ranked == sorted(ranked, reverse=True)
        assert len({value for value, _ in ranked}) <= DOCUMENTS - 10  # copies tie


def test_three_processes_write_the_run_file_of_one(
    score: Callable[..., tuple[int, str, str]], model: Path, beir: Path, tmp_path: Path
) -> None:
    keys = ["batch_size=5", "block=8"]
    assert score(*keys)[0] == 0
    program = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "3"]
    done = run_command(
        *(f"model={model}", f"output_dir={tmp_path}/three", *keys),
        *("data=beir", f"data.path={beir}", "data.split=test"),
        program=[*program, str(ROOT / "scripts" / "evaluate.py")],
        CUDA_VISIBLE_DEVICES="",
        HF_HOME=str(tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr
    for name in ("run.trec", "scores.jsonl"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "scores" / name).read_bytes()
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "three" / "result.json").read_text())
    assert result["processes"] == 3
    assert sum(line.startswith("{") for line in done.stdout.splitlines()) == 1


# Which set


def test_a_set_is_scored_with_its_prefixes_and_lengths(
    score: Callable[..., tuple[int, str, str]], beir: Path, tmp_path: Path
) -> None:
    data = ["data=beir", f"data.path={beir}", "data.split=test"]
    own = ["data.query_prefix=''", "data.document_prefix=''", "data.document_length=5", "data.query_length=6"]
    of_model = [key.replace("data.", "backbone.", 1) for key in own]
    runs = []
    for number, keys in enumerate(([], own, of_model)):
        status, _, error = score(*data, *keys, f"output_dir={tmp_path}/{number}")
        assert status == 0, error
        runs.append((tmp_path / f"{number}" / "run.trec").read_bytes())
    assert runs[1] == runs[2] != runs[0]


def test_of_a_mix_each_set_is_scored_by_itself(score: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    root = tmp_path / "root"
    for seed, name in enumerate(("scifact", "nfcorpus")):
        write_beir(root / name, seed=seed)
    keys = [f"data.root={root}", "data.mix={scifact: 1, nfcorpus: 1}", "data.sets.nfcorpus.evaluation_split=test"]
    status, printed, error = score(*keys, "data.sets.nfcorpus.query_prefix='a cat '")
    assert (status, error) == (0, "")
    results = json.loads(printed.splitlines()[-1])
    assert list(results) == ["scifact", "nfcorpus"]
    for name in results:
        alone = [f"data={name}", f"data.root={root}", "data.evaluation_split=test", f"output_dir={tmp_path}/{name}"]
        assert score(*alone, *(["data.query_prefix='a cat '"] if name == "nfcorpus" else []))[0] == 0
        run = (tmp_path / "scores" / name / "run.trec").read_bytes()
        assert run == (tmp_path / name / "run.trec").read_bytes()


def test_a_split_alone_is_the_one_that_is_scored(
    score: Callable[..., tuple[int, str, str]], beir: Path, tmp_path: Path
) -> None:
    data = ["data=beir", f"data.path={beir}"]
    scored = []
    for number, keys in enumerate((["data.split=test"], ["data.evaluation_split=test", "data.split=dev"])):
        status, printed, error = score(*data, *keys, f"output_dir={tmp_path}/{number}")
        assert status == 0, error
        scored.append(json.loads(printed.splitlines()[-1]))
    assert [each["ndcg@10"] for each in scored] == [scored[0]["ndcg@10"]] * 2
    # What is written can be typed again.
    assert len(retrieval_of("minilm", *scored[0]["data"]).queries) == scored[0]["queries"]


def test_other_formats_are_scored_on_what_a_run_would_be(
    score: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"query": f"what {word}", "positive": f"the {word} is an animal"} for word in WORDS]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=pairs", f"data.path={pairs}"]
    status, printed, error = score(*data, f"data.evaluation_path={pairs}")
    assert status == 0, error
    assert json.loads(printed.splitlines()[-1])["queries"] == len(WORDS)
    assert error_of(score(*data, "data.evaluation_fraction=0", f"output_dir={tmp_path}/other")).startswith(
        "pairs has no example to score on: set data.evaluation_split"
    )


def test_several_sets_are_scored_one_by_one_and_one_that_fails_leaves_the_others(
    score: Callable[..., tuple[int, str, str]], beir: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    write_beir(root / "scifact", seed=2)
    write_beir(root / "nfcorpus", seed=3, split="dev")
    status, printed, error = score("data=scifact,nfcorpus", f"data.root={root}")
    assert (status, error) == (0, "")
    results = json.loads(printed.splitlines()[-1])
    assert list(results) == ["scifact", "nfcorpus"]
    for name, result in results.items():
        assert json.loads((tmp_path / "scores" / name / "result.json").read_text()) == result
        assert result["data"] == [f"data={name}", f"data.root={root}"]
    mean = sum(result["ndcg@10"] for result in results.values()) / 2
    assert ["mean", f"{mean:.4f}"] in [line.split()[:2] for line in printed.splitlines()]
    (root / "scifact" / "corpus.jsonl").write_text('{"_id": "d1"}\n')
    status, printed, error = score("data=scifact,nfcorpus", f"data.root={root}", "overwrite=true")
    assert status == 2
    assert error == (
        f"error: scifact: {root}/scifact/corpus.jsonl:1: there is no column text; the columns are _id: rename or add "
        "it\n"
    )
    assert list(json.loads(printed.splitlines()[-1])) == ["nfcorpus"]


# Candidates


def test_candidates_are_ranked_again_and_nothing_else_is(
    score: Callable[..., tuple[int, str, str]], model: Path, beir: Path, tmp_path: Path
) -> None:
    assert score()[0] == 0
    whole: dict[str, dict[str, str]] = {}
    for line in (tmp_path / "scores" / "run.trec").read_text().splitlines():
        query, _, document, _, value, _ = line.split()
        whole.setdefault(query, {})[document] = value
    candidates = {query: list(own)[20:26] for query, own in whole.items() if query != "q0"}
    rows = [f"{query} Q0 {document} 1 0 x" for query, own in candidates.items() for document in reversed(own)]
    (tmp_path / "bm25.trec").write_text(
        "".join(f"{row}\n" for row in [*rows, "q13 Q0 d1 1 0 x".replace("d1", candidates["q1"][0])])
    )
    status, printed, error = score(f"candidates={tmp_path}/bm25.trec", f"output_dir={tmp_path}/again")
    assert (status, error) == (0, "")
    assert f"warning: 1 of {QUERIES} queries have no candidate and score 0" in printed
    ranked: dict[str, list[str]] = {}
    for line in (tmp_path / "again" / "run.trec").read_text().splitlines():
        query, _, document, _, value, _ = line.split()
        ranked.setdefault(query, []).append(document)
        assert float(value) == pytest.approx(float(whole[query][document]), abs=1e-5)
    # Where two are closer than their rounding, copies among them, either order may come.
    assert {query: sorted(own) for query, own in ranked.items()} == {
        query: sorted(own) for query, own in candidates.items()
    }
    result = json.loads(printed.splitlines()[-1])
    assert result["documents"] == len(set().union(*candidates.values()))
    values = read_scores(tmp_path / "again" / "scores.jsonl")
    expected = trec_eval(tmp_path / "again" / "run.trec", read_qrels(beir))
    for name in METRICS:
        assert values[name] == pytest.approx({"q0": 0.0} | expected[name], abs=1e-9)


def test_a_run_with_unknown_ids_is_counted_and_the_first_named(
    score: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    run = tmp_path / "run.trec"
    run.write_text("q1 Q0 nowhere 1 2.0 x\nq1 Q0 either 2 1.0 x\n")
    assert error_of(score(f"candidates={run}")) == (
        f"{run}:1: document=nowhere is not in the set that is ranked, and so in 2 of 2 lines: is this a run of these "
        "queries over this corpus?"
    )
    assert not (tmp_path / "scores").exists()


def test_bm25_is_scored_like_a_model_and_its_run_ranked_again_by_one(
    score: Callable[..., tuple[int, str, str]], beir: Path, tmp_path: Path
) -> None:
    status, printed, error = score("model=bm25", f"output_dir={tmp_path}/bm25")
    assert (status, error) == (0, "")
    result = json.loads(printed.splitlines()[-1])
    expected = trec_eval(tmp_path / "bm25" / "run.trec", read_qrels(beir))
    for name in METRICS:
        assert result[name] == pytest.approx(math.fsum(expected[name].values()) / QUERIES, abs=1e-9)
    rows = [line.split() for line in (tmp_path / "bm25" / "run.trec").read_text().splitlines()]
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), key=list(read_qrels(beir)).index)
    for query in read_qrels(beir):
        ranked = [(float(row[4]), row[2]) for row in rows if row[0] == query]
        assert ranked == sorted(ranked, reverse=True)
    status, printed, error = score(f"candidates={tmp_path}/bm25/run.trec")
    assert (status, error) == (0, "")
    again = [line.split()[:3:2] for line in (tmp_path / "scores" / "run.trec").read_text().splitlines()]
    assert sorted(again) == sorted(row[:3:2] for row in rows)


# Benchmarks


def test_a_benchmark_is_printed_beside_published_figures(
    score: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    for seed, name in enumerate(("scifact", "arguana")):
        write_beir(tmp_path / "root" / name, seed=seed)
    keys = ["benchmark=beir", "sets=scifact,arguana", f"data.root={tmp_path}/root", "data.query_prefix='[Q] cat '"]
    status, printed, error = score(*keys)
    assert (status, error) == (0, "")
    results = json.loads(printed.splitlines()[-1])
    assert retrieval_of("minilm", *results["scifact"]["data"]).query_prefix == "[Q] cat "
    assert "data.ignore_identical_ids=true" in results["arguana"]["data"]
    assert "data.ignore_identical_ids=true" not in results["scifact"]["data"]
    published = {"scifact": (69.3, 74.77, 67.8, 76.34), "arguana": (46.3, 50.09, 36.6, 48.51)}
    published["mean"] = tuple(sum(pair) / 2 for pair in zip(*published.values(), strict=True))
    ours = {name: 100 * result["ndcg@10"] for name, result in results.items()}
    ours["mean"] = sum(ours.values()) / 2
    lines = [line.split() for line in printed.splitlines()]
    for name, figures in published.items():
        cells = [cell for figure in figures for cell in (f"{figure:.2f}", f"({ours[name] - figure:+.2f})")]
        assert [name, f"{ours[name]:.2f}", *cells] in lines, printed
    assert "means are over these 2 of 13 sets" in printed


def test_published_means_stand_beside_the_whole_benchmark_alone(
    score: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = evaluate.benchmarks()
    known["nanobeir"]["sets"] = ["NanoSciFact", "NanoNQ"]
    monkeypatch.setattr(evaluate, "benchmarks", lambda: known)
    for seed, name in enumerate(known["nanobeir"]["sets"]):
        write_beir(tmp_path / "root" / name, seed=seed, split="train")
    keys = ["benchmark=nanobeir", f"data.root={tmp_path}/root"]
    status, printed, error = score(*keys)
    assert (status, error) == (0, "")
    mean = 50 * sum(result["ndcg@10"] for result in json.loads(printed.splitlines()[-1]).values())
    [line] = [line for line in printed.splitlines() if line.startswith("mean") and "(" in line]
    assert line.split()[1:] == [
        f"{mean:.2f}",
        *(cell for figure in (65.37, 64.05, 62.75) for cell in (f"{figure:.2f}", f"({mean - figure:+.2f})")),
    ]
    status, printed, error = score(*keys, "sets=NanoNQ", f"output_dir={tmp_path}/one")
    assert status == 0, error
    assert "(" not in next(line for line in printed.splitlines() if line.startswith("mean"))


def test_the_published_figures_are_of_all_sets_of_their_benchmark() -> None:
    known = evaluate.benchmarks()
    assert {name: len(benchmark["sets"]) for name, benchmark in known.items()} == {"beir": 13, "nanobeir": 13}
    for figures in known["beir"]["published"].values():
        assert set(figures) == set(known["beir"]["sets"])
    assert set(known["beir"]["ignore_identical_ids"]) <= set(known["beir"]["sets"])


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmark=bier"], "benchmark=bier is none; the nearest is beir, of beir, nanobeir"),
        (["benchmark=beir", "sets=scifakt"], "sets=scifakt is none; the nearest is scifact, of nfcorpus, scifact, "),
        (["benchmark=beir", "data=scifact"], "data=scifact: give benchmark= or data= and this once"),
        (["benchmark=beir", "data.split=dev"], "data.split=dev: benchmark=beir says what its sets are: give "),
        (["sets=scifact"], "sets=scifact are those of a benchmark: give benchmark= as well"),
        (["output_dir="], "output_dir= is missing"),
        (["model="], "model= is missing"),
        (["batch_size=0"], "batch_size=0 must be 1 or more"),
        (["block=0"], "block=0 must be 1 or more"),
        (["batch_size=many"], "batch_size=many must be of type integer"),
        (["precision=float64"], "precision=float64 "),
        (["device=tpu"], "device=tpu must be cpu or cuda"),
        (["device=cpu", "precision=fp16"], "precision=fp16 needs a GPU: use float32 or bf16"),
        (["optimizer.learning_rate=1"], "optimizer.learning_rate=1 has no effect on a score: give keys of "),
        (["dat.path=x"], "dat is no key; the nearest is data"),
        (["model=nowhere/at/all"], "backbone.name=nowhere/at/all is neither a folder"),
        (["data=scifact,nfcorpus", "candidates=a.trec"], "candidates=a.trec is a run for one set, and 2 are scored"),
        (["candidates=none.trec"], "candidates=none.trec: there is no "),
        (["data.split=none"], "data.evaluation_split=none: "),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line(
    arguments: list[str], message: str, score: Callable[..., tuple[int, str, str]]
) -> None:
    assert error_of(score(*arguments)).startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(score: Callable[..., tuple[int, str, str]]) -> None:
    assert error_of(score("device=cuda")) == (
        "device=cuda: this machine has no GPU that torch can use: leave it out, or give device=cpu"
    )


def test_a_model_without_weights_is_said(
    score: Callable[..., tuple[int, str, str]], model: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    for path in model.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            (bare / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
            (bare / path.relative_to(model)).write_bytes(path.read_bytes())
    assert error_of(score(f"model={bare}")).startswith(f"backbone.name={bare}")


def test_judgements_of_another_corpus_are_counted_and_the_first_named(
    score: Callable[..., tuple[int, str, str]], beir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    write_beir(folder, seed=9)
    (folder / "corpus.jsonl").write_text('{"_id": "x", "text": "a"}\n')
    line = (folder / "qrels" / "test.tsv").read_text().splitlines()[1].split("\t")
    error = error_of(score("data=beir", f"data.path={folder}", "data.split=test"))
    assert error.startswith(
        f"{folder}/qrels/test.tsv:2: corpus-id={line[1]} is not in {folder}/corpus.jsonl, and so in "
    )
    assert "judgements, more than 5%: are these the judgements of this corpus?" in error


def test_a_score_that_is_no_number_names_query_and_document(
    score: Callable[..., tuple[int, str, str]], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    MultiVectorEncoder(str(model), device="cpu").save_pretrained(str(broken), create_model_card=False)
    [head] = broken.glob("*_Dense/model.safetensors")
    save_file({name: torch.full_like(each, math.nan) for name, each in load_file(head).items()}, head)
    capsys.readouterr()
    error = error_of(score(f"model={broken}"))
    assert error.startswith("the score of query q0 and document d")
    assert " is not a number: " in error


def test_a_result_stays_unless_it_may_be_overwritten(
    score: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = tmp_path / "scores"
    assert score()[0] == 0
    before = (folder / "result.json").read_text()
    assert error_of(score()) == (
        f"output_dir={folder} holds a result (result.json, run.trec, scores.jsonl): name another folder, or set "
        "overwrite=true"
    )
    assert (folder / "result.json").read_text() == before
    assert score("overwrite=true", "precision=bf16")[0] == 0
    assert json.loads((folder / "result.json").read_text())["precision"] == "bf16"
    (folder / "config.yaml").write_text("name: run\n")
    assert error_of(score("overwrite=true")) == f"output_dir={folder} is the folder of a training run: name another one"
    (tmp_path / "file").write_text("")
    assert error_of(score(f"output_dir={tmp_path}/file")) == f"output_dir={tmp_path}/file is a file: name a folder"


def test_a_new_head_is_said_and_drawn_from_the_seed(
    score: Callable[..., tuple[int, str, str]], tiny_bert: Path, tmp_path: Path
) -> None:
    found = []
    for number, seed in enumerate((1, 1, 2)):
        keys = ["backbone.query_length=8", "backbone.document_length=16", f"output_dir={tmp_path}/{number}"]
        status, printed, error = score(f"model={tiny_bert}", *keys, f"seed={seed}")
        assert status == 0, error
        assert f"new and untrained, drawn from seed={seed}" in printed
        found.append((tmp_path / str(number) / "run.trec").read_bytes())
    assert found[0] == found[1] != found[2]
