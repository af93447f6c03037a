"""A checkpoint is tensors and plain values: code that a file names is not run when it is loaded."""

import pickle
import random

import numpy as np
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler
from verl.trainer.ppo.v1 import trainer_base
from verl.utils.checkpoint import fsdp_checkpoint_manager
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager
from worker_jobs import Runs, load_what_names_code, make_batches

import recipe.spin.spin_trainer  # noqa: F401 - patches verl

MODULES = [fsdp_checkpoint_manager, trainer_base]


@pytest.mark.parametrize("module", MODULES)
def test_code_is_not_run(tmp_path, module):
    torch.save({"state": [Runs(str(tmp_path / "ran"))]}, tmp_path / "data.pt")
    with pytest.raises(pickle.UnpicklingError, match=rf"{tmp_path}/data.pt .*names code.*another checkpoint.*globals$"):
        module.torch.load(tmp_path / "data.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_the_random_state_comes_back(tmp_path):
    torch.save(BaseCheckpointManager.get_rng_state(), tmp_path / "extra.pt")
    drawn = random.random(), np.random.random(), torch.rand(1).item()
    BaseCheckpointManager.load_rng_state(fsdp_checkpoint_manager.torch.load(tmp_path / "extra.pt", weights_only=False))
    assert (random.random(), np.random.random(), torch.rand(1).item()) == drawn


@pytest.mark.parametrize("workers", [0, 2])
def test_the_place_in_the_data_comes_back(tmp_path, workers):
    def loader() -> StatefulDataLoader:
        sampler = RandomSampler(list(range(12)), generator=torch.Generator().manual_seed(1))
        return StatefulDataLoader(list(range(12)), batch_size=2, sampler=sampler, num_workers=workers)

    stopped = loader()
    batches = iter(stopped)
    next(batches), next(batches)
    torch.save(stopped.state_dict(), tmp_path / "data.pt")
    left = [batch.tolist() for batch in batches]
    resumed = loader()
    resumed.load_state_dict(trainer_base.torch.load(tmp_path / "data.pt", weights_only=False))
    assert [batch.tolist() for batch in resumed] == left and len(left) == 4


def test_what_a_module_of_the_users_allows_is_loaded(tmp_path):
    torch.save({"state": Mine()}, tmp_path / "data.pt")
    with torch.serialization.safe_globals([Mine]):
        assert isinstance(trainer_base.torch.load(tmp_path / "data.pt")["state"], Mine)


class Mine:
    """The state of a data set of the user's."""


def test_all_else_of_torch_is_as_it_was():
    assert trainer_base.torch.Tensor is torch.Tensor and fsdp_checkpoint_manager.torch.save is torch.save


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_the_worker_takes_its_own_files_and_no_others(tiny_models, ranks, tmp_path, strategy):
    """On one rank; what comes back, and several ranks, are test_reference.py's."""
    settings = [
        f"actor_rollout_ref.model.path={tiny_models['llama']}",
        f"actor_rollout_ref.actor.strategy={strategy}",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra]",
        "data.train_batch_size=6",
    ]
    (said,) = ranks[1].run(load_what_names_code, settings, make_batches()[0], str(tmp_path))
    kinds = ("extra_state", "model", "optim")
    assert [name.split("_world_size")[0] for name in said] == list(kinds)
    assert all("names code" in words for words in said.values()) and not (tmp_path / "ran").exists()
