"""How the weights of a trainer's rank reach the vLLM worker beside it: through a socket that only this run knows."""

import os
import tempfile

# Set in the environment of all processes of a run
RUN_NAME = "SPIN_RUN_NAME"
ONE_MACHINE = "SPIN_ONE_MACHINE"  # where it has a cluster and a temporary folder of its own


def has_own_sockets(rollout) -> bool:
    """Whether the run's own vLLM workers receive the weights; verl builds split engines by itself."""
    return rollout.name == "vllm" and not rollout.disaggregation.enabled


def own_socket(address: str) -> str:
    """The run's address in place of verl's, which has only Ray's job in it: every private cluster's first is number 1.

    The folder is the run's own on a cluster of its own; on a shared one the name tells runs apart.
    """
    _, place = address.rsplit("-replica-", 1)
    return f"ipc://{tempfile.gettempdir()}/{os.environ[RUN_NAME]}-weights-{place}"
