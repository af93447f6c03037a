"""What SpinTrainer decides by itself; its steps are run end to end in test_end_to_end."""

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from worker_harness import nest

from recipe.spin.spin_trainer import SpinTrainer


@pytest.fixture
def trainer() -> SpinTrainer:
    trainer = SpinTrainer.__new__(SpinTrainer)
    trainer.global_steps = 7
    return trainer


def test_a_response_has_ended_if_its_last_token_says_so(trainer):
    trainer.__dict__["_end_tokens"] = {2, 5}
    rows = [[1, 2], [2, 1], [5], []]
    responses = TensorDict({"responses": nest([torch.tensor(row).long() for row in rows])}, batch_size=4)
    assert trainer._ended(responses).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("enable", "limit", "fetched", "stops"),
    [(True, 3, 12, True), (True, 3, 11, False), (True, 0, 1000, False), (False, 3, 1000, False)],
)
def test_dynamic_sampling_has_a_limit(trainer, enable, limit, fetched, stops):
    groups = {"enable": enable, "max_num_gen_batches": limit}
    trainer.config = OmegaConf.create({"algorithm": {"filter_groups": groups}, "data": {"train_batch_size": 4}})
    if not stops:
        trainer._check_filtering(fetched)
        return
    with pytest.raises(RuntimeError, match=r"(?s)step 7: 12 prompts .*max_num_gen_batches=3"):
        trainer._check_filtering(fetched)
