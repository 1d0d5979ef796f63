"""What can be configured, in words: the help page, and one line for a command that Hydra refuses."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from configs.schema import explain, unknown_key

EXAMPLES = (
    ("python train.py", "the embedded default: minutes on a CPU, no network"),
    ("python train.py head=mlp_residual head.layers.0.out_features=512", "another head, one width changed"),
    ("python train.py data=pairs data.path=mine.jsonl trainer.steps=null trainer.epochs=1", "your own pairs"),
    ("python train.py backbone=modernbert_base trainer=gpu data=pairs data.path=mine.jsonl", "a Hub model on a GPU"),
    ("python train.py rerun=outputs/quickstart output_dir=outputs/again", "the same run once more"),
    ("python train.py resume=outputs/quickstart", "a run that was stopped or killed goes on"),
    ("python train.py -m head=linear,mlp,mlp_residual seed=1,2,3", "a sweep; typed again, it does what is left"),
)
# What follows from backbone and data, and what `accelerate launch` reads.
NO_GROUPS = ("pairing", "accelerate")
# What others extend.
NO_MEMBERS = ("base",)


def help_text(configs: Path) -> str:
    """The page of `--help`: the groups, a line for each member, and example commands."""
    lines = ["Train a late-interaction retriever: python train.py [group=member] [key=value] ...", ""]
    for group, members in groups(configs).items():
        lines.append(f"{group}=")
        width = max(map(len, members))
        lines += [f"    {member:<{width}}  {comment}" for member, comment in members.items()]
    lines += ["", "Examples:"]
    lines += [f"    {command}\n        {comment}" for command, comment in EXAMPLES]
    lines += [
        "",
        "Every key: README.md, or `python train.py --cfg job` for the values of a command without running it.",
    ]
    return "\n".join(lines)


def groups(configs: Path) -> dict[str, dict[str, str]]:
    """The first comment of each member, by member, by group."""
    return {
        folder.name: {
            member.relative_to(folder).with_suffix("").as_posix(): first_comment(member)
            for member in sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
            if member.stem not in NO_MEMBERS
        }
        for folder in sorted(configs.iterdir())
        if any(folder.glob("*.yaml")) and folder.name not in NO_GROUPS
    }


def first_comment(path: Path) -> str:
    """What a config file is for: its first comment that is no directive."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            return line.removeprefix("# ")
    raise ValueError(f"{path} must begin with a comment that says what it is for")


def explain_composition(error: HydraException | OmegaConfBaseException, configs: Path) -> str:
    """One line for an error of Hydra's: what was given, the rule, and the nearest that there is."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, member = error.missing_cfg_file.rpartition("/")
        members = groups(configs).get(group)
        if members:
            nearest = get_close_matches(member, members, n=1, cutoff=0.0)[0]
            return f"{group}={member} is no member; the nearest is {nearest}, of {', '.join(members)}"
        return f"{error.missing_cfg_file}: there is no such config; the groups are {', '.join(groups(configs))}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be parsed: write key=value, in quotes where the shell would take it apart"
    if str(error).startswith("Ambiguous value for argument"):
        given = re.findall(r"'([^']+)'", str(error))[0]
        return f"{given} lists several values: python train.py -m {given} runs them all, [...] makes them one list"
    refused = re.search(r"Could not override '([^']+)'", str(error))
    for cause in _causes(error):
        if isinstance(cause, OmegaConfBaseException):
            # Inside a list given as a value, omegaconf names the key without its place.
            if refused and cause.full_key and not cause.full_key.startswith(refused[1].split(".")[0]):
                return unknown_key(f"{refused[1]}[0].{cause.full_key}")
            return explain(cause)
    return unknown_key(refused[1].partition("@")[0]) if refused else str(error).splitlines()[0]


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
