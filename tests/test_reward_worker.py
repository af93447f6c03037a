"""What differs in the recipe's reward worker from verl's."""

import asyncio
import json
import shutil

import pytest
from omegaconf import OmegaConf
from verl.experimental.reward_loop import reward_loop
from worker_harness import compose

from recipe.spin.rollout.reward_error import RewardError
from recipe.spin.rollout.reward_worker import RewardWorker, VerlWorker

CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).touch()
class Strange(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path, tiny_models):
    """A model whose tokenizer brings code along."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "strange.Strange"]}, "tokenizer_class": "Strange"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "strange.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    return folder


@pytest.mark.parametrize("trusts", [False, True])
def test_code_in_a_model_folder_runs_only_where_it_is_trusted(folder, tmp_path, monkeypatch, trusts):
    monkeypatch.setattr(reward_loop, "load_reward_manager", lambda *args, **options: None)
    monkeypatch.setattr(reward_loop, "hf_tokenizer", reward_loop.hf_tokenizer)  # put back afterwards
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = f"actor_rollout_ref.model.path={folder}"
    worker = RewardWorker.__new__(RewardWorker)
    worker.reward_router_address = None
    worker.config = compose(model, f"actor_rollout_ref.model.trust_remote_code={trusts}", device="cpu")
    if trusts:
        worker._init_reward_fn()
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            worker._init_reward_fn()
    assert (tmp_path / "ran").exists() == trusts


def test_a_reward_models_answer_has_what_the_agent_loop_reads(monkeypatch):
    async def compute_score_disrm(self, data):
        return {"reward_score": 1.5}

    monkeypatch.setattr(VerlWorker, "compute_score_disrm", compute_score_disrm)
    answer = asyncio.run(RewardWorker.__new__(RewardWorker).compute_score_disrm(None))
    assert answer == {"reward_score": 1.5, "reward_extra_info": {}}


def scores_of(monkeypatch, seconds: list[float], limit: float) -> list[dict]:
    """What the trainer gets for responses whose scores take so long, one after the other."""
    one_at_a_time = asyncio.Lock()

    async def compute_score(self, data):
        async with one_at_a_time:
            await asyncio.sleep(data[0])
        return {"reward_score": data[0]}

    monkeypatch.setattr(VerlWorker, "compute_score", compute_score)
    worker = RewardWorker.__new__(RewardWorker)
    reward = {"custom_reward_function": {"path": None}, "reward_model": {"enable": True}}
    worker.config = OmegaConf.create({"algorithm": {"reward_timeout_s": limit}, "reward": reward})
    return asyncio.run(worker.compute_score_batch(seconds))


def test_a_reward_model_in_the_trainers_pool_that_does_not_answer_is_given_up(monkeypatch):
    with pytest.raises(
        RewardError, match=r"the reward model did not return within algorithm.reward_timeout_s=0.2 s for the responses"
    ):
        scores_of(monkeypatch, [0.01, 60.0, 0.01], limit=0.2)


def test_a_batch_of_responses_may_take_longer_than_one(monkeypatch):
    seconds = [0.02] * 20
    assert [score["reward_score"] for score in scores_of(monkeypatch, seconds, limit=0.2)] == seconds
