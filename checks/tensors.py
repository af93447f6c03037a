"""Which of a model's tensors its files lack: transformers would fill them with random numbers, and say so in a log."""

import re
from pathlib import Path

from safetensors import safe_open


def missing_tensors(folder: Path, files: list[Path], overrides: dict) -> list[str]:
    """By name; none where that cannot be told from headers, and where the files name their tensors in a way of their
    own, so that not even half of the names fit."""
    stored = [name for file in files if file.suffix == ".safetensors" for name in _names(file)]
    model = _empty_model(folder, overrides) if stored else None
    if model is None:
        return []
    expected = [name for name, _ in model.named_parameters(remove_duplicate=False)]  # buffers are computed
    found = _as_loaded(model, stored)
    for tied in model.all_tied_weights_keys.items():
        found |= set(tied) if found & set(tied) else set()
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [name for name in expected if name not in found]
    if 2 * len(missing) > len(expected):
        return []
    return [name for name in missing if not any(pattern.search(name) for pattern in ignored)]


def _names(file: Path) -> list[str]:
    with safe_open(file, "np") as weights:
        return list(weights.keys())


def _empty_model(folder: Path, overrides: dict):
    """The model without weights, as verl loads it; None where it cannot be built here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    changes = {name: value for name, value in overrides.items() if name != "attn_implementation"}  # needs its package
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **changes)
        shows = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        with torch.device("meta"), no_init_weights():
            return (AutoModelForImageTextToText if shows else AutoModelForCausalLM).from_config(config)
    except Exception:  # a model's code raises what it likes
        return None


def _as_loaded(model, stored: list[str]) -> set[str]:
    """The names in the model of what files hold, which transformers renames, splits and merges."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping, known = get_model_conversion_mapping(model), model.state_dict()
    renamings, converters = (
        [one for one in mapping if isinstance(one, kind)] for kind in (WeightRenaming, WeightConverter)
    )
    targets = {source: one.target_patterns for one in converters for source in one.source_patterns}
    found = set(stored)
    for name in stored:
        new, source = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        found |= {new, *(new.replace(targets[source][0], target) for target in targets.get(source, ()))}
    return found
