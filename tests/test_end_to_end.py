"""Whole runs on a tiny model: Ray, FSDP actor and reference, vLLM server, TransferQueue, weight sync, checkpoints.

A run of four steps refreshes its reference at steps 2 and 4 and saves at 2 and 4. The learning rate is so high that a
stale copy of the weights anywhere would show at once.
"""

import ipaddress
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from plain_model import load_model
from whole_runs import ROOT, Watch, fail, finish, metrics, processes, start, succeed

from benchmarks.rule_judge import RuleJudge
from recipe.spin.preferences.judge_settings import EXAMPLE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def one_rank(task, tiny_llama, tmp_path_factory) -> Path:
    """The folder of a finished run on one rank, and beside it what it printed and left."""
    run = tmp_path_factory.mktemp("one_rank") / "run"
    with Watch(run) as watch:
        process = start(task, tiny_llama, run, temporary=watch.temporary)
        output = finish(process)
        (run.parent / "output.txt").write_text(output)
        assert process.returncode == 0, output[-5000:]
        (run.parent / "left.json").write_text(json.dumps(watch.left()))
    (run.parent / "listening.json").write_text(json.dumps([sorted(watch.listening), sorted(watch.answers)]))
    return run


def test_loss_is_log_2_when_the_reference_equals_the_actor(one_rank):
    history = metrics(one_rank)
    for step in (1, 2, 4):  # as loaded; refreshed; refreshed
        assert history[step]["actor/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[3]["actor/loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert [history[step]["training/reference_refreshed"] for step in (1, 2, 3, 4)] == [0, 1, 0, 1]


def test_vllm_generates_with_the_weights_that_fsdp_trains(one_rank):
    """Both give the same log-probs to the same tokens at every step, although each update changes them much."""
    history = metrics(one_rank)
    for step in range(1, 5):
        assert history[step]["rollout/logp_gap_max"] < 1e-3
    assert abs(history[3]["kl/sequence"]) > 0.05  # what the gap would be like with the weights of the step before


def test_a_run_reports_what_it_reached(one_rank):
    summary = json.loads((one_rank / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["before"].keys() == summary["after"].keys() == {"greedy", "sampled"}
    assert all(0 <= accuracy <= 1 for part in ("before", "after") for accuracy in summary[part].values())
    assert summary["seconds"] > 0 and summary["peak_memory_gb"] > 0.5
    assert (one_rank / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    output = (one_rank.parent / "output.txt").read_text()
    assert summary["checkpoint"] in output and "held-out accuracy" in output
    assert "Traceback" not in output and len(output.replace("\r", "\n").splitlines()) < 200


def test_a_run_shows_its_steps_and_not_what_its_libraries_say(one_rank):
    output = (one_rank.parent / "output.txt").read_text()
    steps = re.findall(r"^\[spin\] step (\d) of 4, ", output, re.MULTILINE)
    assert steps == ["1", "2", "3", "4"]
    for chatter in ("Platform override", "ray init kwargs", "configuration checks passed"):
        assert chatter not in output


def test_the_checkpoint_is_the_trained_model(one_rank, tiny_llama):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = json.loads((one_rank / "summary.json").read_text())["checkpoint"]
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(folder).eos_token == AutoTokenizer.from_pretrained(tiny_llama).eos_token
    change = max((a - b).abs().max().item() for a, b in zip(trained.parameters(), loaded.parameters(), strict=True))
    assert change > 1e-3


def test_a_run_leaves_nothing_behind(one_rank):
    assert json.loads((one_rank.parent / "left.json").read_text()) == []


def test_nothing_of_a_run_listens_on_the_network(one_rank):
    """Ray's own sockets are IPv6 ones: by an IPv4 one vLLM's HTTP server, and TransferQueue's sockets, were seen."""
    found, answers = json.loads((one_rank.parent / "listening.json").read_text())
    open_to_all = [(ip, name) for ip, name in found if not ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback]
    assert open_to_all == []
    assert {"gcs_server", "raylet"} < {name for _, name in found}
    for part in ("RolloutServer", "TransferQueueController", "SimpleStorageUnit"):
        assert [name for ip, name in found if ip == "127.0.0.1" and part in name], part
    assert answers == [401]  # of vLLM's HTTP server, to who has no key


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(one_rank, task, tiny_llama, tmp_path):
    """Steps 3 and 4 after a resume at 2 are to the bit those of the run that went through: the refreshed reference, the
    optimizer, the data order and the sampling seeds all came back. A stray half-written checkpoint is not used."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(one_rank / "global_step_2", run / "global_step_2")
    shutil.copy(one_rank / "settings.yaml", run)
    (run / "latest_checkpointed_iteration.txt").write_text("2")
    (run / "global_step_3" / "actor").mkdir(parents=True)
    succeed(task, tiny_llama, run)
    assert (run / "set_aside_1" / "global_step_3").is_dir() and not (run / "global_step_3").exists()
    through, resumed = metrics(one_rank), metrics(run)
    assert sorted(resumed) == [3, 4]
    for step in (3, 4):
        for name in ("actor/loss", "score/mean", "logps/chosen", "logps/rejected", "kl/sequence", "actor/grad_norm"):
            assert resumed[step][name] == through[step][name], (step, name)


@pytest.mark.long
def test_a_last_validation_that_was_cut_off_is_made_up_for(one_rank, task, tiny_llama, tmp_path):
    """Killed behind the last checkpoint: the next start answers the held-out prompts, and trains nothing."""
    run = tmp_path / "run"
    shutil.copytree(one_rank / "global_step_4", run / "global_step_4")
    shutil.copy(one_rank / "settings.yaml", run)
    (run / "latest_checkpointed_iteration.txt").write_text("4")
    (run / "metrics").mkdir()
    name = "metrics/from_step_00000000.jsonl"
    (run / name).write_text("".join((one_rank / name).read_text().splitlines(keepends=True)[:-1]))
    succeed(task, tiny_llama, run)
    through, resumed = (json.loads((folder / "summary.json").read_text()) for folder in (one_rank, run))
    assert through["after"] and [resumed[key] for key in ("before", "after", "steps")] == [
        through[key] for key in ("before", "after", "steps")
    ]
    assert "actor/loss" not in metrics(run)[4]


def test_two_ranks_do_what_one_does(one_rank, task, tiny_llama, tmp_path):
    """With one vLLM on both; in test_gpu_profile.py each has its own."""
    together = ["trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.tensor_model_parallel_size=2"]
    succeed(task, tiny_llama, tmp_path / "run", *together, "trainer.val_before_train=False")
    one, two = metrics(one_rank), metrics(tmp_path / "run")
    for step in (1, 2, 3, 4):
        assert two[step]["rollout/logp_gap_max"] < 1e-3
        for name in ("actor/loss", "score/mean", "logps/chosen", "kl/sequence", "actor/grad_norm", "pairs/used"):
            assert two[step][name] == pytest.approx(one[step][name], rel=2e-3, abs=1e-4), (step, name)


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    """The same questions in SPIN's published format: `real` and `generated` conversations and nothing else."""
    folder = tmp_path_factory.mktemp("conversations")
    for name, size in (("train", 8), ("test", 4)):
        rows = []
        for i in range(size):
            question = {"role": "user", "content": f"{name} {i}"}
            answers = {"real": "aeiou", "generated": "never read"}
            rows.append({k: [question, {"role": "assistant", "content": v}] for k, v in answers.items()})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


def test_self_play_on_supervised_data(conversations, task, tiny_llama, tmp_path):
    """SPIN as published. Refreshes at steps 2 and 4: step 3 is the second of an iteration, in which the actor has moved
    and the opponent in vLLM has not."""
    run = tmp_path / "run"
    succeed(
        task,
        tiny_llama,
        run,
        "algorithm.preference_source=self_play",
        f"data.train_files={conversations}/train.parquet",
        f"data.val_files={conversations}/test.parquet",
        f"reward.custom_reward_function.path={ROOT}/preferences/self_play_data.py",
        "trainer.test_freq=4",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.actor.calculate_entropy=True",
    )
    history = metrics(run)
    for step in (1, 2, 3, 4):
        assert history[step]["pairs/used"] == 4 and history[step]["pairs/tie_rate"] == 0
        assert history[step]["response_length/chosen"] == 6  # the data's five letters and the end token
        assert history[step]["rollout/opponent_gap_max"] < 1e-3
        assert history[step]["actor/entropy"] > 0
    for step in (1, 2, 4):
        assert history[step]["actor/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[3]["rewards/margins"] > 0.01 and history[3]["actor/loss"] < math.log(2) - 1e-3
    before, after = history[0]["val-likelihood/response"], history[4]["val-likelihood/response"]
    assert after > before + 0.1
    assert history[4]["val-likelihood/token"] == pytest.approx(after / 6)


def results(run: Path) -> dict[int, dict]:
    """All metrics of a run that are no times or sizes of the machine's."""
    machine = ("timing_s/", "perf/", "actor/mfu")
    return {step: {k: v for k, v in entry.items() if not k.startswith(machine)} for step, entry in metrics(run).items()}


def fill_batches(task, model, run: Path, *overrides: str) -> Path:
    """Two steps in which every other prompt's responses tie."""
    run.parent.mkdir(exist_ok=True)
    fill = ["algorithm.filter_groups.enable=True", "reward.custom_reward_function.name=compute_every_other"]
    succeed(task, model, run, *fill, "trainer.total_training_steps=2", "trainer.total_epochs=50", *overrides)
    return run


@pytest.fixture(scope="module")
def adapter_run(task, tiny_llama, tmp_path_factory) -> Path:
    """Three steps with LoRA, and dynamic sampling."""
    return fill_batches(
        task,
        tiny_llama,
        tmp_path_factory.mktemp("adapter") / "run",
        "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.model.lora_alpha=16",
        "actor_rollout_ref.model.target_modules=all-linear",
        "trainer.ref_update_freq=0",
        "trainer.total_training_steps=3",
        "trainer.val_before_train=False",
    )


def test_dynamic_sampling_fills_a_batch_with_prompts_that_give_a_pair(adapter_run):
    """Every other prompt always ties, so that a batch of four takes about eight prompts."""
    history = metrics(adapter_run)
    for step in (1, 2, 3):
        assert history[step]["pairs/used"] == 4 and history[step]["pairs/tie_rate"] == 0
        replaced = history[step]["training/filter_groups/evicted_samples"]
        surplus = history[step].get("training/filter_groups/discarded_surplus_samples", 0)
        assert replaced >= 1 and history[step]["pairs/prompts_answered"] == 4 + replaced + surplus


@pytest.mark.long
def test_dynamic_sampling_draws_the_same_prompts_in_every_run(task, tiny_llama, tmp_path):
    runs = [tmp_path / name / "run" for name in ("first", "second")]
    for run in runs:
        fill_batches(task, tiny_llama, run)
    first, second = map(results, runs)
    assert any(name.startswith("val-greedy-core/") for name in first[0]) and len(first[2]) > 20
    assert first == second


@pytest.mark.long
def test_dynamic_sampling_gives_up_on_a_reward_that_always_ties(task, tiny_llama, tmp_path):
    error = fail(
        task,
        tiny_llama,
        tmp_path / "run",
        "algorithm.filter_groups.enable=True",
        "algorithm.filter_groups.max_num_gen_batches=2",
        "reward.custom_reward_function.name=compute_the_same",
        "trainer.total_epochs=50",
        "trainer.val_before_train=False",
    )
    assert "algorithm.filter_groups.max_num_gen_batches=2" in error and "8 prompts" in error


def test_judges_prefer(task, tiny_llama, tmp_path, monkeypatch):
    """A server that counts vowels, and the policy itself, whose random answers nobody can read: ties, to be outvoted.

    They take prompts alone, and say what later held-out answers are worth beside the first ones. The server wants a
    key, which reaches the processes that ask it, and stands nowhere."""

    def vowels(request: str, response: str) -> float:
        assert request.startswith("user: ")
        return sum(letter in "aeiou" for letter in response) - 0.01 * len(response)

    run = tmp_path / "run"
    files = {}
    for name, size in (("train", 8), ("val", 4)):
        files[name] = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": [{"role": "user", "content": f"{name} {number}"}]} for number in range(size)]
        files[name].write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setenv("JUDGES_KEY", "open-sesame")
    with RuleJudge(vowels, key="open-sesame") as server:
        output = succeed(
            task,
            tiny_llama,
            run,
            "algorithm.preference_source=judge",
            "algorithm.judge.api_key_env=JUDGES_KEY",
            f"algorithm.judge.servers=[{server.address},policy]",
            "algorithm.judge.max_tokens=4",
            "algorithm.judge.max_unreadable=1.0",
            "reward.custom_reward_function.path=null",
            *(f"data.{name}_files={file}" for name, file in files.items()),
            "actor_rollout_ref.rollout.max_model_len=512",
            "actor_rollout_ref.rollout.max_num_batched_tokens=4096",
            "trainer.total_training_steps=2",
        )
    history = metrics(run)
    for step in (1, 2):
        assert history[step]["pairs/used"] == 4 and history[step]["pairs/score_margin"] > 0.5
        assert history[step]["judge/unreadable_rate"] == pytest.approx(0.5, abs=0.05)
    questions = [question for question in server.questions if EXAMPLE["request"] not in question]
    assert len(questions) < len(server.questions)  # before the run too
    compared = [question for question in questions if "val " in question]  # twice each, and none with itself
    asked = sum(history[step]["judge/asked"] for step in (1, 2))
    assert asked == 2 * (len(questions) - len(compared))
    answers = [json.loads(line) for line in (run / "held_out" / "step_00000000.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and len(compared) in (2, 4, 6, 8)
    assert all(any(one["answer"] in question for one in answers) for question in compared)
    [rate] = [name for name in history[0] if name.startswith("val-greedy-core/") and "/win_rate/" in name]
    assert history[0][rate] == 0.5 and 0 <= history[2][rate] <= 1
    assert json.loads((run / "summary.json").read_text())["measure"] == "win rate"
    files = [path for path in run.rglob("*") if path.is_file()]
    assert "open-sesame" not in output and not any(b"open-sesame" in path.read_bytes() for path in files)


def test_a_source_of_ones_own_asks_the_reference_and_rewards_are_added_up(task, tiny_llama, tmp_path, monkeypatch):
    """vLLM has the reference's weights while responses are scored, and the policy's while it answers.

    The reference answers the same until it is refreshed, before step 3; then it is the policy, which was trained.
    """
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}")
    run, functions = tmp_path / "run", "+reward.custom_reward_function.reward_kwargs.functions"
    succeed(
        task,
        tiny_llama,
        run,
        "algorithm.preference_source=reference_source:ReferenceSays",
        f"reward.custom_reward_function.path={ROOT}/preferences/weighted.py",
        f"{functions}.vowels={{path: {task}/reward.py}}",
        f"{functions}.later={{path: {task}/reward.py, name: compute_later, weight: 0.5}}",
        "trainer.ref_update_freq=3",
        "trainer.total_training_steps=3",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
    )
    history = metrics(run)
    says = [history[step]["reference/says"] for step in (1, 2, 3)]
    assert says[0] == says[1] != says[2]
    for step in (1, 2, 3):
        assert history[step]["pairs/used"] == 4 and history[step]["score/mean"] > 1
        assert history[step]["reward/later"] == 7 and history[step]["reward/vowels"] != 7
        assert history[step]["rollout/logp_gap_max"] < 1e-3


def test_lora_against_the_base_model(adapter_run, tiny_llama):
    """The reference is the actor with its adapter off; vLLM generates with the adapter as trained so far."""
    history = metrics(adapter_run)
    assert history[1]["actor/loss"] == pytest.approx(math.log(2), abs=1e-6)  # an adapter starts as nothing
    for step in (2, 3):
        assert abs(history[step]["kl/sequence"]) > 0.01
        assert history[step]["rewards/margins"] != 0  # as it is to the bit where the reference is the policy
        assert history[step]["rollout/logp_gap_max"] < 1e-3
    checkpoint = Path(json.loads((adapter_run / "summary.json").read_text())["checkpoint"])
    merged = load_model(str(checkpoint))
    base = load_model(str(tiny_llama))
    adapted = PeftModel.from_pretrained(load_model(str(tiny_llama)), checkpoint.parent / "lora_adapter")
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        logits, expected, before = (model(input_ids=tokens).logits for model in (merged, adapted, base))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    assert (logits - before).abs().max() > 0.01


@pytest.mark.long
def test_the_example_of_another_trainer_trains(task, tiny_llama, tmp_path):
    """verl's PPO trainer with DPO's gradient as advantage, against a reference that stays as loaded."""
    actor = "actor_rollout_ref.actor"
    succeed(
        task,
        tiny_llama,
        tmp_path / "run",
        "actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent",
        f"{actor}.loss_agg_mode=seq-mean-token-sum",
        f"{actor}.use_kl_loss=True",
        f"{actor}.kl_loss_coef=0",
        "trainer.total_training_steps=3",
        "trainer.val_before_train=False",
        "trainer.save_freq=-1",
        program=["-m", "recipe.spin.examples.preference_advantage"],
    )
    losses = [json.loads(line)["data"]["preference/dpo_loss"] for line in (tmp_path / "verl.jsonl").open()]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert all(loss != pytest.approx(math.log(2), abs=1e-3) for loss in losses[1:])


def test_a_failing_reward_stops_the_run_with_its_cause(task, tiny_llama, tmp_path):
    run = tmp_path / "run"
    with Watch(run) as watch:
        error = fail(
            task,
            tiny_llama,
            run,
            "reward.custom_reward_function.name=compute_nothing",
            "trainer.val_before_train=False",
            temporary=watch.temporary,
        )
        assert "ZeroDivisionError" in error and "the reward of this test always fails" in error
        assert watch.left() == []


def test_sigterm_ends_a_run_and_leaves_nothing(task, tiny_llama, tmp_path):
    run = tmp_path / "run"
    with Watch(run) as watch:
        process = start(task, tiny_llama, run, "trainer.val_before_train=False", temporary=watch.temporary)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not any("VLLM" in line for line in processes(run)):
            time.sleep(1)
        assert process.poll() is None, "the run ended before it could be stopped"
        process.terminate()
        output = finish(process, timeout=90)
        assert process.returncode == 143, output[-3000:]
        assert "the same command goes on from the last checkpoint" in output
        assert watch.left() == []
