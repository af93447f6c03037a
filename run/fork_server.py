"""The process that workers are forked from once it has imported what they need; worker_forks.py starts it.

    python -u fork_server.py LISTENING_SOCKET AT_ONCE WITH_THE_FIRST     (its number; modules, by commas)

Modules that look at the environment of a worker when they are imported, as Ray looks for its job's number, wait for the
first request. The server ends when its standard input does, with the driver.
"""

import contextlib
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
from dataclasses import dataclass
from pathlib import Path

RECEIVED_AT_ONCE = 65536
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


def serve(listener: socket.socket, modules: list[str]) -> Request | None:
    """Forks a process a request. Returns the request in the fork, and in the server None when its driver has gone.

    `modules` are imported with the first request and in its environment.
    """
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listener.accept()
        with connection:
            request = Request.read(connection)
            if request is None:
                sys.stderr.write("a client was ended before it had said all; Ray asks again\n")
                continue
            if modules:
                set_environment(request.environment)
                import_all(modules)
                modules = []
                gc.collect()
                gc.freeze()  # the collector would write to all that the forks share
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel takes ended forks away
            if os.fork() == 0:
                return request
            close(request.files)
            with contextlib.suppress(OSError):  # Ray has ended the client meanwhile, and refuses the fork
                connection.sendall(b".")


def main() -> None:
    # Python looks in a script's folder first, whose modules have names that others may have too
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(__file__)]
    number, at_once, with_the_first = sys.argv[1:]
    with socket.socket(fileno=int(number)) as listener:
        import_all(at_once.split(","))
        request = serve(listener, with_the_first.split(","))
    if request is not None:
        request.run()


if __name__ == "__main__":
    main()
