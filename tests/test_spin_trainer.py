"""What SpinTrainer decides by itself; its steps are run end to end in test_end_to_end."""

import json
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from worker_harness import compose

from recipe.spin.core_algos import PreferencePairs
from recipe.spin.dpo_update import DPOUpdate
from recipe.spin.engine.rows import nest
from recipe.spin.preferences.reward_error import RewardError
from recipe.spin.preferences.source import Pairing, PreferenceSource
from recipe.spin.rollout import answers, queue
from recipe.spin.rollout.scoring import FAULT
from recipe.spin.run import report
from recipe.spin.run_folder import TRACKER, checkpoints, tracked_step
from recipe.spin.spin_trainer import SHOWN_STEPS, SpinTrainer


@pytest.fixture
def trainer() -> SpinTrainer:
    trainer = SpinTrainer.__new__(SpinTrainer)
    trainer.global_steps, trainer.progress = 7, {}
    return trainer


def test_a_response_has_ended_if_its_last_token_says_so():
    rows = [torch.tensor(row).long() for row in ([1, 2], [2, 1], [5], [])]
    assert answers.ended(rows, {2, 5}).tolist() == [True, False, True, False]


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


def test_what_a_step_is_at_is_told_while_it_is(trainer):
    trainer.progress, timing = {"doing": "training", "answering": 3}, {}
    trainer.agent_loop_manager = types.SimpleNamespace(count_answering=lambda: 2)
    with trainer._phase("gen", timing, "red"):
        assert trainer.progress == {"doing": "training", "phase": "gen", "answering": 0}
        assert trainer._count_answering() == trainer.progress["answering"] == 2
    assert timing["gen"] >= 0


def test_rewards_are_in_the_metrics_by_their_names():
    info = [{"score": 1.0, "acc": 1.0, "brief": -2, "right": True, "why": "a"}, {"score": 0.0, "brief": -4, "why": ""}]
    assert answers.named_rewards(info) == {"reward/brief": -3.0, "reward/right": 1.0}
    numbers = [{"single": np.float32(0.5), "whole": np.int64(2), "same": np.True_}, {"same": np.False_}, {}]
    assert answers.named_rewards(numbers) == {"reward/same": 0.5, "reward/single": 0.5, "reward/whole": 2.0}
    assert answers.named_rewards([{"mixed": 1.0}, {"mixed": "one"}]) == {}
    assert answers.named_rewards([{}, {}]) == {}


@pytest.mark.parametrize("own_pool", [True, False])
def test_a_reward_model_in_its_own_pool_stays_awake(trainer, own_pool):
    """verl would put it to sleep, and wake it only where it scores a whole batch, in the trainer's pool."""
    pool = f"reward.reward_model.enable_resource_pool={own_pool}"
    trainer.config = compose("reward.reward_model.enable=True", pool, "reward.reward_model.nnodes=1", device="gpu")
    trainer._init_resource_pool_mgr()
    assert trainer.config.reward.reward_model.rollout.free_cache_engine is not own_pool


@pytest.mark.parametrize(("buffer", "seconds"), [(ReplayBuffer, 0.05), (type("Sampler", (ReplayBuffer,), {}), 0.25)])
def test_a_buffer_that_asks_all_the_time_does_so_four_times_a_second(trainer, monkeypatch, buffer, seconds):
    """The recipe's own waits for the answers and asks once; thousands of keys make a question long."""
    built = buffer.__new__(buffer)
    trainer.config = OmegaConf.create({"algorithm": {"reward_error": "raise"}})
    monkeypatch.setattr(PPOTrainerSync, "_build_replay_buffer", lambda self: built)
    assert trainer._build_replay_buffer().poll_interval == seconds


@pytest.mark.parametrize(("reward_error", "may_fail"), [("raise", False), ("skip", True)])
def test_the_buffer_knows_whether_responses_can_be_without_a_score(trainer, monkeypatch, reward_error, may_fail):
    trainer.config = OmegaConf.create({"algorithm": {"reward_error": reward_error}})
    monkeypatch.setattr(PPOTrainerSync, "_build_replay_buffer", lambda self: ReplayBuffer.__new__(ReplayBuffer))
    assert trainer._build_replay_buffer().rewards_may_fail is may_fail


UPDATE = {
    "loss": [0.5],
    "logps/chosen": [-6.0],
    "kl/sequence": [2.1],
    "response_length/chosen": [12.0],
    "response_length/rejected": [9.0],
}


@pytest.fixture
def step(trainer):
    """Takes a step by the trainer's own method, in which pairs are found or not, and optimizer steps skipped or not.

    Returns the step's metrics.
    """
    limits = ("trainer.max_steps_without_pairs=2", "trainer.max_skipped_steps=3")
    trainer.config = compose("trainer.ref_update_freq=0", *limits, device="cpu")
    trainer.total_training_steps, trainer.steps_per_epoch = 12, 12
    trainer._without_pairs_in_a_row = 0
    trainer.replay_buffer = types.SimpleNamespace(sample=lambda **asked: ("the batch", {}))
    trainer.reward_loop_manager = types.SimpleNamespace(reward_loop_worker_handles=["a worker"])
    trainer.on_sample_begin = trainer.on_sample_end = lambda: None
    trainer._measure_staleness = lambda batch: {}
    trainer.dpo = DPOUpdate(trainer.config, workers=None)
    trainer.dpo.add_ref_logps = lambda rows: None

    def take(pairs: bool = True, skipped: tuple[bool, ...] = (False,)) -> dict:
        rows = TensorDict({}, batch_size=1) if pairs else None
        trainer._prefer = lambda batch, metrics: rows
        output = tu.get_tensordict({}, non_tensor_dict={"metrics": UPDATE | {"skipped": list(skipped)}})
        trainer._actor_rollout_wg = trainer.dpo.workers = types.SimpleNamespace(
            update_actor=lambda rows: output,
            advance_learning_rate=lambda: take.advanced.append(trainer.global_steps),
        )
        metrics = {}
        assert trainer._step_once(metrics, {}, sample_batch_size=4) == "the batch"
        return metrics

    take.advanced = []
    return take


@pytest.mark.parametrize(("average", "per_token"), [(False, -0.5), (True, -6.0)])
def test_metrics_that_show_likelihood_and_length_going(step, trainer, average, per_token):
    """The log-prob a token, which the mean is already, and by how much the chosen responses are longer."""
    trainer.config.algorithm.dpo_average_log_prob = average
    metrics = step()
    assert metrics["logps/chosen_token"] == per_token and metrics["logps/chosen"] == -6.0
    assert metrics["response_length/gap"] == 3.0 and metrics["kl/token"] == pytest.approx(0.2)


def test_steps_without_a_pair_in_a_row_stop_the_run(step):
    for pairs in (False, True, False):
        assert ("actor/loss" in step(pairs)) == pairs
    with pytest.raises(RuntimeError, match="step 7: 2 steps in a row gave no pair.*max_steps_without_pairs=2"):
        step(pairs=False)


def test_a_start_counts_the_steps_without_a_pair_before_it(train):
    class WithoutPairs(EmptySteps):
        def step(self, metrics, timing_raw):
            metrics["pairs/used"] = 0
            self._check_pairs(found=False)
            return super().step(metrics, timing_raw)

    train(2, WithoutPairs, max_steps_without_pairs=3)
    with pytest.raises(RuntimeError, match="step 3: 3 steps in a row gave no pair"):
        train(8, WithoutPairs, max_steps_without_pairs=3)


def test_the_learning_rate_goes_on_in_a_step_without_pairs(step):
    """An update advances its schedule by itself, skipped or not."""
    step()
    step(skipped=(True,))
    assert step.advanced == []
    step(pairs=False)
    assert step.advanced == [7]


def test_the_last_steps_are_kept_for_the_console():
    """Which asks every two seconds, and without a terminal has a line for each."""
    trainer = SpinTrainer.__new__(SpinTrainer)
    trainer.progress = {"finished": ()}
    trainer._get_n_gpus_for_throughput = lambda: 1
    for step in range(1, 2 * SHOWN_STEPS):
        trainer._compute_metrics(types.SimpleNamespace(tags=[{"seq_len": 4}]), {"score": step}, {"step": 1.0}, step, 0)
    steps = [(step, metrics["score"]) for step, metrics in trainer.progress["finished"]]
    assert steps == [(step, step) for step in range(SHOWN_STEPS, 2 * SHOWN_STEPS)]


# ---- a whole run, verl's loop with steps that do nothing -------------------------------------------------------------
class EmptySteps(SpinTrainer):
    """Trains for nothing: 3 steps an epoch, each a pair of metrics."""

    trainer_mode, prev_step_profile, parameter_sync_step = "sync", False, 1
    source, _actor_rollout_wg = PreferenceSource(None, None), None
    checkpoint_manager = types.SimpleNamespace(update_weights=lambda step: None)

    def __init__(self, config):
        self.config = config
        self.progress = {}
        self._init_dataloader()
        self.global_steps = tracked_step(Path(config.trainer.default_local_dir)) or 0
        self.validated = []
        self.on_init_end()

    def step(self, metrics, timing_raw):
        metrics["score/mean"] = 0.5
        return types.SimpleNamespace(keys=[], partition_id="train", tags=[])

    def _validate(self):
        self.validated.append(self.global_steps)
        return {"val-core/sums/acc/mean@4": self.global_steps / 10}

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        metrics["training/epoch"] = epoch

    def on_step_end(self):
        pass

    _start_profiling = _stop_profiling = _shutdown_dump_executor = on_step_end


class Killed(BaseException):
    pass


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Starts a run in tmp_path and returns its trainer when it is over."""

    def count(trainer):
        trainer.steps_per_epoch = 3
        trainer.total_training_steps = trainer.config.trainer.total_training_steps or 3

    def save(trainer):
        (Path(trainer.config.trainer.default_local_dir) / f"global_step_{trainer.global_steps}").mkdir(exist_ok=True)
        (Path(trainer.config.trainer.default_local_dir) / TRACKER).write_text(str(trainer.global_steps))

    monkeypatch.setattr(PPOTrainerSync, "_init_dataloader", count)
    monkeypatch.setattr(PPOTrainerSync, "_save_checkpoint", save)
    monkeypatch.setattr(trainer_base, "SkipManager", types.SimpleNamespace(init=id, set_step=id))
    monkeypatch.setattr(trainer_base.tq, "kv_clear", lambda **keys: None)
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "")  # set by the trainer

    def start(steps: int | None, cls=EmptySteps, **settings) -> SpinTrainer:
        settings = {
            "total_training_steps": steps,
            "total_epochs": 1,
            "default_local_dir": str(tmp_path),
            "max_actor_ckpt_to_keep": 2,
            "save_freq": 2,
            "test_freq": 100,
            "val_before_train": True,
            "val_only": False,
            "project_name": "p",
            "experiment_name": "e",
            "logger": ["file"],
        } | settings
        model = {"model": {"lora_adapter_path": None}}
        config = {"trainer": settings, "global_profiler": {"steps": None}, "actor_rollout_ref": model}
        trainer = cls(OmegaConf.create(config))
        try:
            trainer.fit(None)
        finally:
            trainer.logger.finish()
        return trainer

    return start


def summary(folder: Path) -> dict:
    return report.write(OmegaConf.create({"trainer": {"default_local_dir": str(folder)}}), 1.0, 1.0)


@pytest.mark.parametrize(("steps", "epochs", "last"), [(8, 1, 8), (None, 1, 3), (2, 5, 2)])
def test_a_run_has_the_steps_that_were_asked_for(train, tmp_path, steps, epochs, last):
    """More than its epochs hold, too: it ends with the last step's checkpoint and validation."""
    trainer = train(steps, total_epochs=epochs)
    assert trainer.validated == [0, last] and tracked_step(tmp_path) == last
    entries = map(json.loads, (tmp_path / "metrics/from_step_00000000.jsonl").read_text().splitlines())
    assert [entry["data"].get("training/epoch") for entry in entries] == [None, *(step // 3 for step in range(last))]
    assert summary(tmp_path)["steps"] == last


def test_a_beta_for_each_epoch_is_that_of_the_epoch(trainer):
    """However many epochs the steps take."""
    trainer.config = compose("algorithm.dpo_beta=[0.3,0.2]", device="cpu")
    trainer.steps_per_epoch, trainer.total_training_steps = 3, 8
    betas = []
    for trainer.global_steps in range(1, 9):
        betas.append(trainer._beta)
    assert betas == [0.3] * 3 + [0.2] * 5


class KilledInLastValidation(EmptySteps):
    def _validate(self):
        if self.global_steps == 4:
            raise Killed
        return super()._validate()


def test_a_kill_during_the_last_validation_leaves_that_to_the_next_start(train, tmp_path):
    with pytest.raises(Killed):
        train(4, KilledInLastValidation)
    assert tracked_step(tmp_path) == 4
    assert train(4).validated == [4]
    expected = {"before": {"sampled": 0.0}, "after": {"sampled": 0.4}, "steps": 4}
    assert summary(tmp_path).items() >= expected.items()
    assert train(4).validated == []  # and no later one does it again, or loses it
    assert summary(tmp_path).items() >= expected.items()


def test_a_validation_on_the_way_is_made_up_for_too(train, tmp_path):
    with pytest.raises(Killed):
        train(8, KilledInLastValidation, test_freq=4)
    assert train(8, test_freq=4).validated == [4, 8]
    assert train(8, test_freq=4, val_only=True).validated == [8]


@pytest.mark.parametrize("logger", ["console", ["console"], [], None, ["file", "console"]])
def test_metrics_always_go_to_the_file(train, tmp_path, logger):
    trainer = train(2, logger=logger)
    assert list(trainer.config.trainer.logger).count("file") == 1
    assert ("console" in trainer.config.trainer.logger) == bool(logger)
    assert summary(tmp_path)["after"] == {"sampled": 0.2}
    assert os.environ["VERL_FILE_LOGGER_PATH"].startswith(str(tmp_path))


@pytest.mark.parametrize(("keep", "left"), [(2, [4, 5]), (1, [5]), (None, [2, 4, 5]), (-1, [2, 4, 5]), (0, [2, 4, 5])])
def test_a_save_removes_old_checkpoints_as_told(train, tmp_path, keep, left):
    (tmp_path / "global_step_best").mkdir()
    trainer = train(5, max_actor_ckpt_to_keep=keep)
    assert list(checkpoints(tmp_path)) == left and (tmp_path / "global_step_best").exists()
    assert trainer.config.trainer.max_actor_ckpt_to_keep == keep


# ---------------------------------------------------------------------- rewards that fail, steps that are skipped
NAN = float("nan")


def test_metrics_of_scores_leave_out_responses_without_one(trainer):
    rewards = torch.tensor([[0.0, 1.0], [0.0, NAN], [3.0, 0.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]])
    graded = [{"reward_extra_info": {"score": value, "acc": value}} for value in (1.0, 0.0)]
    extra = [graded[0], {FAULT: "broken"}, graded[1]]
    metrics = answers.response_metrics(rewards, mask, torch.ones(3), TensorDict({}, batch_size=3), extra)
    assert metrics["score/mean"] == 2.0 and metrics["score/std"] == 1.0 and metrics["score/accuracy"] == 0.5
    assert metrics["response_length/mean"] == pytest.approx(5 / 3)
    assert answers.count_missing(rewards, extra) == 1


def test_a_reward_that_gives_no_score_at_all_stops_the_run(trainer):
    with pytest.raises(RewardError, match="no response has a score. The first: broken"):
        answers.count_missing(torch.tensor([[NAN], [NAN]]), [{FAULT: "broken"}, {FAULT: "too"}])


def test_skipped_steps_in_a_row_stop_the_run(step):
    """In a row across the trainer's steps, each of which has several of the optimizer's."""
    for skipped in ([True, True, False], [False, True], [True, False], [True, True]):
        assert step(skipped=skipped)["actor/skipped_steps"] == sum(skipped)
    with pytest.raises(FloatingPointError, match=r"step 7: .* 3 optimizer steps in a row .*max_skipped_steps=3"):
        step(skipped=[True])


# ---- a step's pairs --------------------------------------------------------------------------------------------------
class RejectsItsOwn(PreferenceSource):
    """Puts a response of its own behind each prompt's, and prefers the last prompt's first to its others."""

    weights = (0.5, 0.5)

    def pair(self, responses, rewards, mask, step) -> Pairing:
        pairs = PreferencePairs(
            torch.tensor([2, 2]), torch.tensor([3, 5]), torch.tensor([1.0, 3.0]), torch.tensor(self.weights)
        )
        return Pairing(responses, pairs, torch.tensor([0, 0, 1, 1, 0, 1]))


@pytest.fixture
def prefer(trainer, monkeypatch):
    """Lets a trainer prefer by RejectsItsOwn, with pairs of these weights: the metrics, and what is trained on."""
    laid_out = []
    trainer.config = OmegaConf.create(
        {
            "actor_rollout_ref": {"rollout": {"n": 2}},
            "data": {"train_batch_size": 2},
            "algorithm": {"reward_error": "raise", "missing_eos_penalty": None},
        }
    )
    trainer.source, trainer._fetched = RejectsItsOwn(trainer.config, None), (7, 2)
    trainer.source.end_tokens = {9}
    trainer.dpo = DPOUpdate(trainer.config, workers=None)
    monkeypatch.setattr(trainer.dpo, "lay_out", lambda responses, pairs, prompt_of: laid_out.append(pairs))
    ones = nest([torch.ones(2)] * 4)
    fetched = {name: ones for name in ("prompts", "responses", "response_mask", "rollout_log_probs", "rm_scores")}
    fetched |= {"extra_fields": NonTensorStack(*[{} for _ in range(4)])}
    monkeypatch.setattr(queue.tq, "kv_batch_get", lambda **asked: TensorDict(fetched, batch_size=4))
    keys = [f"{uid}_{number}_0" for uid in ("a", "b") for number in (0, 1)]

    def prefer(*weights: float) -> tuple[dict[str, float], list[PreferencePairs]]:
        metrics: dict[str, float] = {}
        trainer.source.weights = weights
        trainer._prefer(KVBatchMeta(keys=keys, tags=[{}] * 4, partition_id="train"), metrics)
        return metrics, laid_out

    return prefer


def test_prompts_without_a_pair_are_counted_where_a_source_adds_responses(prefer):
    metrics, _ = prefer(0.5, 0.5)
    assert metrics["pairs/tie_rate"] == 0.5 and metrics["pairs/used"] == 2


def test_pairs_to_which_a_source_gives_no_weight_are_left_out(prefer):
    """A mini-batch of them alone would have no mean."""
    metrics, [pairs] = prefer(0.0, 0.5)
    assert pairs.rejected.tolist() == [5] and pairs.weight.tolist() == [0.5] and metrics["pairs/used"] == 1


def test_the_margin_is_the_mean_over_prompts_as_that_of_other_metrics(prefer):
    assert prefer(0.75, 0.25)[0]["pairs/score_margin"] == 0.75 * 1 + 0.25 * 3


def test_a_step_whose_pairs_weigh_nothing_has_none(prefer):
    metrics, laid_out = prefer(0.0, 0.0)
    assert laid_out == [] and metrics["pairs/used"] == 0 and metrics["pairs/tie_rate"] == 1
