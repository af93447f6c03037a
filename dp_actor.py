"""The DPO update of the actor: optimizer steps over rows of prompts with their responses (engine/rows.py)."""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.metric.utils import AggregationType, Metric
from verl.workers.engine_workers import TrainingWorker

from recipe.spin.core_algos import (
    LOSSES,
    LossOptions,
    compute_online_dpo_loss,
    implicit_rewards,
    length_desensitized_logps,
)
from recipe.spin.engine.plan import MiniBatch
from recipe.spin.engine.row_engine import SeparateEngine, SharedPromptEngine
from recipe.spin.engine.rows import pad_parts, row_lists


@dataclass(frozen=True)
class DPOSettings:
    """The loss of one training step; beta may follow a schedule, so it travels with the batch."""

    beta: float
    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    reference_free: bool = False
    average_log_prob: bool = False
    discopop_tau: float = 0.2
    options: LossOptions = LossOptions()

    @property
    def batch_coupled(self) -> bool:
        """Whether a pair's loss depends on all pairs of its mini-batch."""
        return any(LOSSES[name].batch_coupled for name in self.loss_type)


class RowWorker(TrainingWorker):
    """verl's training worker on rows; share_prompt chooses between the engines of row_engine.py.

    With keep_products recomputation of activations leaves out what takes long (engine/recompute.py).
    """

    def __init__(self, config, share_prompt: bool = True, keep_products: bool = False):
        engine = SharedPromptEngine if share_prompt else SeparateEngine
        super().__init__(replace(config, model_type=engine.MODEL_TYPE))
        self.engine.keeps_products = keep_products

    def response_logps(self, data: TensorDict) -> TensorDict | None:
        """`logps` of the rows' responses, an entry a response, and with `calculate_token_logps` `token_logps`, an entry
        a response token; None on a rank that holds a copy of another's output."""
        tu.assign_non_tensor(data, compute_loss=False)
        if not self.engine_config.use_dynamic_bsz:
            rows = largest_divisor(len(data), self.engine_config.infer_micro_batch_size_per_gpu)
            tu.assign_non_tensor(data, micro_batch_size_per_gpu=rows)
        output = self.infer_batch(data)
        if output is None:
            return None
        names = [name for name in ("logps", "token_logps") if name in output]
        return TensorDict({name: tu.get(output, name) for name in names}, batch_size=len(data))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`: equal micro-batches without padding."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


class DataParallelPPOActor(RowWorker):
    """RowWorker with the DPO update as its policy update."""

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """Runs one optimizer step per mini-batch and epoch over this rank's rows.

        Besides rows `data` carries `ref_logps` (an entry a response; none where the reference is the policy), with
        ld_alpha `ref_token_logps` (likewise, an entry a response token), and for the whole batch `dpo` (DPOSettings),
        `mini_batches` (list of MiniBatch, this rank's share) and `epochs`.
        Returns the metrics, each a list with one value per optimizer step that was taken, and `skipped`: per step
        whether it was skipped, because its loss or its gradient was not finite. Then nothing has changed.
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
                    average_log_prob=settings.average_log_prob,
                    calculate_wpo_weights=settings.options.use_weighting,
                    first_step=index == 0,
                    update_lr_scheduler=index == len(steps) - 1,
                    disable_auto_offload=True,
                )
                tu.assign_non_tensor_data(rows, "global_token_num", self._token_counts(rows))
                if mini_batch.rows_per_micro_batch:
                    tu.assign_non_tensor(rows, micro_batch_size_per_gpu=mini_batch.rows_per_micro_batch)
                if settings.batch_coupled:
                    self._attach_coupled_gradients(rows, settings)
                lr = self.engine.optimizer.param_groups[0]["lr"]  # verl reports the next step's
                self._collect(metrics, self.train_batch(rows), lr)
        return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": metrics}).cpu() if metrics else None

    def _attach_coupled_gradients(self, rows: TensorDict, settings: DPOSettings) -> None:
        """For a loss that couples all pairs of a mini-batch: its gradient by each log-prob, from a pass of its own.

        The mini-batch's pairs are gathered over the ranks, the loss is differentiated by their log-probs, and each
        micro-batch then only has to propagate its part of that gradient.
        """
        data = rows.copy()
        tu.assign_non_tensor(data, calculate_entropy=False)
        pairs = pairs_of(data.cpu(), self.response_logps(data))
        table = torch.stack([*pairs.logps, *pairs.ref_logps, *pairs.lengths, pairs.weight])  # (7, P)
        gathered = gather_columns(table, self.engine.get_data_parallel_group())
        gradient, losses = coupled_gradient(torch.cat(gathered, dim=1), settings)  # (2, all P), (all P,)
        start = sum(part.shape[1] for part in gathered[: self.engine.get_data_parallel_rank()])
        mine = slice(start, start + len(pairs.weight))
        bounds = rows["pair_weight"].offsets().cpu()
        for name, values in (
            ("chosen_gradient", gradient[0, mine]),
            ("rejected_gradient", gradient[1, mine]),
            ("coupled_loss", losses[mine]),
        ):
            rows[name] = torch.nested.nested_tensor_from_jagged(values, bounds)

    def _token_counts(self, rows: TensorDict) -> list[int]:
        """Tokens of all rows of the mini-batch over all ranks; verl's FLOPS counter wants them."""
        lengths = rows["input_ids"].offsets().diff()[None].to(self.device_name)
        return torch.cat(gather_columns(lengths, self.engine.get_data_parallel_group()), dim=1)[0].tolist()

    def _collect(self, metrics: dict[str, list], output: TensorDict | None, lr: float) -> None:
        if output is None:  # a rank that holds a copy of another's output (sequence parallelism)
            return
        found = tu.get(output, "metrics") | {"lr": lr}
        skipped = not math.isfinite(found["grad_norm"])  # of all ranks' gradients
        metrics.setdefault("skipped", []).append(skipped)
        for name, value in found.items() if not skipped else ():
            if isinstance(value, list) and isinstance(value[0], Metric):  # one Metric a rank
                value = Metric.aggregate_dp(value)
            elif isinstance(value, Metric):
                value = value.aggregate()
            metrics.setdefault(name, []).append(value)


def gather_columns(table: torch.Tensor, group) -> list[torch.Tensor]:
    """The tables (K, P_rank) of a group's ranks, in their order; P may differ."""
    ranks = torch.distributed.get_world_size(group)
    if ranks == 1:
        return [table]
    counts = [torch.zeros(1, dtype=torch.long, device=table.device) for _ in range(ranks)]
    torch.distributed.all_gather(counts, torch.tensor([table.shape[1]], device=table.device), group)
    counts = [int(count) for count in counts]
    padded = torch.nn.functional.pad(table, (0, max(counts) - table.shape[1])).contiguous()
    tables = [torch.empty_like(padded) for _ in range(ranks)]
    torch.distributed.all_gather(tables, padded, group)
    return [one[:, :count] for one, count in zip(tables, counts, strict=True)]


def split_mini_batches(data: TensorDict, mini_batches: list[MiniBatch]) -> Iterator[tuple[TensorDict, MiniBatch]]:
    """Cuts a rank's rows into its mini-batches, in order.

    Raises:
        ValueError: when the rows are not exactly those that the mini-batches name.
    """
    expected = sum(mini_batch.rows_per_rank for mini_batch in mini_batches)
    if len(data) != expected:
        raise ValueError(f"this rank holds {len(data)} rows, but its mini-batches name {expected}")
    start = 0
    for mini_batch in mini_batches:
        stop = start + mini_batch.rows_per_rank
        yield tu.index_select_tensor_dict(data, list(range(start, stop))), mini_batch
        start = stop


@dataclass(frozen=True)
class Pairs:
    """The P pairs of some rows; what is (2, P) holds the chosen responses' values and the rejected ones'."""

    logps: torch.Tensor  # (2, P)
    ref_logps: torch.Tensor  # (2, P)
    lengths: torch.Tensor  # (2, P) tokens that count
    weight: torch.Tensor  # (P,)
    index: torch.Tensor  # (2, P) numbers of the responses among those of the rows
    compared: tuple[torch.Tensor, torch.Tensor]  # (2, P) each: of policy and reference what the loss looks at
    wpo_weight: torch.Tensor | None = None  # (P,)


def pairs_of(data: TensorDict, output: Mapping[str, torch.Tensor], ld_alpha: float | None = None) -> Pairs:
    """The pairs of rows for which RowEngine gave this output of the policy."""
    responses = [lengths for _, *lengths in row_lists(data["segments"])]
    lengths = [length for row in responses for length in row]
    mask = pad_parts(data["loss_mask"].values(), lengths)  # (N, T)
    first = torch.tensor([0, *map(len, responses[:-1])], device=mask.device).cumsum(0)
    index = torch.stack([data[name].values() for name in ("chosen", "rejected")])
    index = index + first.repeat_interleave(data["chosen"].offsets().diff())
    logps, ref_logps = compared = tuple(values[index] for values in _of_both(data, output, "logps"))
    counted = mask.sum(-1)[index]
    if ld_alpha is not None:
        tokens = (pad_parts(values, lengths) for values in _of_both(data, output, "token_logps"))
        compared = tuple(_length_desensitized(values, mask, index, ld_alpha) for values in tokens)
    weights = output["wpo_weights"].values()[index].prod(0) if "wpo_weights" in output else None
    return Pairs(logps, ref_logps, counted, data["pair_weight"].values(), index, compared, weights)


def _of_both(data: TensorDict, output: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An output of the policy's, flat, and the reference's, which is the same, detached, where it is the policy."""
    policy = output[name].values().float()
    same = tu.get(data, "mini_batch").reference_is_policy
    return policy, policy.detach() if same else data[f"ref_{name}"].values()


def _length_desensitized(token_logps: torch.Tensor, mask: torch.Tensor, index: torch.Tensor, alpha: float):
    """Log-probs (2, P) of responses `index` of tables (N, T), each in its pair: a response may stand in several."""
    shared = mask.sum(-1)[index].min(0).values.repeat(2)
    rows = index.flatten()
    return length_desensitized_logps(token_logps[rows], mask[rows], shared, alpha).view(index.shape)


def dpo_loss(model_output, data: TensorDict, dp_group=None, *, settings: DPOSettings) -> tuple[torch.Tensor, dict]:
    """DPO loss of one micro-batch, scaled so that the sum over micro-batches and ranks is the mini-batch's mean.

    Args:
        model_output: what RowEngine makes of the micro-batch.
        data: the micro-batch's rows.
        settings: see DPOSettings.

    Returns:
        The loss and metrics over pairs; both weigh a pair by its `pair_weight` (0 for copies).
    """
    mini_batch: MiniBatch = tu.get(data, "mini_batch")
    pairs = pairs_of(data, model_output, settings.options.ld_alpha)
    # FSDP averages gradients over the ranks, and verl's engine adds up those of the micro-batches.
    ranks = tu.get(data, "dp_size")
    scale = pairs.weight * (ranks / mini_batch.weight)  # (P,)
    if settings.batch_coupled:
        gradient = torch.stack([data["chosen_gradient"].values(), data["rejected_gradient"].values()])
        loss = (pairs.logps * gradient).sum() * ranks
        loss = loss + (data["coupled_loss"].values() * scale).sum() - loss.detach()
    else:
        loss = (_pair_losses(pairs, mini_batch.mean_chosen_length, settings) * scale).sum()
    if not torch.isfinite(loss):
        sys.stderr.write(  # to the worker's log, whatever libraries do to logging
            f"the DPO loss of prompts {data['prompt'].tolist()} is {loss.item()}, and their optimizer step "
            f"is skipped; log-probs of the chosen and rejected responses: {pairs.logps.tolist()}\n"
        )
        loss = loss * math.nan  # and with it every gradient on every rank, by which verl's engine skips the step
    with torch.no_grad():
        metrics = pair_metrics(pairs, scale, settings)
        if "entropy" in model_output:  # actor.calculate_entropy
            entropy = model_output["entropy"].values()[pairs.index].mean(0)
            metrics["entropy"] = Metric(AggregationType.SUM, (entropy * scale).sum())
        metrics |= _rollout_gaps(model_output, data, pairs)
    return loss, metrics


def _rollout_gaps(model_output, data: TensorDict, pairs: Pairs) -> dict[str, Metric]:
    """How far vLLM's log-probs are from the policy's, before the first step alone, and from the reference's."""
    gaps = {}
    if tu.get(data, "first_step") and "rollout_log_probs" in data:
        gap = (model_output["token_logps"].values() - data["rollout_log_probs"].values()).abs()
        gaps["rollout/logp_gap_max"] = (gap * data["loss_mask"].values()).max()
    if "opponent_logps" in data:  # self-play: vLLM plays the reference and gives the rejected responses
        gap = pairs.ref_logps[1] - data["opponent_logps"].values()[pairs.index[1]]
        gaps["rollout/opponent_gap_max"] = gap.abs().max()
    return {name: Metric(AggregationType.MAX, value) for name, value in gaps.items()}


def coupled_gradient(table: torch.Tensor, settings: DPOSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient (2, P) of a batch-coupled loss by the policy's log-probs, and the losses (P,); 0 for copies.

    table: (7, P), the log-probs, reference log-probs and lengths of Pairs and their weights.

    Raises:
        ValueError: when the pairs have different weights, of which a sorted loss knows nothing.
    """
    real = table[6] > 0
    columns = table[:, real].double()
    if len(weights := columns[6].unique()) > 1:
        raise ValueError(
            f"pairs weigh between {weights[0]:g} and {weights[-1]:g}, which a loss that sorts them "
            "(algorithm.dpo_loss_type: aot, aot_unpaired) cannot; let algorithm.preference_source give all one weight"
        )
    logps = columns[:2].clone().requires_grad_()
    reference = columns[2:4]
    pairs = Pairs(logps, reference, columns[4:6], columns[6], torch.empty(0), compared=(logps, reference))
    losses = _pair_losses(pairs, pairs.lengths[0].mean().item(), settings)
    (slope,) = torch.autograd.grad(losses.mean(), logps)
    gradient, all_losses = torch.zeros_like(table[:2]), torch.zeros_like(table[0])
    gradient[:, real] = slope.to(table.dtype)
    all_losses[real] = losses.detach().to(table.dtype)
    return gradient, all_losses


def _pair_losses(pairs: Pairs, mean_chosen_length: float, settings: DPOSettings) -> torch.Tensor:
    """Losses (P,) of pairs."""
    policy, reference = pairs.compared
    return compute_online_dpo_loss(
        *policy,
        *reference,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        loss_type=list(settings.loss_type),
        loss_weights=settings.loss_weights and list(settings.loss_weights),
        reference_free=settings.reference_free,
        chosen_lengths=pairs.lengths[0],
        rejected_lengths=pairs.lengths[1],
        mean_chosen_length=mean_chosen_length,
        whole_chosen_logps=pairs.logps[0],
        wpo_weight=pairs.wpo_weight,
        discopop_tau=settings.discopop_tau,
        options=settings.options,
        reduction="none",
    )


def pair_metrics(pairs: Pairs, scale: torch.Tensor, settings: DPOSettings) -> dict[str, Metric]:
    """Metrics of a micro-batch as shares, by scale (P,), of the mini-batch's mean over pairs; names as in TRL."""
    both = zip(*pairs.compared, strict=True)  # of the chosen responses, then of the rejected ones
    rewards_chosen, rewards_rejected = (implicit_rewards(*logps, settings.beta) for logps in both)
    divergence = pairs.logps - pairs.ref_logps
    if settings.average_log_prob:
        divergence = divergence * pairs.lengths
    values = {
        "rewards/chosen": rewards_chosen,
        "rewards/rejected": rewards_rejected,
        "rewards/margins": rewards_chosen - rewards_rejected,
        "rewards/accuracies": (rewards_chosen > rewards_rejected).float(),
        "logps/chosen": pairs.logps[0],
        "logps/rejected": pairs.logps[1],
        "kl/sequence": divergence.mean(0),
        "kl/chosen": divergence[0],
        "response_length/chosen": pairs.lengths[0].float(),
        "response_length/rejected": pairs.lengths[1].float(),
    }
    if pairs.wpo_weight is not None:
        values["pairs/wpo_weight"] = pairs.wpo_weight
    return {name: Metric(AggregationType.SUM, (value * scale).sum()) for name, value in values.items()}
