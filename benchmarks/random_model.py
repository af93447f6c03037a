"""Models of random weights for benchmarks; their tokenizer is that of the tiny ones."""

from pathlib import Path

from benchmarks.tiny_models import make_tokenizer


def save_random_model(config_class: type, folder: Path, vocabulary: int, **shape) -> str:
    """Saves a model of a transformers configuration with the tiny models' tokenizer, in fp32; returns the folder."""
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    config = config_class(
        vocab_size=vocabulary,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **shape,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
