"""Tiny models with random weights, saved as Hugging Face folders, for tests and benchmarks: nothing to download."""

from functools import partial
from pathlib import Path

import torch

from recipe.spin.tools.probe_model import SPECIAL_TOKENS, chat_tokenizer

HIDDEN, HEADS = 64, 2  # heads of 32, the smallest that vLLM's CPU attention knows
ARCHITECTURES = ("llama", "qwen2", "windows")  # two layers of grouped queries each; the last sees 5 tokens back
# What the tokenizer learns its merges from, so that a prompt of the arithmetic example takes few tokens.
_CORPUS = [
    "system user assistant\n",
    "What is 12 + 34? Answer with the number only.\n",
    "What is 5 - 6? Answer with the number only.\n",
    "The answer is 789 .\n",
] * 8


def make_tokenizer(words: int = 320):
    """A byte-level BPE tokenizer: 256 bytes, merges, and the special tokens of a chat."""
    import json

    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(_CORPUS, vocab_size=words - len(SPECIAL_TOKENS), show_progress=False)
    model = json.loads(trained.to_str())["model"]
    return chat_tokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]], longest=2048)


def save_tiny_model(folder: Path, architecture: str, seed: int = 0, scale: float = 0.25) -> Path:
    """Saves a model with its tokenizer and generation config in `folder` and returns the folder.

    scale: standard deviation of the weights. At 0.25 the log-probs of random tokens spread by about 2 nats; at
    transformers' own 0.02 every token would be as likely as any other.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, MistralConfig, Qwen2Config

    tokenizer = make_tokenizer()
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "windows": partial(MistralConfig, sliding_window=5)}
    config = kinds[architecture](
        vocab_size=len(tokenizer),  # verl masks vLLM's logits beyond len(tokenizer), training does not
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=architecture == "qwen2",  # as the small ones of the family
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * scale
            # norms stay near 1, and differ, so that their gradients differ too
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
