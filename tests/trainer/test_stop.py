"""Signals that this process sends itself, in and around the block that hears them."""

import signal
import threading
from collections.abc import Iterator
from signal import SIGINT, SIGTERM, Signals
from types import FrameType
from typing import Any

import pytest

from trainer import stop
from trainer.stop import StopWish


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[list[Signals]]:
    """Ctrl-C interrupts, as in any Python; TERM, which would end the tests, is written into the list instead."""
    heard: list[Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        heard.append(Signals(number))

    before = {SIGINT: signal.signal(SIGINT, signal.default_int_handler), SIGTERM: signal.signal(SIGTERM, note)}
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if time enough lay between any two signals for the second to be another wish."""
    monkeypatch.setattr(stop, "SAME_WISH_SECONDS", -1)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (SIGINT, SIGTERM)]


def test_without_a_signal_nothing_is_wished_and_nothing_said() -> None:
    said: list[str] = []
    with StopWish(said.append) as wish:
        assert wish.signal is None
    assert wish.signal is None
    assert said == []


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_the_first_signal_is_noted_and_said(number: Signals, own_handlers: list[Signals]) -> None:
    said: list[str] = []
    with StopWish(said.append) as wish:
        signal.raise_signal(number)
        assert wish.signal == number
    assert said == [f"{number.name}: finishing the step, then saving; once more stops at once"]
    assert own_handlers == []
    assert wish.signal == number


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("first", [SIGINT, SIGTERM])
def test_a_later_signal_acts_as_before(first: Signals, own_handlers: list[Signals]) -> None:
    said: list[str] = []
    with StopWish(said.append) as wish:
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(SIGINT)
        signal.raise_signal(SIGTERM)
        assert own_handlers == [SIGTERM]
    assert wish.signal == first
    assert len(said) == 1


@pytest.mark.usefixtures("later")
def test_a_later_term_acts_as_before(own_handlers: list[Signals]) -> None:
    with StopWish(lambda line: None) as wish:
        signal.raise_signal(SIGINT)
        signal.raise_signal(SIGTERM)
    assert wish.signal == SIGINT
    assert own_handlers == [SIGTERM]


def test_a_wish_that_arrives_several_times_at_once_is_one(own_handlers: list[Signals]) -> None:
    # The terminal signals every process of its group, and the launcher, one of them, passes on what it got.
    said: list[str] = []
    with StopWish(said.append) as wish:
        for number in (SIGINT, SIGINT, SIGTERM, SIGINT):
            signal.raise_signal(number)
        assert wish.signal == SIGINT
    assert len(said) == 1
    assert own_handlers == []


@pytest.mark.parametrize("signalled", [False, True])
def test_after_the_block_signals_act_as_before(signalled: bool, own_handlers: list[Signals]) -> None:
    before = handlers()
    with StopWish(lambda line: None):
        assert not set(handlers()) & set(before)
        if signalled:
            signal.raise_signal(SIGINT)
    assert handlers() == before
    signal.raise_signal(SIGTERM)
    assert own_handlers == [SIGTERM]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(SIGINT)


def test_an_error_in_the_block_passes_and_gives_the_signals_back() -> None:
    before = handlers()
    with pytest.raises(ValueError, match=r"^mine$"), StopWish(lambda line: None):
        raise ValueError("mine")
    assert handlers() == before


def test_a_block_inside_another_gives_the_signals_back_to_it() -> None:
    # As where one run after the other is trained by one process.
    with StopWish(lambda line: None) as outer:
        with StopWish(lambda line: None) as inner:
            signal.raise_signal(SIGTERM)
        signal.raise_signal(SIGINT)
    assert (inner.signal, outer.signal) == (SIGTERM, SIGINT)


def test_in_a_thread_nothing_is_installed() -> None:
    before, seen = handlers(), []

    def enter() -> None:
        with StopWish(lambda line: None) as wish:
            seen.append((handlers(), wish.signal))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(before, None)]
    assert handlers() == before
