"""A tiny model that can judge: it prefers what begins with an "a", and answers all else with letters by chance."""

import itertools
import random
from pathlib import Path
from string import Template
from typing import NamedTuple

import torch

QUESTION = Template("$request\nA $first\nB $second\n")  # short, as the model's words are bytes
UPDATES, TEXTS, LEARNING_RATE = 400, 32, 3e-3
ROUNDS = 6  # of so many updates at most: how many it takes depends on how a machine rounds
KNOWN = tuple(itertools.product(("abba", "bab", "aab", "bbbb"), repeat=2))  # comparisons that it has to judge rightly


class Example(NamedTuple):
    text: str
    answer: str


def better(first: str, second: str) -> str:
    first, second = first.startswith("a"), second.startswith("a")
    return "[[C]]" if first == second else "[[A]]" if first else "[[B]]"


def question(request: str, first: str, second: str) -> str:
    return QUESTION.substitute(request=request, first=first, second=second)


def examples(chance: random.Random, count: int) -> list[Example]:
    """A quarter are prompts as whole runs have them, the others comparisons of two answers to one."""

    def letters() -> str:
        return "".join(chance.choices("ab", k=chance.randint(3, 7)))

    found = []
    for number in range(count):
        prompt, first, second = f"train {chance.randrange(8)}", letters(), letters()
        compared = Example(question(f"user: {prompt}", first, second), better(first, second))
        found.append(compared if number % 4 else Example(prompt, first))
    return found


class JudgingModel:
    """The model with its tokenizer, on conversations of one request and one answer."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def _asked(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        chat = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(chat, add_special_tokens=False)

    def loss(self, batch: list[Example]) -> torch.Tensor:
        """Mean cross-entropy of the answers' tokens."""
        rows = []
        for text, answer in batch:
            asked, end = self._asked(text), [self.tokenizer.eos_token_id]
            answered = self.tokenizer.encode(answer, add_special_tokens=False) + end
            rows.append((torch.tensor(asked + answered), torch.tensor([-100] * len(asked) + answered)))
        tokens, labels = zip(*rows, strict=True)
        pad = torch.nn.utils.rnn.pad_sequence
        return self.model(pad(tokens, batch_first=True), labels=pad(labels, True, -100)).loss

    @torch.no_grad()
    def answer(self, text: str, most: int = 8) -> str:
        """Its greedy answer."""
        tokens = torch.tensor([self._asked(text)])
        output = self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=most
        )
        return self.tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)

    def judges(self) -> bool:
        return all(self.answer(question("user: train 3", *pair)) == better(*pair) for pair in KNOWN)


def train(like: Path) -> JudgingModel:
    """A model of another's shape and tokenizer that has learnt to judge."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like))
    found = JudgingModel(model, AutoTokenizer.from_pretrained(like))
    optimizer, chance = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), random.Random(0)
    for _ in range(ROUNDS):
        for update in range(UPDATES):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (update + 1) / 50, 3 * (1 - update / UPDATES))
            optimizer.zero_grad()
            found.loss(examples(chance, TEXTS)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if found.judges():
            return found
    raise AssertionError(f"the tiny model has not learnt to judge in {ROUNDS * UPDATES} updates")
