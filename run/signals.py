"""Signals that stop a run: an exception in the main thread, so that what the run started and made is removed."""

import signal

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


def raise_received() -> None:
    """Raises again what the code of a library swallowed."""
    if received:
        raise KeyboardInterrupt
