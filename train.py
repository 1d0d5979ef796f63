"""Train a late-interaction retriever from composed YAML: compose -> build -> train -> report.

`python train.py --help` lists what can be configured. Hydra is known here and in scripts/, nowhere below; all that is
slow to import waits until the config has been checked.
"""

import hashlib
import logging
import os
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

# Hydra would print its own lines and exit; with this it raises, and one line of ours answers.
os.environ["HYDRA_FULL_ERROR"] = "1"

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from configs.mix import spell_mix, with_member, with_sets
from configs.reference import explain_composition, help_text
from configs.schema import Config, ConfigError, Mode, TrackerName, assignment, changed_keys, parse_config
from trainer.console import fail

if TYPE_CHECKING:
    from rich.console import Console

    from architectures.layouts import Checkpoint
    from trainer.comparison import Group

TRAIN = Path(__file__).resolve()
CONFIGS = TRAIN.parent / "configs"
ConfigStore.instance().store("schema", Config)
# What a resumed run may have otherwise than before; the last three are no part of what it computes.
MAY_CHANGE = ("trainer.steps", "trainer.epochs", "data.path", "tracker.", "report", "output_dir", "overwrite")


def main(arguments: list[str]) -> int:
    """Run the command line. The status is 0, 1 for a run that failed, 2 for a mistake in what was asked, or 128 plus
    the signal that stopped it."""
    if {"--help", "-h"} & set(arguments):
        print(help_text(CONFIGS))
        return 0
    try:
        if any(argument.startswith(("rerun=", "resume=")) for argument in arguments):
            return run_saved(arguments)
        if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
            return run_sweep(arguments)
        _hydra(arguments)
    except ConfigError as error:
        return fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return fail(explain_composition(error, CONFIGS))
    except ValueError as error:
        # How Hydra answers -m --cfg job, and head=null.
        if str(error).startswith("Only one of"):
            return fail(str(error))
        if not str(error).startswith("Config group override"):
            raise
        return fail(f"{' '.join(arguments)}: a group takes the name of a member; `python train.py --help` lists them")
    except YAMLError as error:
        return fail(f"a config file is no YAML: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _hydra(arguments: list[str]) -> None:
    sys.argv[1:] = own_settings(arguments)
    hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(_task)()


def own_settings(arguments: list[str]) -> list[str]:
    """The arguments, where a backbone that is named without its preset brings its own settings, not the default's, and
    a mix is spelt as Hydra takes it."""
    return with_member(spell_mix(arguments), "backbone.name", "backbone=checkpoint")


def _task(composed: DictConfig) -> float | None:
    settings = HydraConfig.get()
    if settings.mode is RunMode.MULTIRUN:
        return _job(composed, list(settings.overrides.task), settings.job.num, Path(settings.sweep.dir))
    # SystemExit passes through Hydra, which prints a page about any other exception.
    try:
        status = run(parse_config(with_sets(composed)))
    except ConfigError as error:
        status = fail(str(error))
    if status:
        raise SystemExit(status)
    return None


def _job(composed: DictConfig, overrides: list[str], number: int, sweep: Path) -> float:
    """One job of a sweep, wherever the launcher has put it."""
    from trainer.sweep import Job, report, run_job

    try:
        config = parse_config(with_sets(composed))
    except ConfigError as error:
        report(sweep, Job(number, str(composed.name), overrides, error=str(error)))
        return float("nan")
    return run_job(TRAIN, config, overrides, number=number, sweep=sweep)


def run_sweep(arguments: list[str]) -> int:
    """Run every combination as a process of its own, and end in a table. Typed again, it does what is left."""
    from trainer.console import make_console
    from trainer.sweep import claim, summarise

    if {"RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ):
        raise ConfigError(
            "-m under a launcher would start every job in each of its processes: python train.py -m ... "
            "sweep.launch='accelerate launch --num_processes 4' launches each job by itself"
        )
    # Hydra's own parser takes no override behind a flag.
    overrides = get_args_parser().parse_intermixed_args(arguments).overrides
    flags = [argument for argument in arguments if argument not in overrides]
    folder, own = sweep_folder(overrides)
    received = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    # A scheduler's TERM ends the sweep as Ctrl-C does: the job that runs here saves first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    with claim(folder):
        try:
            _hydra([*flags, *overrides, *own])
        except KeyboardInterrupt:
            received = received or [signal.SIGINT]
        finally:
            (folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's copy of what every job's config.yaml says
        console = make_console()
        jobs, groups = summarise(folder, console)
        if groups and (page := report(folder, console, groups=groups)):
            console.print(f"report: {page}")
    if received:
        print("interrupted; the same command goes on with what is left", file=sys.stderr)
        return 128 + received[0]
    unfinished = [job for job in jobs if not job.state.startswith("finished")]
    if unfinished:
        print(f"{len(unfinished)} of {len(jobs)} jobs did not finish; the same command goes on", file=sys.stderr)
    if len(unfinished) == len(jobs):
        errors = [job.error for job in unfinished if job.error]
        return fail(errors[0] if errors else "there is no job to run, or each was stopped", status=1)
    return 0


def sweep_folder(typed: list[str]) -> tuple[Path, list[str]]:
    """The folder of a sweep, and what tells Hydra of it: hydra.sweep.dir, or a name that the same overrides give."""
    named, swept, hashed = None, [], []
    for override in OverridesParser.create().parse_overrides(typed):
        key = override.key_or_group
        if key in ("output_dir", "overwrite"):
            raise ConfigError(
                f"{override.input_line}: each job of a sweep has its folder in hydra.sweep.dir: name another one with "
                "hydra.sweep.dir=..., which is a new sweep"
            )
        if key == "hydra.sweep.dir":
            named = str(override.value())
        if override.is_sweep_override():
            swept.append(key.split(".")[-1])
        elif key == "experiment":  # which may say what is swept
            swept.append(str(override.value()))
        if not key.startswith(("hydra", "sweep.", "tracker")):
            hashed.append(str(override.input_line))
    if named is not None:
        if "$" in named:
            raise ConfigError(f"hydra.sweep.dir={named}: write the folder out: typed again, the sweep must find it")
        return Path(named), []
    digest = hashlib.sha256("\n".join(sorted(hashed)).encode()).hexdigest()[:8]
    folder = Path("outputs", "sweeps", "-".join([*swept[:4], digest]))
    return folder, [f"hydra.sweep.dir={folder}"]


def run_saved(arguments: list[str]) -> int:
    """`rerun=<folder>` repeats a run, `resume=<folder>` goes on with it; Hydra makes no folder here."""
    chosen = [argument for argument in arguments if argument.startswith(("rerun=", "resume="))]
    if len(chosen) > 1:
        raise ConfigError(f"{' '.join(chosen)}: give one folder, to repeat its run or to go on with it")
    verb, _, name = chosen[0].partition("=")
    folder = Path(name)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{verb}={folder}: the folder has no config.yaml: give the output folder of a run")
    overrides = [argument for argument in arguments if argument not in chosen]
    if flags := [argument for argument in overrides if argument.startswith("-")]:
        raise ConfigError(f"{verb}={folder} takes key=value only, not {' '.join(flags)}")
    # The folder may have been moved, and a run that is repeated is another one to its tracker.
    own = [assignment("output_dir", str(folder))] if verb == "resume" else ["tracker.id=null"]
    with hydra.initialize_config_dir(str(folder.resolve()), version_base="1.3"):
        saved, composed = hydra.compose("config"), hydra.compose("config", [*own, *overrides])
    config = parse_config(composed)
    if verb == "rerun":
        return run(config)
    changes = changed_keys(parse_config(saved), config)
    if config.output_dir != str(folder):
        raise ConfigError(f"output_dir={config.output_dir}: resume={folder} goes on in its own folder: leave it out")
    if refused := [key for key in changes if not key.startswith(MAY_CHANGE)]:
        raise ConfigError(
            f"resume={folder} cannot change {', '.join(f'{key}={changes[key][1]}' for key in refused)}: only "
            f"trainer.steps, trainer.epochs, data.path and the tracker may differ; rerun={folder} repeats it otherwise"
        )
    listed = [f"{key}: {old} -> {new}" for key, (old, new) in changes.items() if key not in ("output_dir", "overwrite")]
    return run(config, resume=True, changes=listed)


def run(config: Config, *, resume: bool = False, changes: list[str] | None = None) -> int:
    """Check, build, train, report; what is slow to import comes after the checks that do not need it.

    resume: go on with the run in output_dir; changes: what it now has otherwise, a line each.
    """
    from architectures.layouts import read_checkpoint
    from trainer.run_folder import RunFolder
    from trainer.tracker import Tracker, check_tracker, new_id

    if config.tracker.name is not TrackerName.none and config.tracker.id is None:
        config = replace(config, tracker=replace(config.tracker, id=new_id()))
    folder = RunFolder(config, resume=resume)
    if config.mode is Mode.train:
        folder.check()
    checkpoint = read_checkpoint(config.backbone)
    check_tracker(config)

    import datasets

    from trainer.data import load_data

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # of what is read and tokenised once, which may take minutes
    datasets.logging.set_verbosity(50)
    if config.mode is Mode.check:
        return check_data(config, checkpoint)
    data = load_data(config.data)

    from accelerate.utils import set_seed
    from transformers.utils import logging as transformers_logging

    from architectures.doctor import describe_modules, diagnose, head_parameters
    from architectures.export import loading_lines
    from architectures.factory import build_encoder
    from losses.factory import build_loss
    from trainer.card import model_card
    from trainer.console import make_console
    from trainer.display import print_end, print_start
    from trainer.environment import hardware, versions
    from trainer.loop import Stopped, TrainingError, build_batches, count_steps, train
    from trainer.optim import freeze
    from trainer.plan import (
        build_accelerator,
        check_batch,
        check_encoder,
        check_steps,
        check_teacher,
        choose_maxsim,
    )
    from trainer.start_table import describe_data, describe_run

    # What these warn of, such as queries that are cut, the start-up table says in figures.
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    accelerator = build_accelerator(config)
    main_process = accelerator.is_main_process
    try:
        check_batch(config, data, accelerator.num_processes)
        check_steps(count_steps(config, data.size), folder.saved_step() if resume else 0)
        check_teacher(config, data, query_length=checkpoint.settings.query_length)
        choose_maxsim(config, accelerator.device)
        set_seed(config.seed)
        encoder = build_encoder(config.backbone, config.head, checkpoint=checkpoint)
        check_encoder(config, encoder)
        backend = choose_maxsim(config, accelerator.device, encoder)
        width = encoder.get_embedding_dimension()
        assert width is not None, "the head has one"
        loss = build_loss(config.loss, width=width, maxsim=backend)
        freeze(encoder, loss.learnt, config.optimizer)
        batches = build_batches(config, data.sets, encoder, accelerator)
        console = make_console(main=main_process)
        modules = describe_modules(encoder)
        facts = {
            "checkpoint": f"{config.backbone.name}, {checkpoint.layout.value}",
            **diagnose(encoder),
            **describe_run(config, data, batches, encoder, loss, accelerator),
        }
        command = shlex.join(["python", "train.py", *sys.argv[1:]])
        made = {
            "command": command,
            "versions": versions(),
            "hardware": hardware(accelerator.device),
            "facts": facts,
            "modules": modules,
            # It reads every row, and of the processes one writes it down.
            "data": describe_data(config, data, encoder) if main_process else {},
        }
        print_start(console, modules, facts)
        for change in changes or []:
            console.print(f"changed  {change}")
        if resume and not folder.saved_step():
            console.print("no checkpoint was saved: the run starts again at its first step")
        folder.open(main=main_process)
        accelerator.wait_for_everyone()  # the others look for checkpoints, and an old run's are gone now
        with Tracker(config, main=main_process, say=console.print) as tracker:
            if where := tracker.where():
                console.print(f"tracker  {where}")
            result = train(
                accelerator,
                encoder,
                loss=loss,
                batches=batches,
                evaluation=data.evaluation,
                config=config,
                folder=folder,
                tracker=tracker,
                console=console,
            )
            result |= {"maxsim": backend, "head_parameters": head_parameters(encoder), "embedding_size": width}
            folder.write_result(result | made)
            tracker.finish(result)
            for path in {result["model"], (result["best"] or result)["model"]}:
                card = model_card(
                    config,
                    modules=modules,
                    facts=facts,
                    result=result,
                    loading=loading_lines(encoder, path),
                    command=command,
                    best=path != result["model"],
                )
                folder.write_card(Path(path).name, card)
        page = report(folder.path, console) if config.report and main_process else None
        print_end(console, result, loading=next(iter(loading_lines(encoder, result["model"]).values())), report=page)
    except TrainingError as error:
        return fail(str(error), status=1)
    except Stopped as stop:
        if main_process:
            if config.report:
                report(folder.path, console)
            print(stop, file=sys.stderr)
        return 128 + stop.signal
    finally:
        accelerator.end_training()
    return 0


def report(folder: Path, console: "Console", *, groups: "list[Group] | None" = None) -> Path | None:
    """Write the page of a run, or of the groups of a sweep, and return it; None where it cannot be drawn.

    All else is saved by then, and nothing that happens here may cost it.
    """
    try:
        from trainer.report import report_run, report_sweep

        return report_run(folder) if groups is None else report_sweep(folder, groups)
    except Exception as error:  # whatever a drawing library, its caches or the disk come up with
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = "run" if groups is None else "sweep"
        console.print(f"no report ({reason}): python scripts/report.py {kind}={shlex.quote(str(folder))} draws it")
        return None


def check_data(config: Config, checkpoint: "Checkpoint") -> int:
    """`mode=check`: say what the data is and what would become of it, without a weight."""
    from trainer.console import make_console
    from trainer.preflight import check_run

    errors = check_run(config, checkpoint.source, checkpoint.settings, make_console())
    for error in errors:
        fail(error)
    return 2 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
