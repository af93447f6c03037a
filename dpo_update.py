"""DPOUpdate: what a step does with its pairs: rows, log-probs of the reference, optimizer steps on all ranks."""

from dataclasses import replace
from functools import cached_property

import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict

from recipe.spin.core_algos import LossOptions, PreferencePairs
from recipe.spin.dp_actor import DPOSettings
from recipe.spin.engine.plan import plan_mini_batches
from recipe.spin.engine.rows import arrange, build_rows, make_rows, nest, pair_totals


class DPOUpdate:
    """Drives the workers that hold actor and reference; a step lays out its pairs, then both log-probs and updates.

    Attributes:
        workers: a worker group of SpinWorker, or what answers to its methods.
        reference_equals_actor: to the bit: as loaded, or just refreshed.
    """

    def __init__(self, config: DictConfig, workers, reference_equals_actor: bool = False):
        self.config = config
        self.workers = workers
        self.reference_equals_actor = reference_equals_actor
        self._skipped_in_a_row = 0  # optimizer steps

    @cached_property
    def _dp_size(self) -> int:
        return max(self.workers._query_dispatch_info("actor")) + 1

    def refresh_reference(self) -> None:
        """Moves the reference to the actor, or by `trainer.ref_update_alpha` towards it."""
        alpha = self.config.trainer.ref_update_alpha
        self.workers.refresh_reference(alpha)
        self.reference_equals_actor = self.reference_equals_actor or alpha == 1

    def lay_out(self, responses: TensorDict, pairs: PreferencePairs, prompt_of: torch.Tensor) -> TensorDict:
        """The rows of the pairs (engine/rows.py), arranged for ranks and optimizer steps (engine/plan.py)."""
        actor = self.config.actor_rollout_ref.actor
        rows = build_rows(responses, pairs, prompt_of)
        weights, chosen_lengths = pair_totals(rows)
        plan = plan_mini_batches(
            prompts=rows["prompt"].tolist(),
            tokens=rows["input_ids"].offsets().diff().tolist(),
            weights=weights,
            chosen_lengths=chosen_lengths,
            prompts_per_mini_batch=actor.ppo_mini_batch_size,
            dp_size=self._dp_size,
            micro_batch_rows=None if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu,
        )
        rows = arrange(rows, plan)
        tu.assign_non_tensor_data(rows, "mini_batches", plan.mini_batches)
        tu.assign_non_tensor_data(rows, "temperature", self.config.actor_rollout_ref.rollout.temperature)
        return rows

    def add_ref_logps(self, rows: TensorDict) -> None:
        """Adds the reference's log-probs of the rows' responses, except where they are the policy's own.

        While the reference equals the actor to the bit, the first optimizer step's own log-probs serve as its. LD-DPO
        weighs tokens by pair, so that it takes those of tokens too.
        """
        mini_batches = tu.pop(rows, "mini_batches")
        per_rank = sum(mini_batch.rows_per_rank for mini_batch in mini_batches)
        own = 0  # of each rank's rows, those of the first optimizer step
        if self.reference_equals_actor and self._first_step_is_untrained():
            own = mini_batches[0].rows_per_rank
            mini_batches = [replace(mini_batches[0], reference_is_policy=True), *mini_batches[1:]]
        others = [number for number in range(len(rows)) if number % per_rank >= own]
        by_token = self.config.algorithm.dpo_ld_alpha is not None
        found = {}
        if others:
            data = tu.index_select_tensor_dict(rows, others)
            average = self.config.algorithm.dpo_average_log_prob
            tu.assign_non_tensor(data, average_log_prob=average, calculate_token_logps=by_token)
            found = self.workers.compute_ref_logps(data)
        for name in ("logps", "token_logps") if by_token else ("logps",):
            values = [torch.zeros(0)] * len(rows)
            for number, one in zip(others, found[name].unbind() if others else (), strict=True):
                values[number] = one
            rows[f"ref_{name}"] = nest(values)
        tu.assign_non_tensor_data(rows, "mini_batches", mini_batches)

    def _first_step_is_untrained(self) -> bool:
        """Whether the rows of the first optimizer step meet no policy but the one before it.

        A second epoch sees them again after steps, and a batch-coupled loss takes log-probs from a pass of its own.
        """
        coupled = dpo_settings(self.config.algorithm, beta=1.0).batch_coupled
        return self.config.actor_rollout_ref.actor.ppo_epochs == 1 and not coupled

    def update_actor(self, rows: TensorDict, beta: float, step: int) -> dict[str, float]:
        """Takes the optimizer steps of training step `step`; returns their metrics, means over them.

        Raises:
            FloatingPointError: when `trainer.max_skipped_steps` optimizer steps in a row had no finite gradient.
        """
        settings = dpo_settings(self.config.algorithm, beta)
        actor = self.config.actor_rollout_ref.actor
        tu.assign_non_tensor(rows, dpo=settings, epochs=actor.ppo_epochs, calculate_entropy=actor.calculate_entropy)
        output = self.workers.update_actor(rows)
        self.reference_equals_actor = False
        metrics = tu.get(output, "metrics")
        skipped = metrics.pop("skipped")
        self._check_skipped(skipped, step)
        found = {} if all(skipped) else update_metrics(reduce_metrics(metrics), settings)
        return {"actor/skipped_steps": sum(skipped)} | found

    def _check_skipped(self, skipped: list[bool], step: int) -> None:
        """Stops a run whose optimizer steps are skipped one after the other, none of them having a finite gradient."""
        limit = self.config.trainer.max_skipped_steps
        for one in skipped:
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if one else 0
            if self._skipped_in_a_row >= limit:
                raise FloatingPointError(
                    f"step {step}: the loss or the gradient of {limit} optimizer steps in a row was not finite "
                    f"(trainer.max_skipped_steps={limit}); they were skipped. Lower "
                    "actor_rollout_ref.actor.optim.lr or check the model's weights"
                )

    def actor_logps(self, prompts: list[torch.Tensor], responses: list[torch.Tensor]) -> torch.Tensor:
        """Log-probs (N,) of N responses at temperature 1 under the actor."""
        padding = -len(prompts) % self._dp_size
        alone = [[response] for response in responses + responses[:1] * padding]
        rows = make_rows(prompts + prompts[:1] * padding, alone)
        tu.assign_non_tensor_data(rows, "temperature", 1.0)
        tu.assign_non_tensor(rows, average_log_prob=False)
        return self.workers.compute_actor_logps(rows)["logps"].values()[: len(prompts)]


def dpo_settings(algorithm: DictConfig, beta: float) -> DPOSettings:
    """The loss that the section `algorithm` asks for, with the beta of a step."""
    losses, weights = algorithm.dpo_loss_type, algorithm.dpo_loss_weights
    return DPOSettings(
        beta=beta,
        loss_type=(losses,) if isinstance(losses, str) else tuple(losses),
        loss_weights=tuple(weights) if weights else None,
        label_smoothing=algorithm.dpo_label_smoothing,
        reference_free=algorithm.dpo_reference_free,
        average_log_prob=algorithm.dpo_average_log_prob,
        discopop_tau=algorithm.dpo_discopop_tau,
        options=LossOptions.of(algorithm),
    )


def update_metrics(means: dict[str, float], settings: DPOSettings) -> dict[str, float]:
    """The metrics of an update as they are logged, with those that show likelihood and length going."""
    metrics = rename_dict({name: value for name, value in means.items() if "/" not in name}, "actor/")
    metrics |= {name: value for name, value in means.items() if "/" in name}
    chosen, rejected = metrics["response_length/chosen"], metrics["response_length/rejected"]
    metrics["kl/token"] = metrics["kl/sequence"] / ((chosen + rejected) / 2)
    metrics["logps/chosen_token"] = metrics["logps/chosen"]
    if not settings.average_log_prob:
        metrics["logps/chosen_token"] /= max(chosen, 1)
    metrics["response_length/gap"] = chosen - rejected
    metrics["actor/beta"] = settings.beta
    return metrics
