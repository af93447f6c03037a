"""Checkpoints of a model that is trained with LoRA, in formats that others read: the merged model, and the adapter."""

import os
from copy import deepcopy
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.device import get_device_name
from verl.utils.fsdp_utils import fsdp_version, get_fsdp_full_state_dict

ADAPTER = "lora_adapter"  # beside `huggingface` in a checkpoint's `actor`
MODEL_DTYPE = torch.bfloat16  # that verl writes into the configuration of every model it saves


class AdapterCheckpointManager(FSDPCheckpointManager):
    """verl's checkpoint with `huggingface` as the merged model and `lora_adapter` as the adapter.

    verl itself would save the model under peft's names, of which from_pretrained finds none. A resume takes the base
    model's weights from its own files: from a checkpoint they would come beside those that the device has of them.
    """

    should_save_hf_model = False  # by verl
    should_save_lora_only = True

    def __init__(self, *args, base: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.base = base  # path or name of the model that the adapter belongs to

    def save_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, max_ckpt_to_keep: int | None = None
    ) -> None:
        """Saves what verl does for a resume, then the adapter, and the merged model where `hf_model` is to be saved.

        Raises:
            ValueError: when a merged weight is not finite.
        """
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)
        # On a CPU FSDP1 would free what it gathered before it could be copied
        on_device = fsdp_version(self.model) == 1 and get_device_name() == "cpu"
        # Every rank gives its shards; the first gets the whole
        weights = get_fsdp_full_state_dict(self.model, offload_to_cpu=not on_device)
        if self.rank == 0:
            model = getattr(self.model, "_fsdp_wrapped_module", self.model)
            merged = Path(local_path) / "huggingface" if "hf_model" in self.checkpoint_save_contents else None
            save_adapter(model, weights, self.base, Path(local_path) / ADAPTER, merged)
        torch.distributed.barrier()


@torch.no_grad()
def save_adapter(
    model: PeftModel, weights: dict[str, torch.Tensor], base: str, adapter: Path, merged: Path | None = None
) -> None:
    """Saves the adapter of a model with these weights, and with `merged` the model with its adapter folded in.

    `weights` are emptied. The model itself stays as it is, even where it shares memory with them.

    Raises:
        ValueError: when a merged weight is not finite.
    """
    trained = model.get_base_model()
    with init_empty_weights():
        copy = type(trained)(deepcopy(trained.config))
        copy.name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
        copy = get_peft_model(copy, _without_base(model.peft_config["default"]))
    copy.load_state_dict(weights, assign=True)
    weights.clear()  # so that a weight goes when its merged successor is there
    # The vocabulary is the base model's; with "auto" peft would ask the hub about that
    copy.save_pretrained(adapter, save_embedding_layers=False)
    if merged is not None:
        _tie(copy.get_base_model())
        whole = copy.merge_and_unload(safe_merge=True)  # into new tensors, and not into those of the model in training
        whole.generation_config = deepcopy(trained.generation_config)
        tensors = whole.state_dict()
        whole.to(device="meta", dtype=MODEL_DTYPE).save_pretrained(merged, state_dict=tensors)


def _without_base(config):
    """An adapter's configuration for a model of another name, of which peft would warn."""
    config = deepcopy(config)
    config.base_model_name_or_path = None
    return config


def _tie(model: PreTrainedModel) -> None:
    """Lets the two embeddings be one again where the model has them so, as every name got a tensor of its own.

    With an adapter on one of them they differ once it is merged, and peft then says so in the configuration.
    """
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends):
        model.tie_weights()
