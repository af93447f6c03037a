"""Prompts answered ahead of their steps, and weights pushed less often than every step."""

import asyncio
import json
import shutil
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from verl.workers.rollout.llm_server import LLMServerClient
from whole_runs import metrics, succeed

from benchmarks import asynchronous
from benchmarks.machine import run_missing
from recipe.spin.async_trainer import AsyncSpinTrainer, WholeAnswers
from recipe.spin.main_spin import TaskRunner
from recipe.spin.rollout import answers
from recipe.spin.rollout.agent_loop import ResumingClient
from recipe.spin.spin_trainer import SpinTrainer, sends_rounds

ASYNC = "trainer.v1.trainer_mode=colocate_async"
EVERY_2 = ["trainer.rollout_sync_freq=2", "actor_rollout_ref.rollout.free_cache_engine=False"]


# ---- what is decided -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mode", "trainer"), [("sync", SpinTrainer), ("colocate_async", AsyncSpinTrainer)])
def test_the_mode_chooses_the_trainer(mode, trainer):
    rollout = {"name": "vllm", "disaggregation": {"enabled": False}, "router_config_path": None}
    config = OmegaConf.create({"trainer": {"v1": {"trainer_mode": mode}}, "actor_rollout_ref": {"rollout": rollout}})
    assert TaskRunner.trainer_class(config) is trainer
    assert sends_rounds(config) == (mode == "sync")


@pytest.mark.parametrize(
    ("frequency", "test_freq", "pushed"),
    [(1, -1, [1, 2, 3, 4, 5, 6, 7]), (3, -1, [3, 6]), (3, 4, [3, 4, 6, 7]), (10, -1, []), (10, 5, [5, 7])],
)
def test_weights_are_pushed_when_they_are_due_and_for_held_out_prompts(frequency, test_freq, pushed):
    trainer = SpinTrainer.__new__(SpinTrainer)
    trainer.config = OmegaConf.create({"trainer": {"rollout_sync_freq": frequency, "test_freq": test_freq}})
    trainer.total_training_steps = 7
    found = []
    for trainer.global_steps in range(1, 8):
        found += [trainer.global_steps] * trainer._weights_are_due()
    assert found == pushed


def test_staleness_counts_steps_from_the_weights_that_began_a_response():
    tags = [{"min_global_steps": version, "max_global_steps": 6} for version in (6, 6, 4, 4)]
    assert answers.staleness(tags, step=7) == {"staleness/mean": 1.0, "staleness/max": 2}
    assert answers.staleness([*tags, {"min_global_steps": None}], step=7) == {}


def test_a_failed_prompt_ends_the_run():
    """verl would ask for another in its place, and so on."""
    buffer = WholeAnswers(
        trainer_mode="colocate_async",
        trainer_config=OmegaConf.create({}),
        max_off_policy_threshold=8,
        max_off_policy_strategy="drop",
        sampler_kwargs=OmegaConf.create({}),
    )
    buffer.finished_keys["train"], buffer.failure_keys["val"] = {"a"}, {"b"}
    assert not any(buffer._terminal_eviction_reasons(3, "train")) and not any(
        buffer._terminal_eviction_reasons(3, "val")
    )
    buffer.failure_keys["train"] = {"c", "d"}
    with pytest.raises(RuntimeError, match="step 3: generating or scoring failed for 2 prompts"):
        buffer._terminal_eviction_reasons(3, "train")


def test_a_response_that_goes_on_draws_other_numbers(monkeypatch):
    """Stopped after two tokens, it is asked for with them, what is left of its budget and a seed of its own."""
    asked = []

    async def generate(self, request_id, *, prompt_ids, sampling_params, **options):
        asked.append((prompt_ids, sampling_params))
        reason, tokens = ("aborted", [7, 8]) if len(asked) == 1 else ("completed", [9])
        return SimpleNamespace(
            token_ids=tokens,
            log_probs=[-1.0] * len(tokens),
            routed_experts=None,
            num_preempted=0,
            stop_reason=reason,
            extra_fields={"global_steps": len(asked)},
        )

    async def no_time(seconds):
        pass

    monkeypatch.setattr(LLMServerClient, "generate", generate)
    monkeypatch.setattr(asyncio, "sleep", no_time)
    client = ResumingClient(OmegaConf.create({}))
    params = {"max_tokens": 5, "seed": 3}
    output = asyncio.run(client.generate("r", prompt_ids=[1, 2], sampling_params=params))
    assert (output.token_ids, output.log_probs) == ([7, 8, 9], [-1.0] * 3)
    assert [output.extra_fields[name] for name in ("min_global_steps", "max_global_steps")] == [1, 2]
    assert [prompt for prompt, _ in asked] == [[1, 2], [1, 2, 7, 8]]
    assert [sampling["max_tokens"] for _, sampling in asked] == [5, 3]
    assert len({sampling["seed"] for _, sampling in asked}) == 2 and params["seed"] == 3


def test_the_benchmark_skips_runs_that_it_has_and_groups_the_others_by_arm(monkeypatch, tmp_path):
    asked = []
    line = {"staleness/mean": 1.0, "staleness/max": 2}
    monkeypatch.setattr(asynchronous, "train", lambda overrides, folder: (asked.append(overrides) or [line], None))
    monkeypatch.setattr(asynchronous, "summarize", lambda history: {"after": {"greedy": 0.5 + len(asked) / 4}})
    names = asynchronous.names_of(["sync, weights every 4 steps"], [3, 4])
    for _ in range(2):
        found = run_missing([], names, lambda name: asynchronous.run(name, tmp_path), tmp_path / "found.json", "runs")
    assert asked == [
        ["trainer.rollout_sync_freq=4", f"data.seed={n}", f"actor_rollout_ref.rollout.seed={n}"] for n in (3, 4)
    ]
    assert found[names[0]]["staleness_max"] == 2
    mean, spread = asynchronous.over_seeds(found, "sync, weights every 4 steps")["greedy"]
    assert mean == 0.875 and spread == pytest.approx(0.125 * 2**0.5)
    assert asynchronous.over_seeds(found, "sync") == {}


# ---- a run -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_an_asynchronous_run_and_its_resume(task, tiny_llama, tmp_path):
    """Weights go to vLLM at every second step: responses are stale exactly where vLLM and the policy differ.

    The first step answers two batches, each further one a batch more; a resumed run has its batch in the checkpoint.
    """
    settings = [ASYNC, *EVERY_2, "trainer.val_before_train=False"]
    run = tmp_path / "run"
    succeed(task, tiny_llama, run, *settings)
    history = metrics(run)
    steps = [history[step] for step in (1, 2, 3, 4)]
    assert [one["pairs/prompts_answered"] for one in steps] == [8, 4, 4, 4]
    assert max(one["staleness/max"] for one in steps) in (1, 2)
    for one in steps:
        assert (one["rollout/logp_gap_max"] < 1e-3) == (one["staleness/max"] == 0)
    assert all(
        ("timing_s/update_weights" in one) == (step % 2 == 0) for step, one in zip((1, 2, 3, 4), steps, strict=True)
    )
    assert "after" in json.loads((run / "summary.json").read_text())

    shutil.rmtree(run / "global_step_4")
    (run / "latest_checkpointed_iteration.txt").write_text("2")
    (run / "summary.json").unlink()
    succeed(task, tiny_llama, run, *settings, "trainer.total_training_steps=3", "trainer.test_freq=-1")
    resumed = json.loads((run / "metrics" / "from_step_00000002.jsonl").read_text().splitlines()[0])
    assert resumed["step"] == 3 and resumed["data"]["pairs/prompts_answered"] == 4
