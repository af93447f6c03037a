"""A model with random weights for the doctor, with a tokenizer of bytes: nothing to download."""

from pathlib import Path

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Heads of 64 are what every attention kernel knows
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1}
# Qwen2.5-0.5B's, but for its vocabulary
HALF_BILLION = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
HALF_BILLION |= {"num_key_value_heads": 2}


def make_tokenizer():
    """Bytes, no merges, and the special tokens of a chat."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = [*bytes_to_unicode().values(), *SPECIAL_TOKENS]
    return chat_tokenizer({letter: number for number, letter in enumerate(letters)}, merges=[], longest=4096)


def chat_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, ...]], longest: int):
    """A byte-level tokenizer with the chat template; SPECIAL_TOKENS that the vocabulary lacks are put behind it.

    It is built by Qwen2's own class from vocabulary and merges alone, because transformers 5 rebuilds the tokenizer of
    a qwen2 model in that way, whatever tokenizer.json says; so it is the same for every architecture.
    """
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=longest,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_probe_model(folder: Path, **shape) -> str:
    """Saves a Qwen2 of a shape with random weights, the same every time, with its tokenizer; returns the folder.

    Of the kind that the GPU profile's own model is: vLLM 0.24 takes another model runner for a Llama.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

    tokenizer = make_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen2Config(
        vocab_size=len(tokenizer),  # verl masks vLLM's logits beyond it, training does not
        max_position_embeddings=4096,
        initializer_range=0.05,  # at transformers' 0.02 every token would be as likely as any other
        tie_word_embeddings=True,
        dtype="float32",
        **ends,
        **shape,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
