"""SpinTrainer: one step of online DPO with a self-play reference on verl's synchronous v1 trainer.

refresh the reference -> generate -> score -> prefer -> reference log-probs -> update -> weights to vLLM
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np
import ray
import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.debug import marked_timer
from verl.workers.rollout.replica import RolloutReplicaRegistry

from recipe.spin import run_folder, verl_patches
from recipe.spin.core_algos import PreferencePairs, beta_at, penalize_missing_eos
from recipe.spin.dpo_update import DPOUpdate
from recipe.spin.engine.rows import pad_rows
from recipe.spin.fsdp_workers import SpinWorker
from recipe.spin.preferences.source import PreferenceSource, load_source
from recipe.spin.rollout import answers, queue
from recipe.spin.rollout.agent_loop import PREFERENCE, SAMPLING_SEED, RolloutClient
from recipe.spin.rollout.buffers import OldestFirst, WholeRounds
from recipe.spin.rollout.held_out import HeldOutValidation
from recipe.spin.rollout.opponent import OpponentInVLLM
from recipe.spin.rollout.reward_worker import RewardWorker
from recipe.spin.rollout.staleness import StaleWeights
from recipe.spin.rollout.validation_metrics import History
from recipe.spin.rollout.weights import has_own_sockets

verl_patches.load_data_alone(trainer_base)

SHOWN_STEPS = 32  # the last ones, of which the console asks every few seconds
RESPONSE_FIELDS = ["prompts", "responses", "response_mask", "rollout_log_probs"]
OWN_BUFFERS = {ReplayBuffer: WholeRounds, ReplayBufferAsync: OldestFirst}


class SpinTrainer(OpponentInVLLM, StaleWeights, HeldOutValidation, PPOTrainerSync):
    """verl's synchronous trainer with preferences and the DPO update in place of advantages and PPO's."""

    def __init__(self, config):
        super().__init__(config)
        self.use_reference_policy = True
        verl_patches.use_reward_worker(RewardWorker)
        self._sends_rounds = sends_rounds(config)
        if has_own_sockets(config.actor_rollout_ref.rollout):
            RolloutReplicaRegistry.register("vllm", _load_replica)
        if self._sends_rounds:
            verl_patches.without_load_balancer()
        self.progress = {
            "doing": "loading the model into FSDP and vLLM",
            "step": 0,
            "total": 0,
            "metrics": {},
            "finished": (),
        }
        self._fetched = (0, 0)  # step, and the prompts fetched in it so far

    # ------------------------------------------------------------------ setup

    @cached_property
    def source(self) -> PreferenceSource:
        """What prefers."""
        return load_source(self.config, self.tokenizer)

    @cached_property
    def dpo(self) -> DPOUpdate:
        """What trains the actor on pairs."""
        return DPOUpdate(self.config, self.actor_rollout_wg)

    def _build_replay_buffer(self) -> ReplayBuffer:
        buffer = super()._build_replay_buffer()
        # verl tells a sampler that the config names nothing of dynamic sampling, so ours are no such: one that verl has
        # built as its own becomes ours, which have methods more and no state
        if type(buffer) in OWN_BUFFERS:
            buffer.__class__ = OWN_BUFFERS[type(buffer)]
            buffer.settle = lambda seconds: self.agent_loop_manager.settle(seconds)
            buffer.count_answering = self._count_answering
            buffer.rewards_may_fail = self.config.algorithm.reward_error == "skip"
        # verl's 2 s would be a floor under every small step. WholeRounds looks once a round, others all the time
        buffer.poll_interval = 0.05 if isinstance(buffer, WholeRounds) else 0.25
        return buffer

    def _count_answering(self) -> int:
        """How many prompts are being answered, which progress tells too."""
        self.progress["answering"] = self.agent_loop_manager.count_answering()
        return self.progress["answering"]

    def get_llm_client(self):
        if not self._sends_rounds:
            return super().get_llm_client()
        manager = self.llm_server_manager
        return manager.get_client(RolloutClient, servers=manager.server_handles)

    @property
    def actor_rollout_wg(self):
        return self._actor_rollout_wg

    @actor_rollout_wg.setter
    def actor_rollout_wg(self, workers):
        """Set just before the workers load the models. vLLM starts beside it where it measures no GPU's memory."""
        self._actor_rollout_wg = workers
        if self.config.trainer.device == "cpu":
            verl_patches.start_servers_early(self.config, workers)

    def _init_resource_pool_mgr(self):
        """Puts the recipe's worker in place of verl's; it holds the reference, unless with LoRA the actor is both."""
        super()._init_resource_pool_mgr()
        for role in (Role.ActorRollout, Role.ActorRolloutRef):
            self.role_worker_mapping.pop(role, None)
            self.mapping.pop(role, None)
        model = self.config.actor_rollout_ref.model
        role = Role.ActorRollout if model.lora_rank > 0 or model.lora_adapter_path else Role.ActorRolloutRef
        self.role_worker_mapping[role] = ray.remote(SpinWorker)
        self.mapping[role] = "global_pool"
        reward_model = self.config.reward.reward_model
        if reward_model.enable_resource_pool:  # verl would put it to sleep, and never wake it to score one response
            reward_model.rollout.free_cache_engine = False

    def _init_dataloader(self):
        """verl ends with its epochs however many steps were asked for: here the epochs follow from the steps."""
        super()._init_dataloader()
        needed = math.ceil(self.total_training_steps / self.steps_per_epoch)
        self.config.trainer.total_epochs = max(needed, self.config.trainer.total_epochs)

    def on_init_end(self):
        """After a resume the held-out prompts were answered already, and the metrics go on in a file of their own.

        Unless a kill cut that validation off, which follows the checkpoint of its step: then it comes first.
        """
        super().on_init_end()
        self.progress |= {"step": self.global_steps, "total": self.total_training_steps}
        trainer = self.config.trainer
        folder = Path(trainer.default_local_dir)
        os.environ["VERL_FILE_LOGGER_PATH"] = str(run_folder.next_metrics_file(folder, self.global_steps))
        loggers = [trainer.logger] if isinstance(trainer.logger, str) else trainer.logger or []
        trainer.logger = [*loggers, *({"file"} - set(loggers))]  # the report is made of the file
        history, _ = run_folder.read_history(folder)
        if self.global_steps > 0:
            trainer.val_before_train = trainer.val_only or self._validation_is_missing(history)
        self._without_pairs_in_a_row = _steps_without_pairs(history, self.global_steps)
        adapter = self.config.actor_rollout_ref.model.lora_adapter_path  # trained before, unlike the reference
        self.dpo.reference_equals_actor = self.global_steps == 0 and not adapter

    def _validation_is_missing(self, history: History) -> bool:
        validated = any(name.startswith("val-") for name in history.get(self.global_steps, {}))
        return self._validation_is_due() and not validated

    def _validation_is_due(self) -> bool:
        """Whether verl's loop answers the held-out prompts after this step."""
        frequency, is_last = self.config.trainer.test_freq, self.global_steps >= self.total_training_steps
        return frequency > 0 and (is_last or self.global_steps % frequency == 0)

    def fit(self, agent_loop_manager):
        with verl_patches.secrets_kept_from_loggers():
            super().fit(agent_loop_manager)

    def on_validate_begin(self):
        self.progress["doing"] = "answering the held-out prompts"

    def on_validate_end(self):
        self.progress |= {"doing": "training", "answering": 0}

    def on_train_begin(self):
        self.progress["doing"] = "training"

    # ------------------------------------------------------------------ one step

    def prepare_step(self) -> dict:
        """Refreshes the reference if it is due, and sends the step's prompts to vLLM."""
        if self._reference_is_due():
            with marked_timer("refresh_ref", self.timing_raw, color="blue"):
                self._refresh_reference()
        return super().prepare_step()

    def _reference_is_due(self) -> bool:
        frequency = self.config.trainer.ref_update_freq
        return frequency > 0 and self.global_steps % frequency == 0

    def _refresh_reference(self) -> None:
        self.dpo.refresh_reference()
        if self.source.rollout_model == "reference":
            self._push_weights("reference")

    @contextmanager
    def _phase(self, name: str, timing_raw: dict, color: str) -> Iterator[None]:
        """A part of a step, timed under its name and told by `progress`."""
        self.progress |= {"phase": name, "answering": 0}
        with marked_timer(name, timing_raw, color=color):
            yield

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        """One step of online DPO; returns the keys of all responses, which verl clears."""
        with self._phase("gen", timing_raw, color="red"):
            self.on_sample_begin()
            batch, sample_metrics = self.replay_buffer.sample(
                global_steps=self.global_steps, partition_id=queue.TRAINING, batch_size=sample_batch_size
            )
            metrics.update(sample_metrics | self._measure_staleness(batch))
            self.on_sample_end()

        if self.reward_loop_manager.reward_loop_worker_handles is None:
            with self._phase("reward", timing_raw, color="yellow"):
                batch = self._compute_reward_colocate(batch, metrics=metrics)

        with self._phase("prefer", timing_raw, color="brown"):
            rows = self._prefer(batch, metrics)

        metrics["training/reference_refreshed"] = float(self._reference_is_due())
        self._check_pairs(rows is not None)

        if rows is not None:
            with self._phase("ref", timing_raw, color="olive"):
                self.dpo.add_ref_logps(rows)
            with self._phase("update_actor", timing_raw, color="red"):
                metrics.update(self.dpo.update_actor(rows, self._beta, self.global_steps))
            self._name_logp_gap(metrics)
        else:
            self.actor_rollout_wg.advance_learning_rate()
        return batch

    def _prefer(self, batch: KVBatchMeta, metrics: dict) -> TensorDict | None:
        """Picks the pairs of the batch and lays them out; None when no prompt has a better and a worse response."""
        n = self.config.actor_rollout_ref.rollout.n
        batch = batch.select_keys(sorted(batch.keys, key=queue.trajectory_place))  # not the order of their completion
        prompts = [queue.trajectory_place(key)[0] for key in batch.keys]
        self._check_complete(prompts, n)

        fields = [*RESPONSE_FIELDS, "rm_scores", "extra_fields", *self.source.fields]
        responses = queue.read(batch.keys, batch.partition_id, fields)
        extra = responses.pop("extra_fields").tolist()
        rewards = pad_rows(responses.pop("rm_scores"))
        mask = pad_rows(responses["response_mask"])
        if self.source.scoring_model == "reference":
            scores = self._ask_reference(list(dict.fromkeys(prompts)))
            rewards.zero_()[:, 0] = torch.tensor([score.value for score in scores])
            extra = [one | {PREFERENCE: score.info} for one, score in zip(extra, scores, strict=True)]
        ended = answers.ended(responses["responses"].unbind(), self.source.end_tokens)
        if self.config.algorithm.reward_error == "skip":
            metrics["score/missing"] = answers.count_missing(rewards, extra)
        metrics.update(answers.response_metrics(rewards, mask, ended, responses, extra))
        metrics.update(self.source.metrics([one.get(PREFERENCE, {}) for one in extra]))
        penalty = self.config.algorithm.missing_eos_penalty
        if penalty:
            rewards[:, 0] = penalize_missing_eos(rewards[:, 0], ended, penalty)

        responses, pairs, prompt_of = self.source.pair(responses, rewards, mask, self.global_steps)
        pairs = PreferencePairs(*(column[pairs.weight > 0] for column in pairs))
        paired_prompts = prompt_of[pairs.rejected].unique().numel()
        metrics["pairs/used"] = pairs.chosen.numel()
        metrics["pairs/prompts_answered"] = self._fetched_now
        metrics["pairs/tie_rate"] = 1 - paired_prompts / (len(prompts) // n)
        if pairs.chosen.numel() == 0:
            return None
        metrics["pairs/score_margin"] = ((pairs.margin * pairs.weight).sum() / pairs.weight.sum()).item()
        return self.dpo.lay_out(responses, pairs, prompt_of)

    def _check_complete(self, prompts: list[str], n: int) -> None:
        uids, counts = np.unique(prompts, return_counts=True)
        if (counts != n).any() or len(uids) < self.config.data.train_batch_size:
            raise RuntimeError(
                f"step {self.global_steps}: {len(uids)} of {self.config.data.train_batch_size} prompts have responses, "
                f"{int((counts == n).sum())} of them all {n}: generating or scoring the others failed"
            )

    def _check_pairs(self, found: bool) -> None:
        """A step without a pair trains nothing; stops a run in which they follow each other."""
        limit = self.config.trainer.max_steps_without_pairs
        self._without_pairs_in_a_row = 0 if found else self._without_pairs_in_a_row + 1
        if self._without_pairs_in_a_row >= limit:
            raise RuntimeError(
                f"step {self.global_steps}: {limit} steps in a row gave no pair, as {answers.NO_PAIR} "
                f"(trainer.max_steps_without_pairs={limit}). {answers.PAIR_REMEDY}"
            )

    @property
    def _beta(self) -> float:
        """The beta of this step, which may follow a schedule."""
        beta = self.config.algorithm.dpo_beta
        return beta_at(beta, self.global_steps, self.total_training_steps, self.steps_per_epoch)

    # ------------------------------------------------------------------ around the step

    @property
    def _fetched_now(self) -> int:
        step, fetched = self._fetched
        return fetched if step == self.global_steps else 0

    def _fetch_one_gen_batch(self) -> TensorDict:
        """Numbers the prompts within a step instead of drawing random ids, so that seeds repeat, after a resume too."""
        first = self._fetched_now
        self._check_filtering(first)
        batch = super()._fetch_one_gen_batch()
        self._fetched = (self.global_steps, first + len(batch))
        uids = [f"{self.global_steps:08d}-{first + i:08d}" for i in range(len(batch))]
        uids = np.array(uids, dtype=object)
        return tu.get_tensordict({**batch, "uid": uids, SAMPLING_SEED: uids})

    def _check_filtering(self, fetched: int) -> None:
        """Stops what verl would go on with for ever: drawing prompts in place of those whose responses all tie."""
        limit = self.config.algorithm.filter_groups.max_num_gen_batches
        batch_size = self.config.data.train_batch_size
        if self.config.algorithm.filter_groups.enable and 0 < limit * batch_size <= fetched:
            raise RuntimeError(
                f"step {self.global_steps}: {fetched} prompts were answered to find {batch_size} whose responses score "
                f"differently, as many as algorithm.filter_groups.max_num_gen_batches={limit} allows. Raise it, give "
                "the reward more grades, or take prompts that are neither too hard nor too easy"
            )

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        """verl's timing and throughput; its data metrics describe advantages and returns, which do not exist here."""
        seconds = timing_raw["step"]
        tokens = sum(tag["seq_len"] for tag in batch.tags)
        metrics.update({f"timing_s/{name}": value for name, value in timing_raw.items()})
        metrics["perf/total_num_tokens"] = tokens
        metrics["perf/throughput"] = tokens / (seconds * self._get_n_gpus_for_throughput())
        metrics.update({"training/global_step": global_steps, "training/epoch": epoch})
        finished = (*self.progress["finished"][1 - SHOWN_STEPS :], (global_steps, dict(metrics)))
        self.progress |= {"step": global_steps, "phase": "", "metrics": dict(metrics), "finished": finished}

    def _save_checkpoint(self):
        """Saves as verl does, and removes old checkpoints only when the new one is complete."""
        keep = self.config.trainer.max_actor_ckpt_to_keep
        self.config.trainer.max_actor_ckpt_to_keep = None
        try:
            super()._save_checkpoint()
        finally:
            self.config.trainer.max_actor_ckpt_to_keep = keep
        run_folder.prune(Path(self.config.trainer.default_local_dir), self.global_steps, keep)


def sends_rounds(config) -> bool:
    """Whether requests go to vLLM's replicas as rounds: not to SGLang's, split engines or a router of the user's.

    A round is a step's requests; in asynchronous modes they belong to no step.
    """
    rollout = config.actor_rollout_ref.rollout
    is_sync = config.trainer.v1.trainer_mode == "sync"
    return is_sync and has_own_sockets(rollout) and not rollout.router_config_path


def _load_replica() -> type:
    from recipe.spin.rollout.server import RolloutReplica  # imports vLLM

    return RolloutReplica


def _steps_without_pairs(history: History, step: int) -> int:
    """How many steps up to this one, one after the other, had none."""
    return next(passed for passed in count() if history.get(step - passed, {}).get("pairs/used") != 0)
