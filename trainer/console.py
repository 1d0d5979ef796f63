"""The terminal, or the file that stands for it."""

from rich.console import Console


def make_console(*, main: bool = True) -> Console:
    """A console that prints texts as they are: a `[Q]` in them is no markup. Without a terminal, lines may be long.

    main: whether this process speaks; of several, one does.
    """
    if not main:
        return Console(quiet=True, force_terminal=False)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(markup=False, highlight=False, soft_wrap=True, width=140)
