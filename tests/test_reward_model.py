"""A reward model, served by vLLM as verl does, in place of a reward function."""

import json
from pathlib import Path

import pytest
import torch
from whole_runs import metrics, succeed

pytestmark = pytest.mark.slow

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def conversation(tokenizer, response: str, request: str = "train 0") -> list[int]:
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def reward_model(tiny_llama, tmp_path_factory) -> Path:
    """The tiny model as a sequence classifier, trained to prefer many vowels."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tiny_llama, num_labels=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(300):
        texts = ["".join(LETTERS[i] for i in torch.randint(len(LETTERS), (6,))) for _ in range(32)]
        wanted = torch.tensor([sum(letter in "aeiou" for letter in text) for text in texts], dtype=torch.float32)
        batch = tokenizer.pad({"input_ids": [conversation(tokenizer, text) for text in texts]}, return_tensors="pt")
        loss = (model(**batch).logits[:, 0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5, loss
    folder = tmp_path_factory.mktemp("reward_model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def score(reward_model: Path, request: str, response: str) -> float:
    """What transformers makes of a response with the model that vLLM serves."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([conversation(tokenizer, response, request)])).logits.item()


@pytest.mark.parametrize("pool", ["colocated", pytest.param("its own", marks=pytest.mark.long)])
def test_a_run_follows_a_reward_model(pool, task, tiny_llama, reward_model, tmp_path):
    run = tmp_path / "run"
    # Asleep, as verl would have it on a GPU, it would never score
    own = ["enable_resource_pool=True", "nnodes=1", "n_gpus_per_node=1", "rollout.free_cache_engine=True"]
    own = own if pool == "its own" else []
    succeed(
        task,
        tiny_llama,
        run,
        "reward.reward_model.enable=True",
        f"reward.reward_model.model_path={reward_model}",
        "reward.reward_model.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=20000000",
        "reward.custom_reward_function.path=null",
        *(f"reward.reward_model.{setting}" for setting in own),
        *(["ray_kwargs.ray_init.num_gpus=2"] if own else []),
        f"trainer.validation_data_dir={tmp_path}/answers",
        "trainer.total_training_steps=2",
        "trainer.ref_update_freq=0",
    )
    history = metrics(run)
    assert all(history[step]["pairs/used"] == 4 and history[step]["pairs/score_margin"] > 0.1 for step in (1, 2))
    answers = [json.loads(line) for line in (tmp_path / "answers" / "0.jsonl").read_text().splitlines()]
    for answer in answers[:8]:
        request = answer["input"].split("user\n")[1].split("\n")[0]
        assert answer["score"] == pytest.approx(score(reward_model, request, answer["output"]), abs=1e-3)
    assert len({answer["score"] for answer in answers}) > 4
