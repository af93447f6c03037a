"""What SPIN's own data becomes: the data's responses as the model would have given them."""

import shutil

import pytest
from transformers import AutoTokenizer, GenerationConfig
from worker_harness import compose

from recipe.spin.preferences.self_play import SelfPlaySource

# As Phi-3's: a turn ends with a token of its own, and the whole text with the tokenizer's
TWO_ENDS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
NO_END = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "stops", "end"),
    [
        (TWO_ENDS, ["<|endoftext|>", "<|im_end|>"], "<|im_end|>"),
        (TWO_ENDS, ["<|endoftext|>"], "<|endoftext|>"),  # generation goes on behind the turn's end
        (NO_END, ["<|endoftext|>", "<|im_end|>"], "<|endoftext|>"),
    ],
    ids=["of-the-turn", "goes-on", "none"],
)
def test_the_datas_response_ends_as_the_models_do(tiny_llama, tmp_path, template, stops, end):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", template
    GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(stops)).save_pretrained(folder)
    config = compose("algorithm.preference_source=self_play", f"actor_rollout_ref.model.path={folder}", device="cpu")
    tokens = SelfPlaySource(config, tokenizer)._response_tokens("seven")
    assert tokenizer.decode(tokens) == f"seven{end}"
