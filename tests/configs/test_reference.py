"""The pages that describe the config say what the config is."""

from configs.reference import EXAMPLES, groups, help_text
from scripts.config_reference import README, updated
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"


def test_the_readme_describes_the_schema_as_it_is() -> None:
    readme = README.read_text(encoding="utf-8")
    assert updated(readme) == readme, "run python -m scripts.config_reference"


def test_help_lists_every_group_member_with_what_it_is_for() -> None:
    page = help_text(CONFIGS).splitlines()
    for group, members in groups(CONFIGS).items():
        start = page.index(f"{group}=")
        for line, (member, comment) in zip(page[start + 1 :], members.items(), strict=False):
            assert line.split(maxsplit=1) == [member, comment]
    assert set(groups(CONFIGS)) == {
        *("backbone", "data", "evaluation", "experiment", "head", "loss", "optimizer", "tracker", "trainer")
    }


def test_help_does_not_list_what_the_launcher_reads() -> None:
    assert list((CONFIGS / "accelerate").glob("*.yaml"))
    assert "accelerate=" not in help_text(CONFIGS).splitlines()


def test_help_gives_seven_commands() -> None:
    page = help_text(CONFIGS)
    assert len(EXAMPLES) == 7
    assert all(command in page for command, _ in EXAMPLES)
