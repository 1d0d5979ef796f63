"""The terminal, or the file that stands for it."""

import os
import sys
import time

from rich.console import Console


def make_console(*, main: bool = True) -> Console:
    """A console that prints texts as they are: a `[Q]` in them is no markup. Without a terminal, lines may be long.

    main: whether this process speaks; of several, one does.
    """
    if not main:
        return Console(quiet=True, force_terminal=False)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(markup=False, highlight=False, soft_wrap=True, width=140)


def fail(message: str, *, status: int = 2) -> int:
    """Say what ends this command, and return its status."""
    # Of several processes of a machine, all of which find most mistakes, the first says them and the launcher ends all.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(30)
    print(f"error: {message}", file=sys.stderr)
    return status
