"""A Ray cluster for the tests, started as a user would with `ray start`: one raylet a node, all on this machine."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import ray

from recipe.spin.tools.device_probe import free_port

# As docs/clusters.md asks for; a head node takes the token of an earlier cluster by itself, and others would not
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
SECONDS_TO_START = 90


class RayCluster:
    """Nodes with so many logical GPUs each; `address` is what RAY_ADDRESS names. Ends by its own processes alone.

    The nodes know nothing of the recipe: no PYTHONPATH, none of the CPU profile's variables, another folder.
    """

    def __init__(self, gpus: list[int], environment: dict[str, str]):
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie deep below it
        self.address = f"{ray.util.get_node_ip_address()}:{free_port()}"
        self._environment = environment
        self._nodes: list[subprocess.Popen] = []
        try:
            for number, count in enumerate(gpus):
                self._start(count, head=number == 0)
                self._await(number + 1)
        except BaseException:
            self.stop()
            raise

    def _start(self, gpus: int, head: bool) -> None:
        where = ["--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false"]
        if not head:
            where = [f"--address={self.address}"]
        options = [f"--num-gpus={gpus}", "--num-cpus=48", "--object-store-memory=500000000", "--block"]
        options += [f"--temp-dir={self.folder}", "--min-worker-port=0", "--max-worker-port=0"]
        options += [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"]
        if head:
            options.append(f"--ray-client-server-port={free_port()}")
        with open(self.folder / f"node-{len(self._nodes)}.log", "w") as log:
            node = subprocess.Popen(
                [str(Path(sys.executable).parent / "ray"), "start", *where, *options],
                cwd=self.folder,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._nodes.append(node)

    def _await(self, nodes: int) -> None:
        """Returns when Ray counts so many nodes."""
        count = (
            f"import ray; ray.init('{self.address}', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
        )
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and self._nodes[-1].poll() is None:
            told = subprocess.run([sys.executable, "-c", count], env=self._environment, capture_output=True, text=True)
            if told.stdout.strip() == str(nodes):
                return
        raise RuntimeError(f"node {nodes} did not come up: {told.stderr[-2000:]}\n{self._log_text()[-2000:]}")

    def _log_text(self) -> str:
        return "\n".join(file.read_text() for file in self.folder.glob("node-*.log"))

    def logs(self) -> str:
        """All that the cluster has written about its runs."""
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        return "\n".join(file.read_text(errors="replace") for file in files)

    def stop(self) -> None:
        for node in reversed(self._nodes):
            try:
                processes = psutil.Process(node.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            node.terminate()
            _, alive = psutil.wait_procs(processes, timeout=15)
            for process in alive:
                process.kill()
            node.kill()
            node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def bare_environment() -> dict[str, str]:
    """What a node's shell has: programs, the home, the cluster's token; and workers that wait behind nobody."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return inherited | TOKEN | {"RAY_worker_niceness": "0"}
