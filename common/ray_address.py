"""Which Ray cluster a run is on; what is checked, and how it starts, depends on that."""

import os

from omegaconf import DictConfig


def cluster_address(config: DictConfig) -> str:
    """The address of the cluster that a run joins; "local" for one that it starts for itself."""
    named = config.ray_kwargs.ray_init.get("address") or os.environ.get("RAY_ADDRESS")
    return named or ("auto" if config.trainer.nnodes > 1 else "local")


def joins_cluster(config: DictConfig) -> bool:
    """Whether the run joins a Ray cluster that is there, rather than start its own."""
    return cluster_address(config) != "local"
