"""A run's workers as forks of one process, which imports torch, vLLM and verl for all of them."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, open_dict

from recipe.spin.common.ray_address import joins_cluster

BACKLOG = 64  # workers that may wait while the server imports
SCRIPTS = Path(__file__).resolve().parent


class WorkerForks:
    """Starts the fork server (fork_server.py) and has Ray ask it for workers (fork_client.py).

    By `py_executable` of Ray's runtime environment, its hook for what takes Python's place. A run's ten processes share
    the memory of what is imported so, and wait for it once.

    Attributes:
        process: the server. log: what it said.
    """

    def __init__(self, ray_init: DictConfig, at_once: Sequence[str], with_the_first: Sequence[str]):
        """ray_init: the settings of `ray.init`. at_once, with_the_first: the modules that the server imports when it
        starts, and that wait for a worker."""
        self._ray_init = ray_init
        self._modules = [",".join(at_once), ",".join(with_the_first)]
        self.process: subprocess.Popen | None = None
        self.log = Path()

    @staticmethod
    def fit(config: DictConfig) -> bool:
        """Whether a run's workers can be forks, by its settings as they were given.

        On a Ray of its own, whose workers have the environment of the command: a runtime environment may want another
        Python, and full determinism another seed of its hashes. Without GPUs: CUDA may not have been used before a
        fork, and nobody has looked whether an import does.
        """
        another = any((config.ray_kwargs.ray_init.get("runtime_env") or {}).values())
        another |= config.actor_rollout_ref.rollout.full_determinism
        return config.trainer.device == "cpu" and not joins_cluster(config) and not another

    def start(self, folder: Path) -> None:
        """Starts the server; `folder` gets its socket and log. To be called before Ray starts.

        By the main thread: the server ends with the thread that started it.
        """
        path, self.log = folder / "workers", folder / "fork_server.log"
        with socket.socket(socket.AF_UNIX) as listener, open(self.log, "wb") as log:
            listener.bind(str(path))
            listener.listen(BACKLOG)
            server = [sys.executable, "-u", str(SCRIPTS / "fork_server.py"), str(listener.fileno()), str(os.getpid())]
            self.process = subprocess.Popen(
                [*server, *self._modules],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # a terminal's signals are for the driver
            )
        client = [sys.executable, "-I", "-S", str(SCRIPTS / "fork_client.py"), str(path)]
        self._take(shlex.join(client))

    def pause(self) -> None:
        """Lets the server fork no more."""
        self.process.send_signal(signal.SIGSTOP)

    def stop(self) -> None:
        """Ends the server; its forks go on."""
        self.process.kill()
        self._take(None)

    def _take(self, command: str | None) -> None:
        with open_dict(self._ray_init):
            self._ray_init.runtime_env.py_executable = command
