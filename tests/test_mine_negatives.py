"""Mined negatives against a triple loop, and as a user trains on them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import MultiVectorEncoder

from scripts import mine_negatives
from scripts.models import compose_config, load_model
from tests.conftest import lines_of, tiny_overrides, type_here
from trainer.data import load_data

pytestmark = pytest.mark.usefixtures("own_caches", "as_loud_as_before")

NOUNS, VERBS = ("cat", "dog", "fish"), ("barks", "meows", "swims")
DOCUMENTS = [
    f"the {noun} is {article} animal that {verb}" for noun in NOUNS for verb in VERBS for article in ("a", "the")
]
# The first query has two positives, the last stands twice.
ROWS = [("what barks", 0), ("what barks", 1), ("which animal swims", 4), ("what is a fish", 13), ("what is a fish", 13)]


@pytest.fixture
def model(tiny_bert: Path, tmp_path: Path) -> list[str]:
    """What names the tiny model, one that is drawn anew for each load but from one seed."""
    settings = [override for override in tiny_overrides(tiny_bert, tmp_path) if override.startswith("backbone.")]
    return [f"model={tiny_bert}", *settings[1:], "head.seed=1"]


@pytest.fixture
def beir(tmp_path: Path) -> list[str]:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    queries = list(dict.fromkeys(query for query, _ in ROWS))
    for name, texts in (("queries", queries), ("corpus", [*DOCUMENTS, ""])):
        rows = [{"_id": str(number), "text": text} for number, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = [f"{queries.index(query)}\t{document}\t1\n" for query, document in ROWS]
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    return ["data=beir", f"data.path={folder}", "data.evaluation_fraction=0"]


def mined(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


def every_score(model: list[str], query: str) -> dict[str, float]:
    """MaxSim in a loop over tokens, in float64."""
    encoder = load_model(model[0].removeprefix("model="), *model[1:])
    [asked] = encoder.encode_query([query])
    scores = {}
    for document, vectors in zip(DOCUMENTS, encoder.encode_document(DOCUMENTS), strict=True):
        scores[document] = sum(
            max(float(token.double() @ other.double()) for other in torch.as_tensor(vectors))
            for token in torch.as_tensor(asked)
        )
    return scores


@pytest.mark.parametrize(("ratio", "skip", "wanted"), [(1.5, 0, 4), (0.999, 0, 16), (1.5, 3, 2)])
def test_rows_are_those_of_a_loop(
    ratio: float, skip: int, wanted: int, model: list[str], beir: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "mined.jsonl.gz"
    settings = [f"max_ratio={ratio}", f"skip={skip}", f"negatives={wanted}", f"output={output}"]
    assert mine_negatives.main([*model, *beir, *settings]) == 0
    expected = []
    for query in dict.fromkeys(query for query, _ in ROWS):
        scores = every_score(model, query)
        positives = {DOCUMENTS[document] for asked, document in ROWS if asked == query}
        others = [text for text in sorted(scores, key=scores.__getitem__, reverse=True) if text not in positives][skip:]
        for positive in positives:
            kept = [text for text in others if scores[text] <= ratio * scores[positive]][:wanted]
            if kept:
                expected.append((query, [positive, *kept], [scores[text] for text in (positive, *kept)]))
    rows = mined(output)
    assert sorted((row["query"], row["documents"]) for row in rows) == sorted(row[:2] for row in expected)
    by_positive = {(row["query"], row["documents"][0]): row["scores"] for row in rows}
    for query, documents, of_them in expected:
        assert by_positive[query, documents[0]] == pytest.approx(of_them, abs=1e-5)


def test_blocks_change_nothing(model: list[str], beir: list[str], tmp_path: Path) -> None:
    for size in (2, 1000):
        output = f"{tmp_path}/{size}.jsonl"
        assert mine_negatives.main([*model, *beir, f"output={output}", f"block={size}", "max_ratio=2"]) == 0
    one, other = (mined(tmp_path / f"{size}.jsonl") for size in (2, 1000))
    assert [(row["query"], row["documents"]) for row in one] == [(row["query"], row["documents"]) for row in other]
    for row, same in zip(one, other, strict=True):  # texts of a block are padded together, which rounds otherwise
        assert row["scores"] == pytest.approx(same["scores"], abs=1e-5)


def test_no_more_documents_are_encoded_than_a_block_holds(
    model: list[str], beir: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = MultiVectorEncoder.encode_document

    def count(encoder: MultiVectorEncoder, texts: list[str], **options: Any) -> Any:
        encoded.append(len(texts))
        return encode(encoder, texts, **options)

    monkeypatch.setattr(MultiVectorEncoder, "encode_document", count)
    assert mine_negatives.main([*model, *beir, f"output={tmp_path}/mined.jsonl", "block=5", "max_ratio=2"]) == 0
    # All are looked at, the positives among them, none of which is encoded a second time.
    assert encoded == [5, 5, 5, 3]


def test_a_positive_that_the_model_ranks_low_sets_the_limit_too(
    model: list[str], beir: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "mined.jsonl"
    settings = ["top=2", "negatives=2", "max_ratio=1.5", f"output={output}"]
    assert mine_negatives.main([*model, *beir, *settings]) == 0
    below = 0
    for row in mined(output):
        scores = every_score(model, row["query"])
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
        positive, *negatives = row["documents"]
        assert row["scores"] == pytest.approx([scores[text] for text in row["documents"]], abs=1e-5)
        assert set(negatives) <= set(best)
        below += positive not in best
    assert below


def test_bm25_gives_the_candidates_and_the_model_their_order(
    model: list[str], beir: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["candidates=bm25", "top=6", "negatives=5", "max_ratio=2", f"output={tmp_path}/mined.jsonl"]
    assert mine_negatives.main([*model, *beir, *settings]) == 0
    rows = [row for row in mined(tmp_path / "mined.jsonl") if row["query"] == "which animal swims"]
    scores = every_score(model, "which animal swims")
    # BM25 knows six documents with the word, of which one is the positive.
    others = [text for text in DOCUMENTS if "swims" in text and text != DOCUMENTS[4]]
    assert [row["documents"][1:] for row in rows] == [sorted(others, key=scores.__getitem__, reverse=True)]
    # All four positives are among the candidates, of three queries.
    assert "known positives  1.33 a query among the top 6, dropped" in capsys.readouterr().out


def test_bm25_gives_a_query_that_shares_no_word_no_document(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    texts = [("which dog", "a dog barks"), ("what meows", "an animal"), ("dog", "the dog swims")]
    pairs.write_text("".join(json.dumps({"query": query, "positive": text}) + "\n" for query, text in texts))
    data = ["data=pairs", f"data.path={pairs}", "data.evaluation_fraction=0"]
    settings = ["candidates=bm25", "max_ratio=2", f"output={tmp_path}/mined.jsonl"]
    assert mine_negatives.main([*model, *data, *settings]) == 0
    assert [(row["query"], row["documents"]) for row in mined(tmp_path / "mined.jsonl")] == [
        ("which dog", ["a dog barks", "the dog swims"]),
        ("dog", ["the dog swims", "a dog barks"]),
    ]
    assert "without one      1 positives, left out, and with them 1 queries" in capsys.readouterr().out
    pairs.write_text('{"query": "what", "positive": "the"}\n')
    assert mine_negatives.main([*model, *data, *settings, "overwrite=true"]) == 2
    assert capsys.readouterr().err == ("mine_negatives: candidates=bm25: no document has a word that BM25 counts\n")


def test_a_set_with_a_teacher_is_mined_too(model: list[str], tmp_path: Path) -> None:
    taught = tmp_path / "taught.jsonl"
    taught.write_text(json.dumps({"query": "what barks", "documents": DOCUMENTS[:6], "scores": [1, 9, 2, 3, 4, 5]}))
    settings = [f"output={tmp_path}/mined.jsonl", "max_ratio=2"]
    data = ["data=scored", f"data.path={taught}", "data.evaluation_fraction=0"]
    assert mine_negatives.main([*model, *data, *settings]) == 0
    [row] = mined(tmp_path / "mined.jsonl")
    scores = every_score(model, "what barks")
    others = sorted(set(DOCUMENTS[:6]) - {DOCUMENTS[1]}, key=scores.__getitem__, reverse=True)
    assert row["documents"] == [DOCUMENTS[1], *others]


def test_a_new_head_is_drawn_from_the_seed_and_said(
    model: list[str], beir: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = [argument for argument in model if argument != "head.seed=1"]
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        output = f"output={tmp_path}/{number}.jsonl"
        assert mine_negatives.main([*drawn, *beir, output, "max_ratio=2", f"seed={seed}"]) == 0
        said = f"head             new and untrained, drawn from seed={seed}: train it before you mine"
        assert said in capsys.readouterr().out
    first, same, other = (mined(tmp_path / f"{number}.jsonl") for number in range(3))
    assert first == same != other


def test_what_is_mined_is_trained_on(model: list[str], beir: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    output = tmp_path / "mined.jsonl"
    assert mine_negatives.main([*model, *beir, f"output={output}", "max_ratio=2", "negatives=3"]) == 0
    data = ["data=scored", f"data.path={output}", "data.positive=first", "data.evaluation_fraction=0"]
    [examples] = load_data(compose_config(str(tiny_bert), *data).data).sets
    read = [examples.example(row) for row in range(len(examples))]
    assert examples.has_teacher
    assert [{key: row[key] for key in ("query", "documents", "scores")} for row in read] == mined(output)
    assert {row["positives"] for row in read} == {1}
    for loss in ("contrastive", "distillation_contrastive"):
        done = type_here(
            *tiny_overrides(tiny_bert, tmp_path),
            *(*data, f"loss={loss}", "trainer.steps=3", "trainer.batch_size=2", "overwrite=true"),
        )
        assert done.returncode == 0, done.stderr
        assert any(line.startswith("documents a query its positive and 3 more") for line in lines_of(done))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output=a.txt"], "output=a.txt must end in .jsonl or .jsonl.gz"),
        (["output=a.jsonl", "candidates=dense"], "candidates=dense must be maxsim or bm25"),
        (["output=a.jsonl", "max_ratio=0"], "max_ratio=0.0 must be above 0"),
        (["output=a #1.txt"], "output=a #1.txt must end in .jsonl or .jsonl.gz"),
        (["output=[.jsonl", "candidates=dense"], "candidates=dense must be maxsim or bm25"),
        (["output=a.jsonl", "max_ratio=nan"], "max_ratio=nan must be above 0"),
        (["output=a.jsonl", "top=10"], "top=10 must be at least skip=0 and negatives=16 together"),
        (["output=a.jsonl", "negatives=0"], "negatives=0 must be 1 or more"),
        (["output=a.jsonl", "batch_size=0"], "batch_size=0 must be 1 or more"),
        (["output=a.jsonl", "block=0"], "block=0 must be 1 or more"),
        (["output=a.jsonl", "skip=-1"], "skip=-1 must be 0 or more"),
        (["output=a.jsonl", "negatives=many"], "negatives=many must be of type integer"),
        (["output=a.jsonl", "dat=scifact"], "dat is no key; the nearest is data"),
        (["output=a.jsonl", "data=pairs", "data.path=null"], "data.path=null: data=pairs needs it"),
        (["output=a.jsonl", "model=1e3"], "backbone.name=1e3 is neither a folder"),
    ],
)
def test_a_mistake_gets_one_line(
    arguments: list[str], message: str, model: list[str], beir: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert mine_negatives.main([*model, *beir, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mine_negatives: {message}")
    assert error.count("\n") == 1


def test_what_is_missing_is_named(model: list[str], beir: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for given, key in ((beir, "model= is missing"), (model, "data= is missing")):
        assert mine_negatives.main([*given, "output=a.jsonl"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"mine_negatives: {key}: give ")
        assert error.count("\n") == 1


def test_a_file_that_exists_stays(
    model: list[str], beir: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mined.jsonl"
    output.write_text("mine\n")
    assert mine_negatives.main([*model, *beir, f"output={output}"]) == 2
    assert capsys.readouterr().err == (
        f"mine_negatives: output={output} exists: name another file, or set overwrite=true\n"
    )
    assert output.read_text() == "mine\n"
    assert mine_negatives.main([*model, *beir, f"output={output}", "max_ratio=0.01", "overwrite=true"]) == 2
    assert "no negative is left of 3 queries" in capsys.readouterr().err
    assert output.read_text() == "mine\n"
    assert list(tmp_path.glob(".*")) == []
