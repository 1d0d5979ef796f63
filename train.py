"""Train a late-interaction retriever from composed YAML: compose -> build -> train -> report.

`python train.py --help` lists what can be configured. Hydra is known here and in scripts/, nowhere below; all that is
slow to import waits until the config has been checked.
"""

import logging
import os
import sys
from pathlib import Path

# Hydra would print its own lines and exit; with this it raises, and one line of ours answers.
os.environ["HYDRA_FULL_ERROR"] = "1"

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from configs.reference import explain_composition, help_text
from configs.schema import Config, ConfigError, parse_config

CONFIGS = Path(__file__).parent / "configs"
ConfigStore.instance().store("schema", Config)


def main(arguments: list[str]) -> int:
    """Run the command line. The status is 0, 1 for a run that failed, or 2 for a mistake in what was asked."""
    if {"--help", "-h"} & set(arguments):
        print(help_text(CONFIGS))
        return 0
    try:
        rerun = [argument for argument in arguments if argument.startswith("rerun=")]
        if rerun:
            return run(parse_config(compose_rerun(rerun, arguments)))
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(_task)()
    except ConfigError as error:
        return _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return _fail(explain_composition(error, CONFIGS))
    except ValueError as error:
        # How Hydra answers head=null.
        if not str(error).startswith("Config group override"):
            raise
        return _fail(f"{' '.join(arguments)}: a group takes the name of a member; `python train.py --help` lists them")
    except YAMLError as error:
        return _fail(f"a config file is no YAML: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _task(composed: DictConfig) -> None:
    # SystemExit passes through Hydra, which prints a page about any other exception.
    try:
        status = run(parse_config(composed))
    except ConfigError as error:
        status = _fail(str(error))
    if status:
        raise SystemExit(status)


def compose_rerun(rerun: list[str], arguments: list[str]) -> DictConfig:
    """The saved config of a run, with the overrides of this one. Hydra makes no folder here."""
    folder = Path(rerun[-1].removeprefix("rerun="))
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"rerun={folder}: the folder has no config.yaml: give the output folder of a run")
    overrides = [argument for argument in arguments if argument not in rerun]
    if flags := [argument for argument in overrides if argument.startswith("-")]:
        raise ConfigError(f"rerun={folder} repeats one run and takes key=value only, not {' '.join(flags)}")
    with hydra.initialize_config_dir(str(folder.resolve()), version_base="1.3"):
        return hydra.compose("config", overrides)


def run(config: Config) -> int:
    """Check, build, train, report; what is slow to import comes after the checks that do not need it."""
    from architectures.weights import locate_backbone
    from trainer.run_folder import RunFolder

    folder = RunFolder(config)
    folder.check()
    locate_backbone(config.backbone)

    import datasets

    from trainer.data import load_data

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(50)
    data = load_data(config.data)

    from accelerate.utils import set_seed
    from transformers.utils import logging as transformers_logging

    from architectures.factory import build_encoder
    from losses import build_loss
    from trainer.display import make_console, print_end, print_start
    from trainer.loop import TrainingError, train
    from trainer.plan import build_accelerator, check_batch, choose_maxsim, describe_run

    # What these warn of, such as queries that are cut, the start-up table says in figures.
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    check_batch(config, len(data.train))
    backend = choose_maxsim(config)
    accelerator = build_accelerator(config)
    set_seed(config.seed)
    encoder = build_encoder(config.backbone, config.head)
    console = make_console()
    print_start(console, encoder, describe_run(config, data, encoder, accelerator, backend))
    folder.create()
    try:
        result = train(
            accelerator, encoder, loss=build_loss(config.loss), data=data, config=config, folder=folder, console=console
        )
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result["maxsim"] = backend
    folder.write_result(result)
    print_end(console, result)
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
