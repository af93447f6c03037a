"""verl's FSDP engine for rows: a batch holds prompts with their responses where verl's holds single sequences.

Two engines, by what a row becomes: SharedPromptEngine computes its prompt once, SeparateEngine once a response.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature

import torch
from tensordict import TensorDict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.model import convert_weight_keys
from verl.utils.torch_dtypes import PrecisionType
from verl.utils.ulysses import gather_outputs_and_unpad, ulysses_pad_and_slice_inputs
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.fsdp.utils import unfuse_moe_params

from recipe.spin.engine.adapter import AdapterCheckpointManager
from recipe.spin.engine.attention import NAME as SHARED_PROMPT_ATTENTION
from recipe.spin.engine.attention import check_model_shares_prompts
from recipe.spin.engine.logps import (
    response_values,
    response_weights,
    token_entropies,
    token_log_expected_probs,
    token_logps,
)
from recipe.spin.engine.packing import copy_prompts, pack_rows, split_copies
from recipe.spin.engine.recompute import keep_products
from recipe.spin.engine.rows import nest, row_lists


def _narrowed(weight: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """The weight in that precision where its own is wider."""
    wider = weight.is_floating_point() and weight.element_size() > precision.itemsize
    return weight.to(precision) if wider else weight


class RowEngine(FSDPEngineWithLMHead):
    """Turns rows (rows.py) into log-probs of their responses; what both engines share.

    The model's output is, per row, `logps` (an entry a response; sums over the tokens that count, or means with
    `average_log_prob`), with `calculate_entropy` `entropy` (likewise, means), with `calculate_wpo_weights`
    `wpo_weights` (likewise), and in training, or with `calculate_token_logps`, `token_logps` (an entry a response
    token).
    """

    MODEL_TYPE: str  # the engine's name in verl's registry
    keeps_products = False  # where activations are recomputed: those of matrix products and attention are not

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        model_config.model_type = "language_model"  # what verl loads; the engine's own name chose it in the registry
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def initialize(self):
        """Builds everything as verl does; with LoRA checkpoints are saved by adapter.py."""
        super().initialize()
        if self._is_lora:
            self.checkpoint_manager = AdapterCheckpointManager(
                base=self.model_config.path,
                model=self.module,
                optimizer=self.optimizer,
                lr_scheduler=self.lr_scheduler,
                processing_class=self.model_config.get_processor(),
                checkpoint_config=self.checkpoint_config,
                trust_remote_code=self.model_config.trust_remote_code,
            )

    def _build_lora_module(self, module):
        """An adapter starts from random numbers, here the same in every run."""
        with torch.random.fork_rng():
            torch.manual_seed(self.engine_config.seed)
            return super()._build_lora_module(module)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The model without its adapter, which stays trainable.

        peft freezes what it disables, and FSDP2 looks in a model's first pass for what is trainable: were that the
        reference's, gradients would be reduced and kept in the precision of arithmetic.
        """
        trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        with super().disable_adapter():
            for parameter in trainable:
                parameter.requires_grad_(True)
            yield

    @contextmanager
    def _configured(self, **changes) -> Iterator[None]:
        """verl builds a model as `engine_config` says; within, it says something else."""
        config = self.engine_config
        self.engine_config = replace(config, **changes)
        try:
            yield
        finally:
            self.engine_config = config

    def _build_module(self):
        """Loads the model in fp32 and rounds its parameters, and nothing else, to `model_dtype`.

        verl rounds the buffers too. Rotary frequencies in bf16 are off by up to a radian at position 500, and a bf16
        reference would not be the fp32 actor that it was copied from.
        """
        dtype = self.engine_config.model_dtype or ("bf16" if self.engine_config.forward_only else "fp32")
        with self._configured(model_dtype="fp32"):
            module = super()._build_module()
        if "logits_to_keep" not in signature(module.forward).parameters:  # verl has replaced that of some
            raise ValueError(
                f"{type(module).__name__}.forward takes no logits_to_keep and gives the logits of all tokens; name a "
                "model of text in actor_rollout_ref.model.path"
            )
        for parameter in module.parameters():
            parameter.data = parameter.data.to(PrecisionType.to_dtype(dtype))
        if self.keeps_products and self.model_config.enable_gradient_checkpointing:
            keep_products(module)
        return module

    def _build_fsdp_module(self, module):
        """Shards as verl does, but leaves a reference on the device unless `param_offload` asks for the host.

        What needs FSDP in any respect goes through it, so that a bf16 reference is laid out as its actor with fp32
        masters is.
        """
        if self._needs_no_fsdp(module):
            self._autocast_dtype = self._precision()
            return module.to(get_device_id())
        config = self.engine_config
        offloaded = config.forward_only and config.param_offload
        with self._configured(forward_only=offloaded):  # verl offloads whatever is forward-only
            module = super()._build_fsdp_module(module)
        if isinstance(module, FSDPModule):
            # The root (tied embeddings) ends the forward pass and begins the backward one: it is gathered once for both
            module.set_reshard_after_forward(False, recurse=False)
        return module

    def _needs_no_fsdp(self, module: torch.nn.Module) -> bool:
        """Whether a single rank keeps and computes everything in fp32: nothing to shard, gather, reduce or cast."""
        config = self.engine_config
        plain = {self._precision(), next(module.parameters()).dtype} == {torch.float32}
        offloaded = config.offload_policy or (config.forward_only and config.param_offload)
        return plain and torch.distributed.get_world_size() == 1 and not offloaded

    def _precision(self) -> torch.dtype:
        """What weights are cast to for arithmetic."""
        return PrecisionType.to_dtype((self.engine_config.mixed_precision or {}).get("param_dtype", "bf16"))

    def get_per_tensor_param(self, layered_summon=False, base_sync_done=False, **kwargs):
        """Names and tensors for vLLM, as verl gives them, and the adapter's config: weights in the precision that the
        model computes with, which is half of fp32 masters' bytes; adapters and buffers (a router's bias) as they are.
        """
        if isinstance(self.module, FSDPModule) and not self._is_lora and not self._qat_enabled:
            return self._gathered(), None
        weights, adapter = super().get_per_tensor_param(layered_summon, base_sync_done, **kwargs)
        if self._qat_enabled or (adapter is not None and base_sync_done):
            return weights, adapter
        return self._rounded(weights), adapter

    def _gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        """FSDP2's weights, which are rounded before they are gathered; verl gathers fp32, twice the bytes."""
        device, precision = get_device_id(), self._precision()

        def gather(weight: torch.Tensor) -> torch.Tensor:
            if not isinstance(weight, DTensor):  # a buffer
                return weight
            return _narrowed(weight.to(device, non_blocking=True), precision).full_tensor()

        shards = convert_weight_keys(self.module.state_dict(), self.module)
        weights = ((name, gather(shard)) for name, shard in shards.items())
        return unfuse_moe_params(weights, self.model_config.hf_config.model_type)

    def _rounded(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        precision = self._precision()
        buffers = {name.split(".")[-1] for name, _ in self.module.named_buffers()}
        for name, weight in weights:
            if name.split(".")[-1] not in buffers:
                weight = _narrowed(weight, precision)  # in its place, so that the wide one is freed
            yield name, weight

    def _build_optimizer(self, module):
        """AdamW runs fused, in one pass over the weights, which leaves them as they are laid out.

        torch's default takes ten passes on a CPU, and on a GPU makes a list of temporaries as large as the shard,
        of which memory.py's estimate knows nothing.
        """
        config = self.optimizer_config
        if (config.optimizer_impl, config.optimizer) == ("torch.optim", "AdamW"):
            asked = config.override_optimizer_config or {}
            options = {"fused": not asked.get("foreach")} | asked
            self.optimizer_config = replace(config, override_optimizer_config=options)
        return super()._build_optimizer(module)

    def _of_this_rank(self, predictors: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the places that predict response tokens those in this rank's part of a sequence, and which they are.

        Ranks that share a sequence (Ulysses) hold `tokens` of it each; places are then counted from the part's start.
        """
        if not self.use_ulysses_sp:
            return predictors, None
        start = self.ulysses_device_mesh["sp"].get_local_rank() * tokens
        mine = (predictors >= start) & (predictors < start + tokens)
        return predictors[mine] - start, mine

    def _of_all_ranks(self, values: torch.Tensor, mine: torch.Tensor | None) -> torch.Tensor:
        """Puts together what the ranks that share a sequence have computed of its response tokens."""
        if mine is None:
            return values
        whole = torch.zeros(mine.shape, dtype=values.dtype, device=values.device).masked_scatter(mine, values)
        return gather_outputs_and_unpad(whole[None], gather_dim=0).sum(0)

    def prepare_model_outputs(self, output, output_args: dict, micro_batch: TensorDict, logits_processor_func) -> dict:
        temperature = float(micro_batch["temperature"])
        labels, mine, places = output_args["labels"], output_args["mine"], output_args["places"]
        logits = output.logits.flatten(0, 1)
        if places is not None:
            logits = logits.index_select(0, places)
        mask = micro_batch["loss_mask"].values()
        responses = [lengths[1:] for lengths in row_lists(micro_batch["segments"])]
        lengths = [length for row in responses for length in row]
        model_output = {}
        if tu.get_non_tensor_data(micro_batch, "calculate_entropy", default=False):
            entropies = self._of_all_ranks(token_entropies(logits, temperature), mine)
            model_output["entropy"] = _by_row(response_values(entropies, mask, lengths, average=True), responses)
        expected = None
        if tu.get_non_tensor_data(micro_batch, "calculate_wpo_weights", default=False):
            expected = self._of_all_ranks(token_log_expected_probs(logits, temperature), mine)
        token_values = token_logps(logits, labels if mine is None else labels[mine], temperature)
        token_values = self._of_all_ranks(token_values, mine)
        if expected is not None:
            model_output["wpo_weights"] = _by_row(response_weights(token_values, expected, mask, lengths), responses)
        average = tu.get_non_tensor_data(micro_batch, "average_log_prob", default=False)
        model_output["logps"] = _by_row(response_values(token_values, mask, lengths, average), responses)
        in_training = logits_processor_func is not None
        if in_training or tu.get_non_tensor_data(micro_batch, "calculate_token_logps", default=False):
            bounds = micro_batch["loss_mask"].offsets()
            model_output["token_logps"] = torch.nested.nested_tensor_from_jagged(token_values, bounds)
        return model_output


def _by_row(values: torch.Tensor, responses: list[list[int]]) -> torch.Tensor:
    """Values of responses (N,) as a jagged tensor with an entry a row."""
    bounds = torch.tensor([0, *map(len, responses)], device=values.device).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(values, bounds)


def register(engine: type[RowEngine]) -> type[RowEngine]:
    """Enters an engine into verl's registry under its MODEL_TYPE, where verl's own stands for single sequences."""
    return EngineRegistry.register(engine.MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu"])(engine)


@register
class SharedPromptEngine(RowEngine):
    """A micro-batch is one packed sequence in which every prompt stands once (packing.py, attention.py)."""

    MODEL_TYPE = "rows_share_prompts"

    def _build_module(self):
        module = super()._build_module()
        check_model_shares_prompts(module)
        module.set_attn_implementation(SHARED_PROMPT_ATTENTION)
        return module

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict, dict]:
        packed = pack_rows(micro_batch["input_ids"], micro_batch["segments"], self.ulysses_sequence_parallel_size)
        input_ids, position_ids = packed.input_ids[None], packed.position_ids[None]
        if self.use_ulysses_sp:
            input_ids, position_ids, _ = ulysses_pad_and_slice_inputs(
                input_ids, position_ids, self.ulysses_sequence_parallel_size
            )
        predictors, mine = self._of_this_rank(packed.predictors, input_ids.shape[1])
        inputs = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": None,
            "logits_to_keep": predictors,  # only these tokens meet the vocabulary
            "visibility": packed.visibility,
        }
        return inputs, {"labels": packed.labels, "mine": mine, "places": None}


@register
class SeparateEngine(RowEngine):
    """Each response is a sequence with its own copy of the prompt, laid out and attended to as by verl."""

    MODEL_TYPE = "rows_copy_prompts"

    def forward_backward_batch(self, data: TensorDict, loss_function, forward_only: bool = False):
        """verl cuts micro-batches by the tokens of `input_ids`, so these are laid out as they are computed first."""
        data["input_ids"] = copy_prompts(data["input_ids"], data["segments"])
        return super().forward_backward_batch(data, loss_function, forward_only)

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict, dict]:
        sequences, prompts = split_copies(micro_batch["input_ids"], micro_batch["segments"])
        positions = [torch.arange(len(row), device=row.device) for row in sequences]
        batch = TensorDict({"input_ids": nest(sequences), "position_ids": nest(positions)}, batch_size=len(sequences))
        for key in ("temperature", "use_remove_padding"):
            tu.assign_non_tensor(batch, **{key: micro_batch[key]})
        inputs, _ = super().prepare_model_inputs(batch)
        labels = torch.cat([row[prompt:] for row, prompt in zip(sequences, prompts, strict=True)])
        if inputs["attention_mask"] is None:
            predictors, mine = self._of_this_rank(_packed_places(sequences, prompts), inputs["input_ids"].shape[1])
            return inputs | {"logits_to_keep": predictors}, {"labels": labels, "mine": mine, "places": None}
        # Padded: logits of the columns that predict a response token in any row, and the places in these
        first = min(prompts) - 1
        columns = torch.arange(first, inputs["input_ids"].shape[1], device=labels.device)
        places = _padded_places(sequences, prompts, first, len(columns))
        return inputs | {"logits_to_keep": columns}, {"labels": labels, "mine": None, "places": places}


def _packed_places(sequences: list[torch.Tensor], prompts: list[int]) -> torch.Tensor:
    """Where the tokens stand that predict a response token, one sequence behind the other."""
    starts = torch.tensor([0, *map(len, sequences[:-1])]).cumsum(0).tolist()
    return _places(sequences, prompts, starts)


def _padded_places(sequences: list[torch.Tensor], prompts: list[int], first: int, width: int) -> torch.Tensor:
    """The same in a table with a sequence a row, flattened, of which `width` columns from `first` on were kept."""
    return _places(sequences, prompts, [row * width - first for row in range(len(sequences))])


def _places(sequences: list[torch.Tensor], prompts: list[int], starts: list[int]) -> torch.Tensor:
    parts = zip(sequences, prompts, starts, strict=True)
    places = [torch.arange(start + prompt - 1, start + len(row) - 1) for row, prompt, start in parts]
    return torch.cat(places).to(sequences[0].device)
