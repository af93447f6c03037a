"""core_algos in another verl trainer: DPO as an advantage in verl's own PPO trainer.

The gradient of the DPO loss is a weighted sum of the gradients of the responses' log-probs. The weights, with their
signs turned, are advantages: PPO's loss at ratio 1 then has the gradient of DPO, and everything else stays verl's.

From the checkout, on a CPU after `source verl_cpu/env.sh`:

    python -m recipe.spin.examples.preference_advantage device=cpu \
        actor_rollout_ref.model.path=MODEL data.train_files=... \
        data.val_files=... reward.custom_reward_function.path=... \
        actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent \
        actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum \
        actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0  # for the reference's log-probs
"""

import hydra
import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.engine_workers import ActorRolloutRefWorker

from recipe.spin import verl_patches
from recipe.spin.core_algos import compute_online_dpo_loss, compute_onlineDPO_pref, sequence_logps
from recipe.spin.engine.rows import nest, pad_rows
from recipe.spin.main_spin import FOLDER, TaskRunner
from recipe.spin.rollout.queue import trajectory_place
from recipe.spin.run import cluster

verl_patches.ignore_trl()
verl_patches.own_transfer_queue()
LOG_PROBS = ("old_log_probs", "ref_log_prob")


def preference_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, policy_logps: Tensor, ref_logps: Tensor, n: int, beta: float
) -> tuple[Tensor, Tensor]:
    """Advantages (B*n, T) whose PPO gradient, a mean over responses of sums over tokens, is that of the DPO loss.

    Shapes: all (B*n, T), rows i*n..i*n+n-1 answer prompt i; logps are per token. Also returns the loss, a scalar.
    """
    pairs = compute_onlineDPO_pref(token_level_rewards, response_mask, n=n)
    if not len(pairs.chosen):
        return torch.zeros_like(policy_logps), policy_logps.new_zeros(())
    logps = sequence_logps(policy_logps, response_mask).detach().requires_grad_()
    reference = sequence_logps(ref_logps, response_mask)
    loss = compute_online_dpo_loss(
        logps[pairs.chosen], logps[pairs.rejected], reference[pairs.chosen], reference[pairs.rejected], beta=beta
    )
    (gradient,) = torch.autograd.grad(loss, logps)
    return -len(logps) * gradient[:, None] * response_mask, loss.detach()


class PPOWorker(ActorRolloutRefWorker):
    """verl's own worker, in a process that has imported this file and therefore bears TRL beside it."""


class PreferenceAdvantageTrainer(PPOTrainerSync):
    """verl's PPO trainer with preferences in place of its advantage estimators."""

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        for role in {Role.ActorRollout, Role.ActorRolloutRef} & self.role_worker_mapping.keys():
            self.role_worker_mapping[role] = ray.remote(PPOWorker)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        ordered = batch.select_keys(sorted(batch.keys, key=trajectory_place))  # the responses of a prompt side by side
        names = ["response_mask", "rm_scores", *LOG_PROBS]
        data = tq.kv_batch_get(keys=ordered.keys, partition_id=batch.partition_id, select_fields=names)
        mask, rewards, policy, reference = (pad_rows(data[name]) for name in names)
        n = self.config.actor_rollout_ref.rollout.n
        advantages, loss = preference_advantages(rewards, mask, policy, reference, n, self.config.algorithm.dpo_beta)
        metrics["preference/dpo_loss"] = loss.item()
        lengths = mask.sum(-1).tolist()
        rows = [row[:length] for row, length in zip(advantages, lengths, strict=True)]
        data["advantages"] = data["returns"] = nest(rows)
        fields = data.select("advantages", "returns")
        return tq.kv_batch_put(keys=ordered.keys, partition_id=batch.partition_id, fields=fields)


class ExampleRunner(TaskRunner):
    @staticmethod
    def trainer_class(config: DictConfig) -> type:
        return PreferenceAdvantageTrainer


@hydra.main(config_path=str(FOLDER / "config"), config_name="spin_trainer", version_base=None)
def main(config: DictConfig) -> None:
    from verl.trainer.main_ppo import run_ppo

    OmegaConf.resolve(config)
    cluster.prepare(config)
    run_ppo(config, task_runner_class=ray.remote(ExampleRunner))


if __name__ == "__main__":
    # Ray pickles classes by the name of their module, which must not be __main__.
    from recipe.spin.examples.preference_advantage import main as importable_main

    importable_main()
