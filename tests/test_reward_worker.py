"""What differs in the recipe's reward worker from verl's."""

import asyncio
import json
import shutil
import types

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.reward_loop import reward_loop
from verl.experimental.reward_loop.reward_loop import RewardLoopManager, RewardLoopWorker
from worker_harness import compose

from recipe.spin import verl_patches
from recipe.spin.preferences import reward_error
from recipe.spin.preferences.reward_error import RewardError
from recipe.spin.rollout import reward_worker
from recipe.spin.rollout.reward_worker import RewardWorker

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


def begin(*settings: str) -> RewardWorker:
    """A worker that has loaded what it scores with."""
    worker = RewardWorker.__new__(RewardWorker)
    worker.reward_router_address = "host:1"
    worker.config = compose(*settings, device="cpu")
    worker._init_reward_fn()
    return worker


@pytest.mark.parametrize("trusts", [False, True])
@pytest.mark.parametrize("key", ["actor_rollout_ref.model.path", "reward.reward_model.model_path"])
def test_code_in_a_model_folder_runs_only_where_it_is_trusted(folder, tiny_models, tmp_path, monkeypatch, trusts, key):
    monkeypatch.setattr(reward_worker, "load_reward_manager", lambda *args, **options: None)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    paths = dict.fromkeys(("actor_rollout_ref.model.path", "reward.reward_model.model_path"), tiny_models["llama"])
    settings = [f"{name}={path}" for name, path in (paths | {key: folder}).items()]
    settings += ["reward.reward_model.enable=True", f"actor_rollout_ref.model.trust_remote_code={trusts}"]
    if trusts:
        begin(*settings)
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            begin(*settings)
    assert (tmp_path / "ran").exists() == trusts


@pytest.mark.parametrize("enable", [False, True])
def test_the_reward_manager_gets_what_verls_worker_gives_it(tiny_models, monkeypatch, enable):
    """Of verl's own loading of tokenizers nothing is left, so it is compared with verl's."""
    given = []
    for module in (reward_loop, reward_worker):
        monkeypatch.setattr(module, "hf_tokenizer", lambda path, trust_remote_code: path)
        monkeypatch.setattr(module, "load_reward_manager", lambda *args, **options: given.append((args, options)))
    llama, qwen2 = tiny_models["llama"], tiny_models["qwen2"]
    model = [f"actor_rollout_ref.model.path={llama}", f"actor_rollout_ref.model.tokenizer_path={qwen2}"]
    worker = begin(*model, f"reward.reward_model.enable={enable}", f"reward.reward_model.model_path={llama}")
    RewardLoopWorker._init_reward_fn(worker)
    assert given[0] == given[1] and given[0][0] == (worker.config, str(qwen2))
    assert given[0][1]["reward_model_tokenizer"] == (str(llama) if enable else None)


def test_verls_trainer_starts_the_recipes_workers(monkeypatch):
    monkeypatch.setattr(reward_loop, "RewardLoopWorker", RewardLoopWorker)  # put back afterwards
    monkeypatch.setattr(reward_loop, "ray", types.SimpleNamespace(remote=lambda actor: actor))
    monkeypatch.setattr(RewardLoopManager, "_init_reward_loop_workers", lambda self: None)
    verl_patches.use_reward_worker(RewardWorker)
    assert RewardLoopManager(compose(device="cpu")).reward_loop_workers_class is RewardWorker


def test_a_reward_models_answer_has_what_the_agent_loop_reads(monkeypatch):
    async def compute_score_disrm(self, data):
        return {"reward_score": 1.5}

    monkeypatch.setattr(RewardLoopWorker, "compute_score_disrm", compute_score_disrm)
    answer = asyncio.run(RewardWorker.__new__(RewardWorker).compute_score_disrm(None))
    assert answer == {"reward_score": 1.5, "reward_extra_info": {}}


def test_a_reward_model_sees_no_end_token_of_the_policys(tiny_models, monkeypatch):
    """verl takes the tokenizer's own end token off alone; a chat's turn may end in another."""
    monkeypatch.setattr(reward_worker, "load_reward_manager", lambda *args, **options: None)
    model = f"actor_rollout_ref.model.path={tiny_models['llama']}"
    worker = begin(model, "reward.reward_model.enable=True", f"reward.reward_model.model_path={tiny_models['llama']}")
    tokenizer = worker.input_tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    answer = tokenizer.encode("seven", add_special_tokens=False)
    response = torch.tensor([[*answer, tokenizer.convert_tokens_to_ids("<turn>"), tokenizer.eos_token_id, 0, 0]])
    mask = torch.tensor([[1, 1, 1] + [1] * (len(answer) + 2) + [0, 0]])
    asked = [{"role": "user", "content": "3 + 4?"}]
    data = DataProto.from_single_dict(
        {"responses": response, "attention_mask": mask, "raw_prompt": np.array([asked, None], dtype=object)[:1]}
    )
    prompt = asyncio.run(worker._preprocess_reward_inputs(data))
    chat = [*asked, {"role": "assistant", "content": "seven"}]
    assert prompt == worker.reward_model_tokenizer.apply_chat_template(chat, tokenize=False).removeprefix(
        worker.reward_model_tokenizer.bos_token or ""
    )
    assert data.batch["attention_mask"].tolist() == mask.tolist()


class HurriedLoop(asyncio.SelectorEventLoop):
    """An event loop in which whatever is waited for has come at once: its time, not the machine's, has passed."""

    def __init__(self):
        super().__init__()
        self._now, select = 0.0, self._selector.select

        def pass_time(timeout: float | None) -> list:
            self._now += timeout or 0.0
            return select(0)

        self._selector.select = pass_time

    def time(self) -> float:
        return self._now


@pytest.fixture
def hurried(monkeypatch):
    """`asyncio.run` in no time, by a clock that the limits of the reward go by too."""
    monkeypatch.setattr(asyncio.events, "new_event_loop", HurriedLoop)
    clock = types.SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr(reward_error, "time", clock)


def scores_of(monkeypatch, seconds: list[float], limit: float) -> list[dict]:
    """What the trainer gets for responses whose scores take so long, one after the other."""
    one_at_a_time = asyncio.Lock()

    async def compute_score(self, data):
        async with one_at_a_time:
            await asyncio.sleep(data[0])
        return {"reward_score": data[0]}

    monkeypatch.setattr(RewardLoopWorker, "compute_score", compute_score)
    worker = RewardWorker.__new__(RewardWorker)
    reward = {"custom_reward_function": {"path": None}, "reward_model": {"enable": True}}
    worker.config = OmegaConf.create({"algorithm": {"reward_timeout_s": limit}, "reward": reward})
    return asyncio.run(worker.compute_score_batch(seconds))


def test_a_reward_model_in_the_trainers_pool_that_does_not_answer_is_given_up(monkeypatch, hurried):
    told = r"the reward model did not return within algorithm.reward_timeout_s=10 s for the responses"
    with pytest.raises(RewardError, match=told):
        scores_of(monkeypatch, [1.0, 11.0, 1.0], limit=10.0)


def test_a_batch_of_responses_may_take_longer_than_one(monkeypatch, hurried):
    seconds = [9.0] * 20
    assert [score["reward_score"] for score in scores_of(monkeypatch, seconds, limit=10.0)] == seconds
