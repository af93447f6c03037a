"""The DPO update of the actor: batches of preference pairs in place of PPO's batches of responses.

A batch has 2P rows `[chosen0, rejected0, chosen1, rejected1, ...]`; `pair_batch.py` lays it out so that a pair never
leaves its rank, mini-batch or micro-batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.metric.utils import AggregationType, Metric
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.padding import no_padding_2_padding

from recipe.spin.core_algos import LOSSES, compute_online_dpo_loss, implicit_rewards, sequence_logps
from recipe.spin.pair_batch import MiniBatch, pad_rows


@dataclass(frozen=True)
class DPOSettings:
    """The loss of one training step; beta may follow a schedule, so it travels with the batch."""

    beta: float
    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    reference_free: bool = False
    average_log_prob: bool = False


class DataParallelPPOActor(TrainingWorker):
    """verl's training worker with the DPO update as its policy update."""

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """Runs one optimizer step per mini-batch and epoch over this rank's pairs.

        Besides the model's inputs `data` carries, per row, `ref_logps`, `pair_id` and `pair_weight`, and for the whole
        batch `dpo` (DPOSettings), `mini_batches` (list of MiniBatch, this rank's share in order) and `epochs`.
        Returns the metrics, each a list with one value per optimizer step.
        """
        settings: DPOSettings = tu.pop(data, "dpo")
        mini_batches: list[MiniBatch] = tu.pop(data, "mini_batches")
        epochs: int = tu.pop(data, "epochs")
        self.set_loss_fn(partial(dpo_loss, settings=settings))

        steps = list(split_mini_batches(data, mini_batches)) * epochs
        metrics: dict[str, list] = {}
        with self.engine.train_mode():
            for index, (rows, mini_batch) in enumerate(steps):
                rows = rows.copy()  # the engine writes its own entries into the batch; epochs start from a clean one
                tu.assign_non_tensor(
                    rows,
                    mini_batch=mini_batch,
                    force_group_size=2,  # verl's engine then keeps a pair within a micro-batch
                    first_step=index == 0,
                    update_lr_scheduler=index == len(steps) - 1,
                    disable_auto_offload=True,
                )
                tu.assign_non_tensor_data(rows, "global_token_num", self._token_counts(rows))
                if mini_batch.pairs_per_micro_batch:
                    tu.assign_non_tensor(rows, micro_batch_size_per_gpu=mini_batch.pairs_per_micro_batch)
                if any(LOSSES[name].batch_coupled for name in settings.loss_type):
                    self._attach_coupled_gradients(rows, settings)
                self._collect(metrics, self.train_batch(rows))
        return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": metrics}).cpu() if metrics else None

    def _attach_coupled_gradients(self, rows: TensorDict, settings: DPOSettings) -> None:
        """For a loss that couples all pairs of a mini-batch: its gradient by each log-prob, from a pass of its own.

        The mini-batch's log-probs are gathered over the ranks, the loss is differentiated by them, and each
        micro-batch then only has to propagate its part of that gradient.
        """
        data = rows.copy()
        tu.assign_non_tensor(data, compute_loss=False, calculate_entropy=False)
        token_logps = no_padding_2_padding(tu.get(self.infer_batch(data), "log_probs"), data.cpu())
        mask = pad_rows(rows["response_mask"]).cpu()
        local = torch.stack(
            [
                sequence_logps(token_logps.float(), mask, average=settings.average_log_prob),
                rows["ref_logps"].cpu(),
                mask.sum(-1).float(),
                rows["pair_weight"].cpu(),
            ]
        )  # (4, 2P)
        group = self.engine.get_data_parallel_group()
        gathered = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, local, group)
        gradient, losses = coupled_gradient(torch.cat(gathered, dim=1), settings)
        start = sum(part.shape[1] for part in gathered[: self.engine.get_data_parallel_rank()])
        rows["logp_gradient"] = gradient[start : start + len(rows)]
        rows["coupled_loss"] = losses[start : start + len(rows)]

    def _token_counts(self, rows: TensorDict) -> list[int]:
        """Lengths of all sequences of the mini-batch over all ranks; verl's FLOPS counter wants them."""
        group = self.engine.get_data_parallel_group()
        gathered = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, rows["input_ids"].offsets().diff().tolist(), group)
        return [length for rank in gathered for length in rank]

    def _collect(self, metrics: dict[str, list], output: TensorDict | None) -> None:
        if output is None:  # a rank that holds a copy of another's output (sequence parallelism)
            return
        for name, value in tu.get(output, "metrics").items():
            if isinstance(value, list) and isinstance(value[0], Metric):  # one Metric a rank
                value = Metric.aggregate_dp(value)
            elif isinstance(value, Metric):
                value = value.aggregate()
            metrics.setdefault(name, []).append(value)


def split_mini_batches(data: TensorDict, mini_batches: list[MiniBatch]) -> Iterator[tuple[TensorDict, MiniBatch]]:
    """Cuts a rank's rows into its mini-batches, in order.

    Raises:
        ValueError: when the rows are not exactly those that the mini-batches name.
    """
    expected = 2 * sum(mini_batch.pairs_per_rank for mini_batch in mini_batches)
    if len(data) != expected:
        raise ValueError(f"this rank holds {len(data)} rows, but its mini-batches name {expected}")
    start = 0
    for mini_batch in mini_batches:
        stop = start + 2 * mini_batch.pairs_per_rank
        yield tu.index_select_tensor_dict(data, list(range(start, stop))), mini_batch
        start = stop


def dpo_loss(model_output, data: TensorDict, dp_group=None, *, settings: DPOSettings) -> tuple[torch.Tensor, dict]:
    """DPO loss of one micro-batch, scaled so that the sum over micro-batches and ranks is the mini-batch's mean.

    Args:
        model_output: `log_probs`, nested, one row per sequence of the micro-batch.
        data: the micro-batch, 2P rows `[chosen0, rejected0, ...]`.
        settings: see DPOSettings.

    Returns:
        The loss and metrics over pairs; both weigh a pair by its `pair_weight` (0 for padding).

    Raises:
        ValueError: when the rows are not whole pairs.
        FloatingPointError: when the loss is not finite.
    """
    pair_id = data["pair_id"].view(-1, 2)
    if not torch.equal(pair_id[:, 0], pair_id[:, 1]):
        raise ValueError("a micro-batch holds half a pair: the rows of a batch of pairs must not be reordered")

    mini_batch: MiniBatch = tu.get(data, "mini_batch")
    mask = pad_rows(data["response_mask"])  # (2P, T)
    token_logps = no_padding_2_padding(model_output["log_probs"], data).float()  # (2P, T)
    logps = sequence_logps(token_logps, mask, average=settings.average_log_prob)
    lengths = mask.sum(-1)
    weight = data["pair_weight"].view(-1, 2)[:, 0]

    # FSDP averages gradients over the ranks, and verl's engine adds up those of the micro-batches.
    scale = weight * (tu.get(data, "dp_size") / mini_batch.weight)  # (P,)
    if "logp_gradient" in data:  # a loss that couples the pairs of a mini-batch
        loss = (logps * data["logp_gradient"]).sum() * tu.get(data, "dp_size")
        loss = loss + (data["coupled_loss"].view(-1, 2)[:, 0] * scale).sum() - loss.detach()
    else:
        losses = _pair_losses(logps, data["ref_logps"], lengths, mini_batch.mean_chosen_length, settings)
        loss = (losses * scale).sum()
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the DPO loss of pairs {pair_id[:, 0].tolist()} is {loss.item()}; log-probs of their chosen and rejected "
            f"responses: {logps.tolist()}. Lower actor_rollout_ref.actor.optim.lr or check the model's weights."
        )
    with torch.no_grad():
        metrics = pair_metrics(logps, data["ref_logps"], lengths, scale, settings)
        if "entropy" in model_output:  # actor.calculate_entropy
            entropy = sequence_logps(no_padding_2_padding(model_output["entropy"], data).float(), mask, average=True)
            metrics["entropy"] = Metric(AggregationType.SUM, (entropy.view(-1, 2).mean(1) * scale).sum())
        if tu.get(data, "first_step") and "rollout_log_probs" in data:
            gap = (token_logps - pad_rows(data["rollout_log_probs"])).abs() * mask
            metrics["rollout/logp_gap_max"] = Metric(AggregationType.MAX, gap.max())
    return loss, metrics


def coupled_gradient(table: torch.Tensor, settings: DPOSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of a batch-coupled loss by the policy's log-probs, and the losses, both per row and 0 for padding.

    table: (4, 2P) with the rows' log-probs, reference log-probs, lengths and pair weights.
    """
    real = table[3] > 0
    logps, ref_logps, lengths, _ = table[:, real].double()
    logps.requires_grad_()
    losses = _pair_losses(logps, ref_logps, lengths, lengths[0::2].mean().item(), settings)
    (gradient,) = torch.autograd.grad(losses.mean(), logps)
    output = torch.zeros(2, table.shape[1])
    output[0, real] = gradient.float()
    output[1, real] = losses.detach().float().repeat_interleave(2)
    return output[0], output[1]


def _pair_losses(logps, ref_logps, lengths, mean_chosen_length: float, settings: DPOSettings) -> torch.Tensor:
    """Losses (P,) of pairs whose rows alternate chosen and rejected (2P,)."""
    return compute_online_dpo_loss(
        logps[0::2],
        logps[1::2],
        ref_logps[0::2],
        ref_logps[1::2],
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        loss_type=list(settings.loss_type),
        loss_weights=settings.loss_weights and list(settings.loss_weights),
        reference_free=settings.reference_free,
        chosen_lengths=lengths[0::2],
        rejected_lengths=lengths[1::2],
        mean_chosen_length=mean_chosen_length,
        reduction="none",
    )


def pair_metrics(logps, ref_logps, lengths, scale, settings: DPOSettings) -> dict[str, Metric]:
    """Metrics of a micro-batch as shares of the mini-batch's mean over pairs; names as in TRL.

    Shapes: logps, ref_logps, lengths (2P,), alternating chosen and rejected; scale (P,).
    """
    rewards_chosen, rewards_rejected = implicit_rewards(logps, ref_logps, settings.beta).view(-1, 2).unbind(1)
    divergence = logps - ref_logps
    if settings.average_log_prob:
        divergence = divergence * lengths
    values = {
        "rewards/chosen": rewards_chosen,
        "rewards/rejected": rewards_rejected,
        "rewards/margins": rewards_chosen - rewards_rejected,
        "rewards/accuracies": (rewards_chosen > rewards_rejected).float(),
        "logps/chosen": logps[0::2],
        "logps/rejected": logps[1::2],
        "kl/sequence": divergence.view(-1, 2).mean(1),
        "response_length/chosen": lengths[0::2].float(),
        "response_length/rejected": lengths[1::2].float(),
    }
    return {name: Metric(AggregationType.SUM, (value * scale).sum()) for name, value in values.items()}
