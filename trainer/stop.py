"""Ctrl-C and the TERM of a scheduler, as a wish that the loop grants after the step."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Terminals and schedulers signal a whole group, and launchers pass on what they get: one wish may arrive twice.
SAME_WISH_SECONDS = 2


class StopWish:
    """Inside the `with` block, the first SIGINT or SIGTERM is noted, and a later one acts as it always does."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.signal: int | None = None
        self._noted = 0.0
        self._say = say
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Elsewhere Python lets no handler be set; who trains in a thread stops the thread.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._noted = number, time.monotonic()
            self._say(f"{signal.Signals(number).name}: finishing the step, then saving; once more stops at once")
        elif time.monotonic() - self._noted > SAME_WISH_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
