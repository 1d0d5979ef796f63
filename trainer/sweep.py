"""The jobs of a sweep, each a process and a run folder of its own, known by the hash of its config.

Neither Hydra nor torch is known here: whatever starts jobs calls `run_job` for each, in this process or another, on
this machine or another that sees the folder, and `summarise` at the end.
"""

import csv
import fcntl
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from filelock import FileLock, Timeout
from rich.console import Console

from configs.schema import Config, ConfigError, TrackerName, as_dict, assignment
from trainer.run_folder import CONFIG, LOCK, RESULT

if TYPE_CHECKING:
    from trainer.comparison import Group

# A file for each job of the last command: what became of it; all of these as a table; and that of the groups.
JOBS, TABLE, GROUPS = "jobs", "sweep.csv", "groups.csv"
# Where a job lies, how it starts and who watches it make no other job of it.
NOT_HASHED = ("output_dir", "overwrite", "report", "tracker", "sweep")

# By a signal, as train.py says it or as it died of it before it listened.
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}


@dataclass
class Job:
    """What became of a job."""

    number: int
    job: str
    """Name of its folder."""
    overrides: list[str]
    state: str = "failed"
    """finished, finished before, stopped or failed."""
    score: float | None = None
    """Of the last model, by evaluation.metric; None where the run failed or evaluates nothing."""
    seconds: float | None = None
    """Of the whole run, its earlier parts included; of the last part where it did not finish."""
    error: str | None = None


def run_job(train: Path, config: Config, overrides: list[str], *, number: int, sweep: Path) -> float:
    """Run one job to its end, or go on with it, or find it finished; return its score, NaN where it has none.

    train: the file train.py; overrides: what was typed for the job. A second process that comes to the same job waits
    for the first, also where that was started by a sweep that was killed.
    """
    job = Job(number, job_name(config), overrides)
    folder = sweep / job.job
    interrupted = False
    with _job_lock(sweep, job) as lock:
        if (folder / RESULT).exists():
            job.state = "finished before"
        else:
            arguments = (
                [f"resume={folder}"]
                if (folder / CONFIG).exists()
                else [*overrides, assignment("output_dir", str(folder))]
            )
            if config.tracker.name is not TrackerName.none and config.tracker.group is None:
                arguments.append(f"tracker.group={sweep.name}")
            log = sweep / f"{job.job}.log"
            print(f"job {number}  {job.job}  log: {log}", flush=True)
            started = time.perf_counter()
            status, printed, interrupted = _run(config.sweep.launch, [str(train), *arguments], log, lock)
            job.seconds = time.perf_counter() - started
            if (folder / RESULT).exists():
                job.state = "finished"
            elif interrupted or status in STOPPED:
                job.state = "stopped"
            else:
                job.error = _error(status, printed)
        if job.state.startswith("finished"):
            result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            job.seconds = result["seconds"]
            job.score = (result["after"] or {}).get(config.evaluation.metric.name)
        report(sweep, job)
    if interrupted:
        raise KeyboardInterrupt
    return math.nan if job.score is None else job.score


def job_name(config: Config) -> str:
    """Name of the run, and a hash of all that it computes."""
    values = {key: value for key, value in as_dict(config).items() if key not in NOT_HASHED}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.name.replace('/', '-')}-{digest}"


def report(sweep: Path, job: Job) -> None:
    """Write what became of a job, and say it."""
    path = sweep / JOBS / f"{job.number:05d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(asdict(job)) + "\n", encoding="utf-8")
    unfinished.replace(path)
    score = "" if job.score is None else f"  {job.score:.4f}"
    print(f"job {job.number}  {job.state}{score}" + (f"  {job.error}" if job.error else ""), flush=True)


@contextmanager
def claim(sweep: Path) -> Iterator[None]:
    """Hold a sweep, one command at a time, and forget what became of the jobs of an earlier command.

    A folder that holds nothing afterwards goes again. Raises ConfigError where another command holds it.
    """
    missing = [path for path in (sweep, *sweep.parents) if not path.exists()]
    sweep.mkdir(parents=True, exist_ok=True)
    lock = FileLock(sweep / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(f"hydra.sweep.dir={sweep}: another command runs this sweep: wait for its end") from error
    try:
        for path in (sweep / JOBS).glob("*.json"):
            path.unlink()
        yield
    finally:
        if {path.name for path in sweep.iterdir()} == {LOCK}:
            (sweep / LOCK).unlink()
        lock.release()
        for path in missing:
            with suppress(OSError):  # where it holds something
                path.rmdir()


def read_jobs(sweep: Path) -> list[Job]:
    """What became of the jobs of the last command, in their order."""
    return [Job(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted((sweep / JOBS).glob("*.json"))]


def common_overrides(jobs: Sequence[Job]) -> set[str]:
    """What was typed for all of several jobs, and so tells none from another."""
    return set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()


def typed_overrides(log: Path) -> list[str] | None:
    """What was typed for the job that a log is of, as `run_job` wrote it there; None where that is not known."""
    if not log.is_file():
        return None
    with log.open(encoding="utf-8", errors="replace") as file:
        line = file.readline()
    words = shlex.split(line) if line.startswith("$ ") else []
    begin = next((number for number, word in enumerate(words, start=1) if Path(word).name == "train.py"), None)
    if begin is None or words[begin].startswith("resume="):
        return None
    return [word for word in words[begin:] if not word.startswith(("output_dir=", "tracker.group="))]


def summarise(sweep: Path, console: Console) -> tuple[list[Job], list["Group"]]:
    """Print what the sweep amounts to, write it as CSV beside what became of every job, and return what became of them,
    in their order, and the groups that are compared."""
    # It takes a second to import, and every process that a launcher starts for a job imports this file.
    from trainer.comparison import compare_groups, print_groups, write_groups

    jobs = read_jobs(sweep)
    if not jobs:
        return [], []
    groups, reasons = compare_groups(sweep)
    console.print()
    print_groups(groups, console)
    common = common_overrides(jobs)
    own = {job.job: " ".join(each for each in job.overrides if each not in common) for job in jobs}
    for name, reason in reasons.items():
        console.print(f"left out: {' '.join(filter(None, [name, own.get(name)]))}: {reason}")
    with (sweep / TABLE).open("w", encoding="utf-8", newline="") as file:
        _write_csv(file, jobs)
    write_groups(groups, sweep / GROUPS)
    console.print(f"\ntables: {sweep / GROUPS} and, of the jobs, {sweep / TABLE}")
    return jobs, groups


def _write_csv(file: TextIO, jobs: list[Job]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("job", "overrides", "score", "seconds", "state", "error"))
    for job in jobs:
        writer.writerow((job.job, shlex.join(job.overrides), job.score, job.seconds, job.state, job.error))


@contextmanager
def _job_lock(sweep: Path, job: Job) -> Iterator[TextIO]:
    """Hold a job; the process that runs it inherits the lock, which so outlives this one and dies with both."""
    path = sweep / JOBS / f"{job.job}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"job {job.number}  {job.job} is still run by another process: waiting for it"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        if (run_lock := sweep / job.job / LOCK).exists():
            # A launcher that has died may have left its run behind.
            try:
                FileLock(run_lock, timeout=1).acquire().lock.release()
            except Timeout:
                print(waiting, flush=True)
                FileLock(run_lock).acquire().lock.release()
        yield file


def _run(launch: str | None, arguments: list[str], log: Path, lock: TextIO) -> tuple[int, str, bool]:
    """Run a command; return its status, what it printed into the log, and whether this process was interrupted."""
    # `accelerate` lies beside this Python, also where no one has activated its environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    interrupted = False
    with log.open("a+", encoding="utf-8", errors="replace") as output:
        begin = 0
        try:
            command = [*(shlex.split(launch) if launch else [sys.executable]), *arguments]
            print(f"$ {shlex.join(command)}", file=output, flush=True)
            begin = output.tell()
            process = subprocess.Popen(
                [shutil.which(command[0], path=path) or command[0], *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PATH": path},
                pass_fds=[lock.fileno()],
                start_new_session=True,  # the terminal's Ctrl-C comes from here, and the run saves before it ends
            )
        except (OSError, ValueError) as error:
            return 2, f"error: sweep.launch={launch}: {error}: give a command that starts Python", False
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:
                interrupted = True
                # The whole group: not every launcher passes a signal on.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT)
        output.seek(begin)
        return status, output.read(), interrupted


def _error(status: int, printed: str) -> str:
    """The line that says why a job failed."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if status == 0:
        return "ended without a result"
    return [f"exit status {status}", *lines[-1:], *errors[-1:]][-1]
