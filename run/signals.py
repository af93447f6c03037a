"""Signals that stop a run: an exception in the main thread, so that what the run started and made is removed."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

received: list[int] = []  # Ray's calls turn whatever a handler raises into a bare KeyboardInterrupt


def honor() -> None:
    """Lets the signals stop the run; SIGHUP only where it is not ignored, as under `nohup`."""
    for number in STOPPING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame) -> None:
    for ignored in STOPPING:  # nothing cuts what ends the run
        signal.signal(ignored, signal.SIG_IGN)
    received.append(number)
    raise KeyboardInterrupt


@contextmanager
def held_off() -> Iterator[None]:
    """Lets no signal cut what cleans up after a run; in the main thread."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # none of Python's


def raise_received() -> None:
    """Raises again what the code of a library swallowed."""
    if received:
        raise KeyboardInterrupt
