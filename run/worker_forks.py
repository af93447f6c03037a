"""A run's workers as forks of one process, which imports torch, vLLM and verl for all of them."""

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, open_dict

BACKLOG = 64  # workers that may wait while the server imports
REGISTER_SECONDS = "300"  # Ray's 60 can be too few where the libraries are read from a cold disk before it hears
SCRIPTS = Path(__file__).resolve().parent


class WorkerForks:
    """Starts the fork server (fork_server.py) and has Ray ask it for workers (fork_client.py).

    By `py_executable` of Ray's runtime environment, its hook for what takes Python's place. A run's ten processes share
    the memory of what is imported so, and wait for it once. Without GPUs only: CUDA may not have been used before a
    fork, and nobody has looked whether any of these imports does.

    Attributes:
        process: the server. log: what it said.
    """

    def __init__(self, runtime_env: DictConfig, at_once: Sequence[str], with_the_first: Sequence[str]):
        """at_once, with_the_first: the modules that the server imports when it starts, and that wait for a worker."""
        self._runtime_env = runtime_env
        self._modules = [",".join(at_once), ",".join(with_the_first)]
        self.process: subprocess.Popen | None = None
        self.log = Path()

    @staticmethod
    def fit(config: DictConfig, joins: bool) -> bool:
        """Whether workers can be forks: one machine, without GPUs, and no Python or packages of the user's choice."""
        chosen = [key for key, value in config.ray_kwargs.ray_init.runtime_env.items() if key != "env_vars" and value]
        return not joins and config.trainer.device == "cpu" and not chosen

    def start(self, folder: Path) -> None:
        """Starts the server; `folder` gets its socket and log. To be called before Ray starts."""
        os.environ.setdefault("RAY_worker_register_timeout_seconds", REGISTER_SECONDS)
        path, self.log = folder / "workers", folder / "fork_server.log"
        with socket.socket(socket.AF_UNIX) as listener, open(self.log, "wb") as log:
            listener.bind(str(path))
            listener.listen(BACKLOG)
            server = [sys.executable, "-P", "-u", str(SCRIPTS / "fork_server.py"), str(listener.fileno())]
            self.process = subprocess.Popen(
                [*server, *self._modules],
                env=os.environ | dict(self._runtime_env.env_vars),
                stdin=subprocess.PIPE,  # it ends with the driver
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # a terminal's signals are for the driver
            )
        client = [sys.executable, "-I", "-S", str(SCRIPTS / "fork_client.py"), str(path)]
        with open_dict(self._runtime_env):
            self._runtime_env.py_executable = shlex.join(client)

    def stop(self) -> None:
        """Lets the server end; its forks go on."""
        self.process.stdin.close()
