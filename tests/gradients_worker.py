"""Train as train.py does on each data file of a folder, and leave the gradients of the first step beside it.

torchrun --nproc_per_node 2 -m tests.gradients_worker <folder> <key=value>...
"""

import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from architectures.factory import build_encoder
from configs.schema import Config, parse_config
from losses.factory import build_loss
from tests.conftest import ROOT
from trainer.console import make_console
from trainer.data import load_data
from trainer.loop import train
from trainer.plan import build_accelerator
from trainer.run_folder import RunFolder
from trainer.tracker import Tracker


def main(folder: Path, overrides: list[str]) -> None:
    ConfigStore.instance().store("schema", Config)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        configs = {
            path.stem: parse_config(compose("train", [*overrides, f"data.path={path}", "overwrite=true"]))
            for path in sorted(folder.glob("*.jsonl"))
        }
    accelerator = build_accelerator(next(iter(configs.values())))
    for name, config in configs.items():
        gradients = first_gradients(accelerator, config)
        if accelerator.is_main_process:
            save_file(gradients, folder / f"{name}_of_{accelerator.num_processes}.safetensors")
    accelerator.end_training()


def first_gradients(accelerator: Accelerator, config: Config) -> dict[str, Tensor]:
    """What the optimiser sees at the first step, by the parameter's name."""
    data = load_data(config.data)
    set_seed(config.seed)
    encoder = build_encoder(config.backbone, config.head)
    folder = RunFolder(config)
    folder.open(main=accelerator.is_main_process)
    gradients: dict[str, Tensor] = {}

    def collect(*_: object) -> None:
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            gradients.setdefault(name, parameter.grad.clone())

    handle = register_optimizer_step_pre_hook(collect)
    train(
        accelerator,
        encoder,
        loss=build_loss(config.loss, maxsim="reference"),
        data=data,
        config=config,
        folder=folder,
        tracker=Tracker(config, main=accelerator.is_main_process, say=print),
        console=make_console(main=accelerator.is_main_process),
    )
    handle.remove()
    return gradients


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
