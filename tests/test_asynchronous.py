"""Prompts answered ahead of their steps, and weights pushed less often than every step."""

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from verl.workers.rollout.llm_server import LLMServerClient
from whole_runs import metrics, succeed

from benchmarks import asynchronous
from benchmarks.default_run import arms_with_seeds, seeded
from benchmarks.machine import run_missing
from recipe.spin.async_trainer import AsyncSpinTrainer
from recipe.spin.main_spin import TaskRunner
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


def test_staleness_counts_from_the_weights_that_began_a_response():
    trainer = SpinTrainer.__new__(SpinTrainer)
    trainer.global_steps, trainer.source = 7, SimpleNamespace(rollout_model="actor")
    versions = [(6, 6), (4, 6), (5, 5), (5, 6)]
    tags = [{"min_global_steps": first, "max_global_steps": last} for first, last in versions]
    batch = SimpleNamespace(keys=["a", "b", "c", "d"], tags=tags)
    metrics = trainer._measure_staleness(batch)
    assert metrics == {"staleness/mean": 1.0, "staleness/max": 2, "staleness/several_versions": 0.5}
    assert trainer._staleness == {"a": 0, "b": 2, "c": 1, "d": 1}
    trainer.source.rollout_model = "reference"  # old on purpose
    assert trainer._measure_staleness(batch) == {}
    tags[0]["min_global_steps"], trainer.source.rollout_model = None, "actor"
    assert trainer._measure_staleness(batch) == {}


@pytest.mark.parametrize(("stale", "name"), [(0, "rollout/logp_gap_max"), (2, "staleness/logp_gap_max")])
def test_the_gap_of_stale_responses_has_a_name_of_its_own(stale, name):
    metrics = {"rollout/logp_gap_max": 0.7, "staleness/max": stale}
    SpinTrainer._name_logp_gap(metrics)
    assert metrics == {name: 0.7, "staleness/max": stale}


def async_trainer(steps: int, **settings) -> AsyncSpinTrainer:
    trainer = AsyncSpinTrainer.__new__(AsyncSpinTrainer)
    trainer.config = OmegaConf.create(
        {
            "data": {"train_batch_size": 4},
            "trainer": {"v1": {"colocate_async": {"num_warmup_batches": settings.get("ahead", 1)}}},
            "algorithm": {"filter_groups": {"enable": True, "max_num_gen_batches": 1}},
        }
    )
    trainer.total_training_steps = steps
    return trainer


@pytest.mark.parametrize(("ahead", "asked"), [(0, [4, 4, 4]), (0.5, [6, 4, 2]), (1, [8, 4, 0]), (5, [12, 0, 0])])
def test_prompts_are_asked_ahead_and_none_for_which_no_step_is_left(monkeypatch, ahead, asked):
    trainer = async_trainer(3, ahead=ahead)
    under_way, found = 0, []
    monkeypatch.setattr("recipe.spin.async_trainer._count_tq_prompt_groups", lambda: under_way)
    trainer._add_prompts_to_generate = found.append
    for trainer.global_steps in (1, 2, 3):
        before = len(found)
        trainer._add_batch_to_generate()
        found += [0] if len(found) == before else []
        under_way += found[-1] - 4
    assert found == asked and under_way == 0


def test_a_resumed_run_sends_what_failed_again_and_clears_what_was_trained_on(monkeypatch):
    prompt = {"is_prompt": True, "status": "running"}
    finished, failed = prompt | {"status": "finished"}, prompt | {"status": "failure"}
    tags = {"1-0_0_0": {}, "1-0_1_0": {}, "1-1": prompt, "1-1_0_0": {}, "2-0": finished, "2-1": failed}

    class Queue:
        kv_list = staticmethod(lambda partition: {partition: dict(tags)})

        @staticmethod
        def kv_clear(keys, partition_id):
            for key in keys:
                del tags[key]

        @staticmethod
        def kv_batch_put(keys, partition_id, tags):
            assert (keys, tags) == (["2-1"], [failed | {"status": "pending"}])

    monkeypatch.setattr("recipe.spin.rollout.queue.tq", Queue)
    monkeypatch.setattr(SpinTrainer, "_reissue_inflight_prompts", lambda self, partition: "verl's")
    assert async_trainer(3)._reissue_inflight_prompts() == "verl's"
    assert list(tags) == ["1-1", "1-1_0_0", "2-0", "2-1"]


def test_prompts_ahead_are_not_counted_as_drawn_in_place_of_others():
    trainer = async_trainer(3)
    trainer.global_steps = 1
    trainer._check_filtering(7)
    with pytest.raises(RuntimeError, match="max_num_gen_batches=1"):
        trainer._check_filtering(8)


class Engine:
    """vLLM that knows some requests, and further ones when they come."""

    def __init__(self):
        self.output_processor = SimpleNamespace(request_states={"a-1": None})
        self.paused = []

    async def pause_generation(self, mode, clear_cache):
        self.paused.append((mode, clear_cache, sorted(self.output_processor.request_states)))


def test_a_stop_waits_for_vllm_to_have_the_requests_and_not_for_their_answers():
    from recipe.spin.rollout.server import RolloutServer  # imports vLLM

    async def run():
        server = RolloutServer.__new__(RolloutServer)
        server.node_rank, server.engine, server._passed = 0, Engine(), {"a", "b"}
        server._resume_event = asyncio.Event()
        stopping = asyncio.create_task(server.abort_all_requests())
        await asyncio.sleep(0.02)
        assert server._submission_paused and not server.engine.paused  # vLLM has not seen b yet
        server.engine.output_processor.request_states["b"] = None
        result = await asyncio.wait_for(stopping, 5)
        assert server.engine.paused == [("abort", True, ["a-1", "b"])] and result["aborted_count"] == 2

    asyncio.run(run())


def part(reason: str, tokens: list[int], version: int) -> SimpleNamespace:
    """What verl's server returns of a response, made by weights of that version."""
    return SimpleNamespace(
        token_ids=tokens,
        log_probs=[-1.0] * len(tokens),
        routed_experts=None,
        num_preempted=0,
        stop_reason=reason,
        extra_fields={"global_steps": version},
    )


def resuming_client(monkeypatch, generate) -> ResumingClient:
    """The client over a server that `generate` stands for, without verl's pauses."""

    async def no_time(seconds):
        pass

    monkeypatch.setattr(LLMServerClient, "generate", generate)
    monkeypatch.setattr(asyncio, "sleep", no_time)
    return ResumingClient(OmegaConf.create({}))


def test_a_response_that_goes_on_draws_other_numbers(monkeypatch):
    """Stopped after two tokens, it is asked for with them, what is left of its budget and a seed of its own."""
    asked = []

    async def generate(self, request_id, *, prompt_ids, sampling_params, **options):
        asked.append((prompt_ids, sampling_params))
        reason, tokens = ("aborted", [7, 8]) if len(asked) == 1 else ("completed", [9])
        return part(reason, tokens, version=len(asked))

    client = resuming_client(monkeypatch, generate)
    params = {"max_tokens": 5, "seed": 3}
    output = asyncio.run(client.generate("r", prompt_ids=[1, 2], sampling_params=params))
    assert (output.token_ids, output.log_probs) == ([7, 8, 9], [-1.0] * 3)
    assert [output.extra_fields[name] for name in ("min_global_steps", "max_global_steps")] == [1, 2]
    assert [prompt for prompt, _ in asked] == [[1, 2], [1, 2, 7, 8]]
    assert [sampling["max_tokens"] for _, sampling in asked] == [5, 3]
    assert len({sampling["seed"] for _, sampling in asked}) == 2 and params["seed"] == 3


def test_a_response_that_was_stopped_before_it_began_is_of_the_weights_that_began_it(monkeypatch):
    answers = [("aborted", [], 4), ("aborted", [7], 5), ("completed", [8], 6)]

    async def generate(self, request_id, **options):
        return part(*answers.pop(0))

    client = resuming_client(monkeypatch, generate)
    output = asyncio.run(client.generate("r", prompt_ids=[1], sampling_params={"max_tokens": 5}))
    assert output.token_ids == [7, 8]
    assert [output.extra_fields[name] for name in ("min_global_steps", "max_global_steps")] == [5, 6]


def test_the_benchmark_skips_runs_that_it_has(monkeypatch, tmp_path):
    asked = []
    line = {"staleness/mean": 1.0, "staleness/max": 2}
    monkeypatch.setattr(asynchronous, "train", lambda overrides, folder: (asked.append(overrides) or [line], None))
    monkeypatch.setattr(asynchronous, "summarize", lambda history: {"after": {"greedy": len(asked)}})
    names = arms_with_seeds(["sync, weights every 4 steps"], [3, 4])
    for _ in range(2):
        found = run_missing([], names, lambda name: asynchronous.run(name, tmp_path), tmp_path / "found.json", "runs")
    assert asked == [[*asynchronous.every(4), *seeded(seed)] for seed in (3, 4)]
    assert found[names[0]]["staleness_max"] == 2 and found[names[1]]["after"] == {"greedy": 2}


# ---- a run -----------------------------------------------------------------------------------------------------------
def trained_on(folder: Path, *steps: int) -> dict[int, list[dict]]:
    """The responses by the step that trained on them."""
    lines = {step: (folder / f"{step}.jsonl").read_text().splitlines() for step in steps}
    return {step: list(map(json.loads, found)) for step, found in lines.items()}


def expected_keys() -> list[str]:
    """Two batches of prompts in the first step, one in each but the last: those that four steps train on."""
    asked = {1: 8, 2: 4, 3: 4}
    prompts = [f"{step:08d}-{number:08d}" for step, count in asked.items() for number in range(count)]
    return sorted(f"{prompt}_{session}_0" for prompt in prompts for session in range(4))


SETTINGS = [
    *(ASYNC, *EVERY_2, "trainer.val_before_train=False", "trainer.test_freq=-1"),
    "trainer.v1.colocate_async.num_warmup_batches=1",
    # One response after the other: a step's end finds seconds of vLLM's work undone, and one response under way
    *("actor_rollout_ref.rollout.max_num_seqs=1", "data.max_response_length=64"),
]


@pytest.mark.slow
def test_an_asynchronous_run(task, tiny_llama, tmp_path):
    """Stopped responses go on, weights go to vLLM at every second step, and each prompt is trained on once.

    Responses are stale exactly where vLLM and the policy differ.
    """
    run = tmp_path / "run"
    succeed(task, tiny_llama, run, *SETTINGS, f"trainer.rollout_data_dir={tmp_path}/through")
    history = metrics(run)
    steps = [history[step] for step in (1, 2, 3, 4)]
    assert [one["pairs/prompts_answered"] for one in steps] == [8, 4, 4, 0]
    assert max(one["staleness/max"] for one in steps) in (1, 2, 3)
    assert any(one["staleness/several_versions"] > 0 for one in steps), "no response was stopped and went on"
    for one in steps:
        assert (one.get("rollout/logp_gap_max", 1.0) < 1e-3) == (one["staleness/max"] == 0)
        assert (one.get("staleness/logp_gap_max", 0.0) > 1e-3) == (one["staleness/max"] > 0)
    assert [("timing_s/update_weights" in one) for one in steps] == [False, True, False, True]
    through = trained_on(tmp_path / "through", 1, 2, 3, 4)
    assert sorted(row["uid"] for rows in through.values() for row in rows) == expected_keys()
    assert {step: max(row["staleness"] for row in rows) for step, rows in through.items()} == {
        step: history[step]["staleness/max"] for step in through
    }


@pytest.mark.long
def test_an_asynchronous_run_goes_on(task, tiny_llama, tmp_path):
    """A kill neither loses nor doubles prompts."""
    run = tmp_path / "run"
    succeed(task, tiny_llama, run, *SETTINGS, f"trainer.rollout_data_dir={tmp_path}/through")
    shutil.rmtree(run / "global_step_4")  # as a kill leaves it that comes before the second checkpoint
    (run / "latest_checkpointed_iteration.txt").write_text("2")
    (run / "summary.json").unlink()
    succeed(task, tiny_llama, run, *SETTINGS, f"trainer.rollout_data_dir={tmp_path}/resumed")
    rows = [row for rows in trained_on(tmp_path / "through", 1, 2).values() for row in rows]
    rows += [row for rows in trained_on(tmp_path / "resumed", 3, 4).values() for row in rows]
    assert sorted(row["uid"] for row in rows) == expected_keys()
