"""Damage copies of the real data sets in every way that files break, load each, and say what comes of it.

    python -m scripts.damage_data [seconds=120]
                                  [sets=scifact,nfcorpus,squad_sentences,medquad,lfrqa,trec_dl_distillation]

Each copy has one kind of damage and is loaded in a process beside this one. What may come of it:

    error       one line that names the file, and the line where the damage is in one
    repaired    what is left is trained on, and a warning says what was left out
    no effect   what is trained on and scored on is as without the damage

and what may not, each of which makes the status 1:

    SILENT      other data, or damaged data, and no word of it
    VAGUE       an error that does not name the file and line, or has several lines
    TRACEBACK   another exception, or a process that died
    HANG        nothing after so many seconds

Of a repaired set, every query and document with its score must be one of the set without damage. LATEFORGE_DATA names
the folder of the sets, which stays as it is. scripts/results/damage.json receives all. The status is 2 for a mistake in
the arguments.
"""

import gzip
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from configs.schema import ConfigError, assignment
from scripts.machine import commit

# What a process imports to load data is imported there, and only there: `datasets` reads the folder of its cache then.

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "damage.json"
ERROR, REPAIRED, NO_EFFECT = "error", "repaired", "no effect"
SILENT, VAGUE, TRACEBACK, HANG = "SILENT", "VAGUE", "TRACEBACK", "HANG"
FAILURES = (SILENT, VAGUE, TRACEBACK, HANG)
Row = dict[str, Any]
Change = Callable[[bytes], tuple[bytes | None, list[int]]]


@dataclass(frozen=True)
class Loaded:
    """What was read: compared by what is trained and scored on."""

    trained: frozenset[tuple[int, int, bool, float | None]]
    """Identity of the query and of a document, whether it answers the query, and a teacher's score."""
    examples: int
    scored: frozenset[tuple[str, str, int]]
    """Texts of a query and a document to evaluate on, and the grade."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """Why nothing was read. kind: ERROR for one of ours, else one of the others."""

    kind: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A kind of damage. file: the one that is damaged; new: its bytes from the old ones, None where it is removed, and
    the lines, from 1, that an error may name; none where the damage is in no line."""

    kind: str
    file: str
    new: Change


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one damage. words: of the error, or of the warnings."""

    set: str
    kind: str
    file: str
    outcome: str
    words: str

    @property
    def failed(self) -> bool:
        return self.outcome in FAILURES


def main(arguments: Sequence[str]) -> int:
    """Print a line for each damage and the table, and write all."""
    try:
        names, seconds = parse(arguments)
        root = Path(os.environ.get("LATEFORGE_DATA", "data")).resolve()
        for name in names:
            if not (root / name).is_dir():
                raise ValueError(f"{root} has no {name}: set LATEFORGE_DATA to the folder of the data sets")
    except ValueError as error:
        print(f"damage_data: {error}", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch, Worker(load, Path(scratch, "cache"), seconds) as worker:
        for name in names:
            for outcome in try_set(name, root / name, Path(scratch, "root"), worker):
                outcomes.append(outcome)
                print(f"{name:22}{outcome.kind:52}{outcome.outcome:10}  {outcome.words:.200}", flush=True)
    print("\n".join(table(outcomes)))
    write(record(names, outcomes))
    return int(any(outcome.failed for outcome in outcomes))


def parse(arguments: Sequence[str]) -> tuple[list[str], float]:
    """The sets, and the seconds that a load may take. Raises ValueError for an argument that there is not."""
    names, seconds = list(DAMAGES), 120.0
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "sets":
            names = value.split(",")
            if unknown := [name for name in names if name not in DAMAGES]:
                raise ValueError(f"sets={value}: there is no {unknown[0]}; the sets are {', '.join(DAMAGES)}")
        elif key == "seconds" and value.isdecimal() and int(value):
            seconds = float(value)
        else:
            raise ValueError(f"{argument}: the arguments are sets=, names with commas between, and seconds=")
    return names, seconds


def try_set(name: str, source: Path, root: Path, worker: "Worker") -> Iterator[Outcome]:
    """Yield what comes of each damage of a set. root: the folder that copies are made in."""
    copy_to(root / name, source)
    clean = worker.ask((name, root))
    if isinstance(clean, Failure):
        raise RuntimeError(f"{source} cannot be loaded as it is: {clean.words}")
    for damage in DAMAGES[name]:
        path = copy_to(root / name, source) / damage.file
        content, lines = damage.new(path.read_bytes())
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        outcome, words = judge(clean, worker.ask((name, root)), path, lines, removed=content is None)
        words = words.replace(f"{root}{os.sep}", "")
        yield Outcome(set=name, kind=damage.kind, file=damage.file, outcome=outcome, words=words)


def copy_to(folder: Path, source: Path) -> Path:
    """The files of a set anew, as links: those that are not damaged are read where they are."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        link = folder / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    return folder


def judge(clean: Loaded, found: Loaded | Failure, path: Path, lines: list[int], *, removed: bool) -> tuple[str, str]:
    """What came of a damage, and in which words.

    path, lines: what an error must name; of a file that was removed, its folder.
    """
    if isinstance(found, Failure):
        if found.kind != ERROR:
            return found.kind, found.words
        places = [f"{path}:{line}" for line in lines] or [str(path.parent if removed else path)]
        has_place = any(place in found.words for place in places)
        return ERROR if has_place and "\n" not in found.words else VAGUE, found.words
    words = "; ".join(found.warnings)
    if strange := found.trained - clean.trained:
        return SILENT, f"{len(strange):,} damaged pairs are trained on; {words}"
    same = (found.trained, found.examples, found.scored) == (clean.trained, clean.examples, clean.scored)
    if set(found.warnings) - set(clean.warnings):
        return REPAIRED, words
    lost = f"{len(clean.trained - found.trained):,} pairs to train on are lost"
    lost += f", {found.examples - clean.examples:+,} examples"
    changed = f", {len(found.scored ^ clean.scored):,} judgements to score on differ"
    return (NO_EFFECT, "") if same else (SILENT, lost + changed)


def load(asked: tuple[str, Path]) -> Loaded:
    """Read a set, by its name and the folder it lies in, as a run does. Raises ConfigError as a run does."""
    import datasets

    from trainer.data import load_data
    from trainer.plan import check_teacher

    datasets.disable_progress_bars()
    config = compose(*asked)
    data = load_data(config.data)
    check_teacher(config, data, query_length=None)
    [examples] = data.sets
    queries, documents = examples.queries["identity"][:], examples.documents["identity"][:]
    trained = set()
    for example in examples.examples.select_columns(["query", "documents", "positives", "scores"]):
        scores = example["scores"] or [None] * len(example["documents"])
        for number, (row, score) in enumerate(zip(example["documents"], scores, strict=True)):
            trained.add((queries[example["query"]], documents[row], number < example["positives"], score))
    scored = set()
    for evaluation in data.evaluation.values():
        for query, grades in evaluation.judgements.items():
            for document, grade in grades.items():
                scored.add((evaluation.queries[query], evaluation.corpus[document], grade))
    return Loaded(frozenset(trained), len(examples), frozenset(scored), examples.warnings)


@cache
def compose(name: str, root: Path) -> Any:
    """The config of a run on this set."""
    from scripts.models import compose_config

    return compose_config("minilm", f"data={name}", assignment("data.root", str(root)), *LOSSES.get(name, ()))


class Worker:
    """A process that answers one question after the other with `function`, and is replaced where it hangs or dies."""

    def __init__(self, function: Callable[[Any], Any], cache: Path, seconds: float) -> None:
        self.function, self.cache, self.seconds = function, cache, seconds
        self._context = get_context("spawn")
        self._start()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        self._process.join(timeout=5)
        self._end()

    def ask(self, question: Any) -> Any:
        """The answer, or a Failure."""
        self._connection.send(question)
        if not self._connection.poll(self.seconds):
            self._end()
            self._start()
            return Failure(HANG, f"no answer in {self.seconds:g} s")
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            status = self._process.exitcode
            self._start()
            return Failure(TRACEBACK, f"the process ended with status {status}")

    def _start(self) -> None:
        self._connection, far = self._context.Pipe()
        self._process = self._context.Process(target=answer, args=(far, self.function, self.cache), daemon=True)
        self._process.start()
        far.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def answer(connection: Any, function: Callable[[Any], Any], cache: Path) -> None:
    """What the worker does until it is killed, or nobody asks any more."""
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    os.environ["HF_HUB_OFFLINE"] = "1"
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        try:
            given = function(question)
        except ConfigError as error:
            given = Failure(ERROR, str(error))
        except Exception as error:  # any other is what this looks for
            given = Failure(TRACEBACK, f"{type(error).__name__}: {error}")
        connection.send(given)


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the lines of a table, a kind a row and a set a column, and the counts."""
    sets = list(dict.fromkeys(outcome.set for outcome in outcomes))
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    found = {(outcome.set, outcome.kind): outcome.outcome for outcome in outcomes}
    yield f"| damage | {' | '.join(sets)} |"
    yield "|---" * (len(sets) + 1) + "|"
    for kind in kinds:
        yield f"| {kind} | {' | '.join(found.get((name, kind), '-') for name in sets)} |"
    counts = Counter(outcome.outcome for outcome in outcomes)
    yield f"{len(outcomes)} damaged sets: " + ", ".join(f"{count} {name}" for name, count in counts.most_common())


def record(names: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All that came of it, and with which versions."""
    return {
        "command": f"python -m scripts.damage_data sets={','.join(names)}",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "environment": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("datasets", "pyarrow", "numpy")},
        },
        "counts": dict(Counter(outcome.outcome for outcome in outcomes)),
        "damages": [asdict(outcome) for outcome in outcomes],
    }


def write(content: dict[str, Any]) -> None:
    """Replace the file as a whole."""
    RESULTS.parent.mkdir(exist_ok=True)
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(RESULTS)


# Below: the kinds of damage. One in a single row is in one that is trained on.


def pack(lines: Sequence[bytes]) -> bytes:
    """A gzipped file of these lines; the same lines give the same bytes."""
    return gzip.compress(b"\n".join(lines) + b"\n", mtime=0)


def unpack(content: bytes) -> list[bytes]:
    """The lines of a file, gzipped or not."""
    return (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).splitlines()


def repack(content: bytes, lines: Sequence[bytes]) -> bytes:
    """A file of these lines, gzipped if the content was."""
    return pack(lines) if content.startswith(b"\x1f\x8b") else b"\n".join(lines) + b"\n"


def in_line(kind: str, file: str, change: Callable[[bytes], bytes], *, mark: bytes = b"") -> Damage:
    """Damage of one line: from the middle on the first with the mark, and so before it where there is none."""

    def new(content: bytes) -> tuple[bytes, list[int]]:
        lines = unpack(content)
        middle = len(lines) // 2
        chosen = next(number for number in (*range(middle, len(lines)), *range(middle)) if mark in lines[number])
        lines[chosen] = change(lines[chosen])
        return repack(content, lines), [chosen + 1]

    return Damage(kind=kind, file=file, new=new)


def in_row(kind: str, file: str, change: Callable[[Row], object], *, mark: bytes = b"") -> Damage:
    """Damage of one row of JSON lines."""

    def changed(line: bytes) -> bytes:
        row = json.loads(line)
        change(row)
        return json.dumps(row).encode()

    return in_line(kind, file, changed, mark=mark)


def in_rows(kind: str, file: str, change: Callable[[Row], object], *, every: int = 1) -> Damage:
    """Damage of every n-th row of JSON lines, whose first an error may name, or none."""

    def new(content: bytes) -> tuple[bytes, list[int]]:
        lines = unpack(content)
        for number in range(0, len(lines), every):
            row = json.loads(lines[number])
            change(row)
            lines[number] = json.dumps(row).encode()
        return repack(content, lines), []

    return Damage(kind=kind, file=file, new=new)


def in_lines(
    kind: str, file: str, change: Callable[[list[bytes]], list[bytes]], *, at: Callable[[int], list[int]] | None = None
) -> Damage:
    """Damage of the lines of a file. at: the lines that an error may name, from how many there are after it."""

    def new(content: bytes) -> tuple[bytes, list[int]]:
        lines = change(unpack(content))
        return repack(content, lines), at(len(lines)) if at else []

    return Damage(kind=kind, file=file, new=new)


def in_file(kind: str, file: str, change: Callable[[bytes], bytes | None]) -> Damage:
    """Damage of a file's bytes as they lie on the disk."""
    return Damage(kind=kind, file=file, new=lambda content: (change(content), []))


def put(**values: object) -> Callable[[Row], None]:
    """Put these values into a row."""
    return lambda row: row.update(values)


def rename(column: str) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        row[f"{column}_"] = row.pop(column)

    return change


def drop(column: str) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        del row[column]

    return change


def flip(content: bytes) -> bytes:
    """A byte in the middle of which every bit is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def doubled(lines: list[bytes]) -> list[bytes]:
    """The line in the middle once more, at the end."""
    return [*lines, lines[len(lines) // 2]]


def of_json(file: str, *columns: str, key: str | None = None, mark: bytes = b"", label: str = "") -> list[Damage]:
    """Kinds that any file of JSON lines can have.

    columns: of a text, and of those that stand in for it where it is empty; key: of an id; mark: stands in a line that
    is trained on; label: goes before the names.
    """
    column, empty = columns[0], dict.fromkeys(columns, "")

    def row(kind: str, change: Callable[[Row], object]) -> Damage:
        return in_row(label + kind, file, change, mark=mark)

    def line(kind: str, change: Callable[[bytes], bytes]) -> Damage:
        return in_line(label + kind, file, change, mark=mark)

    damages = [
        line("no JSON in a line", lambda line: b"{" + line),
        line("a line cut in the middle", lambda line: line[: len(line) // 2]),
        line("two objects in a line", lambda line: line + line),
        line("nested 100,000 deep", lambda line: b"[" * 100_000),
        line("a byte that is not UTF-8", lambda line: line[:-5] + b"\xff" + line[-5:]),
        line("an array for an object", lambda line: b"[" + line + b"]"),
        row("an empty text", put(**empty)),
        row("a text of spaces", put(**dict.fromkeys(columns, " \t "))),
        row("null for a text", put(**dict.fromkeys(columns))),
        row("a number for a text", put(**{column: 7})),
        row("a list for a text", put(**{column: ["a", 7]})),
        row("an object for a text", put(**{column: {"text": "a"}})),
        row("a column missing in a row", drop(column)),
        row("a column renamed in a row", rename(column)),
        in_rows(f"{label}a column renamed in all", file, rename(column)),
        in_rows(f"{label}20 % empty texts", file, put(**empty), every=5),
        in_lines(f"{label}blank lines alone", file, lambda lines: [b"", b"  ", b""]),
        in_file(f"{label}UTF-16", file, in_utf_16),
        in_file(f"{label}a gzip cut", file, cut_short),
        in_file(f"{label}a gzip with a byte flipped", file, flip),
        in_file(f"{label}no gzip behind .gz", file, gzip.decompress),
        in_file(f"{label}an empty file", file, lambda content: b""),
        in_file(f"{label}a file missing", file, lambda content: None),
    ]
    if key is not None:
        damages += [
            in_lines(f"{label}an id twice", file, doubled, at=lambda count: [count]),
            row("null for an id", put(**{key: None})),
            row("an id missing", drop(key)),
            # An error names the line that asks for the id, and this file.
            replace(named := row("another id than is named", put(**{key: "nobody"})), new=without_lines(named.new)),
        ]
    return damages


def without_lines(new: Change) -> Change:
    """The same damage, of which an error need not name the line."""
    return lambda content: (new(content)[0], [])


def in_utf_16(content: bytes) -> bytes:
    """The same file, gzipped if it was."""
    encoded = b"\n".join(unpack(content)).decode().encode("utf-16")
    return gzip.compress(encoded, mtime=0) if content.startswith(b"\x1f\x8b") else encoded


def cut_short(content: bytes) -> bytes:
    return content[: len(content) * 6 // 10]


def of_pairs() -> list[Damage]:
    """Kinds of damage of a set of pairs."""
    file = "train.jsonl.gz"
    return [
        *of_json(file, "query"),
        in_row("an empty positive", file, put(positive="")),
        in_row("a positive of spaces", file, put(positive="\n")),
        in_row("null for a positive", file, put(positive=None)),
        in_row("a number for a positive", file, put(positive=7.5)),
        in_row("a list with a number for a positive", file, put(positive=["a", 7])),
        in_row("a list with an empty text for a positive", file, put(positive=["a text", ""])),
        in_row("an empty list for a positive", file, put(positive=[])),
        in_rows("the positive renamed in all", file, rename("positive")),
    ]


def of_beir(evaluation: str, *, query: bytes, document: bytes, scored: bytes) -> list[Damage]:
    """Kinds of damage of a BEIR folder.

    evaluation: the split to evaluate on; query, document, scored: ids of texts that are trained on, and of a query that
    is scored on.
    """
    train, test = "qrels/train.tsv", f"qrels/{evaluation}.tsv"

    def cell(number: int, value: bytes) -> Callable[[bytes], bytes]:
        def change(line: bytes) -> bytes:
            cells = line.split(b"\t")
            cells[number] = value
            return b"\t".join(cells)

        return change

    def unknown(every: int) -> Callable[[list[bytes]], list[bytes]]:
        """In every n-th judgement a document that is not in the corpus."""
        return lambda lines: [
            cell(1, b"nobody")(line) if number and number % every == 0 else line for number, line in enumerate(lines)
        ]

    def contradicted(lines: list[bytes]) -> list[bytes]:
        """The line in the middle again, with grade 0."""
        return [*lines, cell(2, b"0")(lines[len(lines) // 2])]

    return [
        *of_json("corpus.jsonl.gz", "text", "title", key="_id", mark=b'"_id": "%s"' % document),
        *of_json("queries.jsonl.gz", "text", key="_id", mark=b'"_id": "%s"' % query, label="queries: "),
        in_row("queries to score on: an empty text", "queries.jsonl.gz", put(text=""), mark=b'"_id": "%s"' % scored),
        *(
            damage
            for label, file in (("qrels: ", train), ("qrels to score on: ", test))
            for damage in (
                in_lines(f"{label}no header", file, lambda lines: lines[1:], at=lambda count: [1, 2]),
                in_line(f"{label}a word for a grade", file, cell(2, b"good")),
                in_line(f"{label}half a grade", file, cell(2, b"0.5")),
                in_line(f"{label}no grade", file, cell(2, b"")),
                in_line(f"{label}a row of two cells", file, lambda line: line.rpartition(b"\t")[0]),
                in_line(f"{label}a row of four cells", file, lambda line: line + b"\t1"),
                in_line(f"{label}spaces for tabs", file, lambda line: line.replace(b"\t", b" ")),
                in_line(f"{label}a byte that is not UTF-8", file, lambda line: b"\xff" + line),
                in_lines(f"{label}all ids unknown", file, unknown(1)),
                in_lines(f"{label}1 % unknown ids", file, unknown(100)),
                in_lines(f"{label}a judgement twice, another grade", file, contradicted, at=lambda count: [count]),
                in_lines(f"{label}a header alone", file, lambda lines: lines[:1]),
                in_lines(f"{label}all grades 0", file, lambda lines: [lines[0], *map(cell(2, b"0"), lines[1:])]),
                in_lines(f"{label}Windows' line ends", file, lambda lines: [line + b"\r" for line in lines]),
                in_file(f"{label}UTF-16", file, in_utf_16),
                in_file(f"{label}an empty file", file, lambda content: b""),
                in_file(f"{label}a file missing", file, lambda content: None),
            )
        ),
    ]


def of_distillation() -> list[Damage]:
    """Kinds of damage of a teacher's scores by ids."""
    file = "train.jsonl.gz"

    def first(column: str, value: Callable[[Row], object]) -> Callable[[Row], None]:
        """Put a value in the first place of a list."""

        def change(row: Row) -> None:
            row[column][0] = value(row)

        return change

    def cut(*columns: str) -> Callable[[Row], None]:
        """Leave the first of these lists' values alone."""
        return lambda row: row.update({column: row[column][:1] for column in columns})

    return [
        *of_json("documents.jsonl.gz", "text", key="document_id", mark=b"msmarco_passage_45_632929045"),
        *of_json("queries.jsonl.gz", "text", key="query_id", mark=b'"2082"', label="queries: "),
        in_line("rows: no JSON in a line", file, lambda line: b"{" + line),
        in_line("rows: a line cut in the middle", file, lambda line: line[: len(line) // 2]),
        in_line("rows: an array for an object", file, lambda line: b"[" + line + b"]"),
        in_row("rows: scores fewer than documents", file, lambda row: row["scores"].pop()),
        in_row("rows: documents fewer than scores", file, lambda row: row["document_ids"].pop()),
        in_row("rows: a score that is NaN", file, first("scores", lambda row: float("nan"))),
        in_row("rows: a score that is infinite", file, first("scores", lambda row: float("inf"))),
        in_row("rows: a score that is null", file, first("scores", lambda row: None)),
        in_row("rows: a score that is a text", file, first("scores", lambda row: "9.5")),
        in_row("rows: a score of 400 digits", file, first("scores", lambda row: 10**400)),
        in_row("rows: a text for a list of scores", file, put(scores="high")),
        in_row("rows: a text for a list of ids", file, lambda row: row.update(document_ids=row["document_ids"][0])),
        in_row("rows: a number for a list of scores", file, put(scores=7)),
        in_row("rows: null for a list of scores", file, put(scores=None)),
        in_row("rows: an id without a document", file, first("document_ids", lambda row: "nobody")),
        in_row("rows: an id without a query", file, put(query_id="nobody")),
        in_row("rows: null for an id", file, first("document_ids", lambda row: None)),
        in_row("rows: a list for an id", file, first("document_ids", lambda row: ["a"])),
        in_row("rows: a document twice", file, first("document_ids", lambda row: row["document_ids"][1])),
        in_row("rows: one document alone", file, cut("document_ids", "scores")),
        in_row("rows: no document", file, put(document_ids=[], scores=[])),
        in_row("rows: a column missing in a row", file, drop("scores")),
        in_rows("rows: a column renamed in all", file, rename("document_ids")),
        in_rows("rows: all scores equal", file, lambda row: row.update(scores=[1.0] * len(row["scores"]))),
        in_file("rows: a gzip cut", file, cut_short),
        in_file("rows: a gzip with a byte flipped", file, flip),
        in_file("rows: no gzip behind .gz", file, gzip.decompress),
        in_file("rows: an empty file", file, lambda content: b""),
        in_file("rows: a file missing", file, lambda content: None),
    ]


DAMAGES = {
    "scifact": of_beir("test", query=b"0", document=b"31715818", scored=b"1"),
    "nfcorpus": of_beir("dev", query=b"PLAIN-3", document=b"MED-2436", scored=b"PLAIN-1"),
    "squad_sentences": of_pairs(),
    "medquad": of_pairs(),
    "lfrqa": of_pairs(),
    "trec_dl_distillation": of_distillation(),
}
# What the teacher's scores are checked for; they are 100,000 apart.
LOSSES = {"trec_dl_distillation": ("loss=distillation", "loss.distillation.teacher_temperature=1e5")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
