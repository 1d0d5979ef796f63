"""Draw the page of a run or of a sweep from what lies in its folder, at any time and as often as wanted.

    python scripts/report.py run=outputs/<name>
    python scripts/report.py sweep=outputs/sweeps/<name>

run= writes <folder>/report.html: curves, scores before and after, model, data, and what made them; a run that was
stopped has a page of what there is. sweep= compares the groups of jobs that differ in their seed alone, prints the
table, writes it as groups.csv and as report.html. The figures of a page lie beside it in figures/, as PNG for a paper.
The status is 2 where the folder holds no run, or no finished job.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.schema import ConfigError
from trainer.console import make_console
from trainer.run_folder import RESULT
from trainer.sweep import GROUPS


def main(arguments: Sequence[str]) -> int:
    """Write the page, and say where it lies."""
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0
    try:
        kind, folder = parse(arguments)
        page = draw_run(folder) if kind == "run" else draw_sweep(folder)
    except ConfigError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"report: {page}")
    return 0


def parse(arguments: Sequence[str]) -> tuple[str, Path]:
    """What is drawn, run or sweep, and its folder. Raises ConfigError for anything else."""
    for argument in arguments:
        if argument.partition("=")[0] not in ("run", "sweep"):
            raise ConfigError(f"{argument} is not known: give run=<folder> or sweep=<folder>")
    if len(arguments) != 1:
        given = " ".join(arguments) or "nothing"
        raise ConfigError(f"{given} is given: give one run=<folder> or one sweep=<folder>")
    kind, _, name = arguments[0].partition("=")
    folder = Path(name)
    if not name or not folder.is_dir():
        raise ConfigError(f"{kind}={name} is no folder: give the output folder of a {kind}")
    return kind, folder


def draw_run(folder: Path) -> Path:
    """The page of a run. Raises ConfigError where the folder holds none."""
    from trainer.report import report_run

    return report_run(folder)


def draw_sweep(folder: Path) -> Path:
    """The table and the page of a sweep. Raises ConfigError where none of its jobs is finished."""
    if not list(folder.glob(f"*/{RESULT}")):
        raise ConfigError(f"sweep={folder} has no finished job: give the folder of a sweep, or run it to its end")
    from trainer.comparison import compare_groups, print_groups, write_groups
    from trainer.report import report_sweep

    groups, reasons = compare_groups(folder)
    console = make_console()
    print_groups(groups, console)
    for name, reason in reasons.items():
        console.print(f"left out: {name}: {reason}")
    write_groups(groups, folder / GROUPS)
    return report_sweep(folder, groups)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
