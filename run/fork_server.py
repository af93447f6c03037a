"""The process that workers are forked from once it has imported what they need; worker_forks.py starts it.

    python -u fork_server.py LISTENING_SOCKET DRIVER AT_ONCE WITH_THE_FIRST     (numbers; modules, by commas)

Modules that look at the environment of a worker when they are imported, as Ray looks for its job's number, wait for the
first request. The kernel ends the server with the driver.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

RECEIVED_AT_ONCE = 65536
PR_SET_PDEATHSIG = 1
PRIORITY = Path("/proc/self/oom_score_adj")


@dataclass(frozen=True)
class Request:
    """A worker to be: its command (a script and arguments), and with what it is to run."""

    command: list[str]
    environment: dict[str, str]
    folder: str
    open_files: list[int]  # limits, soft and hard
    ended_first: int  # how much rather than others when memory runs out
    files: list[int]  # its standard input, output and error

    @classmethod
    def read(cls, connection: socket.socket) -> "Request | None":
        """None where the client was ended before it had said all."""
        _, files, *_ = socket.recv_fds(connection, 1, 3)
        parts = iter(lambda: connection.recv(RECEIVED_AT_ONCE), b"")
        try:
            return cls(files=files, **json.loads(b"".join(parts)))
        except json.JSONDecodeError:
            close(files)
            return None

    def run(self) -> None:
        """Runs the command in this process, as Python would have from the start."""
        import numpy

        for number, file in enumerate(self.files):
            os.dup2(file, number)
        close(self.files)
        os.setpgid(0, 0)  # Ray ends workers by their groups, and none is to take the server along
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_NOFILE, self.open_files)
        if self.ended_first > int(PRIORITY.read_text()):  # less is for root alone
            PRIORITY.write_text(str(self.ended_first))
        os.chdir(self.folder)
        set_environment(self.environment)
        numpy.random.seed()  # else the same in all forks; Python's own generator sees to it itself
        sys.argv[:] = self.command
        sys.path.insert(0, os.path.dirname(self.command[0]))
        runpy.run_path(self.command[0], run_name="__main__")


def close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def import_all(modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)


def end_with(driver: int) -> None:
    """Has the kernel end this process when the driver has ended, one that was stopped too; its forks go on."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:
        sys.exit("the driver has ended")


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def is_gone(connection: socket.socket) -> bool:
    """Whether the client does not wait for its answer any more."""
    poll = select.poll()
    poll.register(connection, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def serve(listener: socket.socket, modules: list[str]) -> Request:
    """Forks a process a request; returns the request in the fork.

    `modules` are imported with the first request and in its environment.
    """
    while True:
        connection, _ = listener.accept()
        with connection:
            request = Request.read(connection)
            if request is None:
                say("a client was ended before it had said all; Ray asks again")
                continue
            if modules:
                set_environment(request.environment)
                import_all(modules)
                modules = []
                gc.collect()
                gc.freeze()  # the collector would write to all that the forks share
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel takes ended forks away
                say(f"all is imported; {len(os.listdir('/proc/self/task'))} threads")
            if is_gone(connection):  # Ray has given it up while others were imported for, and refuses the fork
                say("a client was ended while it waited; Ray asks again")
                close(request.files)
                continue
            fork = os.fork()
            if fork == 0:
                return request
            say(f"forked {fork}")
            close(request.files)
            with contextlib.suppress(OSError):  # Ray has ended the client meanwhile, and refuses the fork
                connection.sendall(b".")


def main() -> None:
    # Python looks in a script's folder first, whose modules have names that others may have too
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(__file__)]
    number, driver, at_once, with_the_first = sys.argv[1:]
    end_with(int(driver))
    with socket.socket(fileno=int(number)) as listener:
        import_all(at_once.split(","))
        request = serve(listener, with_the_first.split(","))
    request.run()


if __name__ == "__main__":
    main()
