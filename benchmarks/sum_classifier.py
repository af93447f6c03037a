"""A reward model of sums: the default model as a sequence classifier, trained on right and wrong answers made up here.

    .venv/bin/python -m benchmarks.sum_classifier --model FOLDER --output FOLDER [--steps 100]

Its sums are those that the arithmetic example trains on, none that it holds out. Each update compares every right
answer to a sum with every wrong one (Bradley-Terry); a prompt is computed once for all its answers.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from recipe.spin.examples.arithmetic.prepare import row, split_pairs
from recipe.spin.examples.arithmetic.reward import compute_score

PROMPTS, RIGHT, WRONG = 8, 3, 5  # of an update; its answers have about 900 tokens
LEARNING_RATE = 5e-5
# All within the default run's 16 tokens a response
FORMS = (
    "{c}",
    "{c}.",
    "{a} + {b} = {c}",
    "{a} + {b} = {c}.",
    "{a} + {b} is {c}.",
    "{a} plus {b} equals {c}.",
    "The answer is {c}.",
    "The answer is: {c}",
    "The number is {c}.",
    "The sum is {c}.",
    "The sum of {a} and {b} is {c}.",
    "To add {a} and {b}, we get {c}.",
    "What a simple sum! {a} + {b} = {c}",
)
# Of the kind that the model gives before it is trained
EVASIONS = (
    "To solve this, we need to add {a} and {b}.",
    "The sum of {a} and {b}",
    "{a} + {b} = {c} +",
    "Here is the answer to the question:",
    "What a classic math problem, but here's",
    "The answer is the sum of the two numbers, which is",
    "The number in the equation is {a} + {b}.",
    "Although we cannot add {a} and {b}",
    "One of the numbers is {a}.",
    "{c} or {d}",
)


# ---- Answers ---------------------------------------------------------------------------------------------------------
def right_answers(a: int, b: int, rng: random.Random) -> list[str]:
    """RIGHT answers that end with the sum, in different words."""
    return [form.format(a=a, b=b, c=a + b) for form in rng.sample(FORMS, RIGHT)]


def wrong_answers(a: int, b: int, rng: random.Random) -> list[str]:
    """WRONG answers, the last of which evades the question; the others' numbers are near the sum, or any."""
    evasions = [form.format(a=a, b=b, c=a + b, d=a + b + 1) for form in EVASIONS]
    evasions = [answer for answer in evasions if not is_right(answer, a, b)]  # {a} + 0 ends with {a}
    near = [a + b + by for by in (-10, -3, -2, -1, 1, 2, 3, 10) if a + b + by >= 0]
    others = [number for number in (a, b, abs(a - b), a * b, rng.randrange(400), 10 * a + b) if number != a + b]
    numbers = [rng.choice(near if rng.random() < 0.6 else others) for _ in range(WRONG - 1)]
    return [*(rng.choice(FORMS).format(a=a, b=b, c=number) for number in numbers), rng.choice(evasions)]


def is_right(answer: str, a: int, b: int) -> bool:
    return compute_score("arithmetic", answer, str(a + b))["acc"] == 1


def sums() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The numbers that the arithmetic example adds, as its files have them: those to train on and those held out."""
    return split_pairs(seed=0, test_size=100, train_size=None, max_operand=20)


def question(a: int, b: int) -> str:
    return row(0, "train", a, b)["prompt"][0]["content"]


# ---- The classifier --------------------------------------------------------------------------------------------------
class SumClassifier:
    """The model with its tokenizer; scores are those of the last token that verl's reward loop sends."""

    def __init__(self, model: str):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def tokens(self, request: str, answer: str) -> tuple[list[int], list[int]]:
        """A conversation as the reward loop lays it out, taken apart where the answer begins."""
        messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        asked = self.tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        whole = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False) for text in (asked, whole[len(asked) :]))

    def scores(self, requests: list[str], answers: list[list[str]]) -> torch.Tensor:
        """Scores (P, n) of n answers to each of P requests, each request computed once."""
        count = len(answers[0])
        pairs = [[self.tokens(request, one) for one in group] for request, group in zip(requests, answers, strict=True)]
        asked, asked_mask = _pad([group[0][0] for group in pairs], "left")
        answered, mask = _pad([answer for group in pairs for _, answer in group], "right")
        places = (asked_mask.cumsum(-1) - 1).clamp(min=0)
        body = self.model.model(asked, attention_mask=asked_mask, position_ids=places, use_cache=True)
        body.past_key_values.batch_repeat_interleave(count)
        asked_mask = asked_mask.repeat_interleave(count, 0)
        hidden = self.model.model(
            answered,
            attention_mask=torch.cat([asked_mask, mask], -1),
            position_ids=asked_mask.sum(-1, keepdim=True) + torch.arange(answered.shape[1]),
            past_key_values=body.past_key_values,
        ).last_hidden_state
        last = hidden[torch.arange(len(hidden)), mask.sum(-1) - 1]
        return self.model.score(last).view(len(requests), count)


def _pad(sequences: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both (N, longest)."""
    ids = pad_sequence([torch.tensor(one) for one in sequences], batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones(len(one), dtype=torch.long) for one in sequences], True, 0, side)
    return ids, mask


# ---- Training --------------------------------------------------------------------------------------------------------
def train(classifier: SumClassifier, steps: int, seed: int = 1) -> list[float]:
    """Trains on the example's training sums; each update's share of pairs that were in the right order before it."""
    rng, (pairs, _), found = random.Random(seed), sums(), []
    optimizer = torch.optim.AdamW(classifier.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 5, (steps - step) / (steps / 4))
        margins = _margins(classifier, rng.sample(pairs, PROMPTS), rng)
        loss = -logsigmoid(margins).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(classifier.model.parameters(), 1.0)
        optimizer.step()
        found.append(round((margins > 0).float().mean().item(), 4))
        sys.stderr.write(
            f"[benchmark] reward model, update {step + 1}: loss {loss.item():.3f}, order {found[-1]:.3f}\n"
        )
    return found


@torch.no_grad()
def evaluate(classifier: SumClassifier, seed: int = 2, count: int = 60) -> float:
    """Share of the pairs of right and wrong answers to held-out sums that are in the right order."""
    rng, (_, pairs) = random.Random(seed), sums()
    return (_margins(classifier, rng.sample(pairs, count), rng) > 0).float().mean().item()


def _margins(classifier: SumClassifier, pairs: list[tuple[int, int]], rng: random.Random) -> torch.Tensor:
    """Right less wrong scores (P, RIGHT, WRONG)."""
    answers = [right_answers(a, b, rng) + wrong_answers(a, b, rng) for a, b in pairs]
    scores = classifier.scores([question(a, b) for a, b in pairs], answers)
    return scores[:, :RIGHT, None] - scores[:, None, RIGHT:]


def make(model: str, folder: Path, steps: int) -> dict:
    """Trains a classifier and saves it; what it reached."""
    start = time.perf_counter()
    torch.manual_seed(1)  # of the classifier's head
    classifier = SumClassifier(model)
    order = train(classifier, steps)
    seconds = round(time.perf_counter() - start)
    classifier.save(folder)
    return {"steps": steps, "order_in_training": order, "order_held_out": evaluate(classifier), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a reward model of sums.")
    parser.add_argument("--model", required=True, help="folder of the model to begin with")
    parser.add_argument("--output", type=Path, required=True, help="folder of the reward model")
    parser.add_argument("--steps", type=int, default=100, help="updates (100)")
    options = parser.parse_args()
    print(make(options.model, options.output, options.steps))


if __name__ == "__main__":
    main()
