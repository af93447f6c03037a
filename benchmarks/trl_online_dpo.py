"""TRL's OnlineDPOTrainer on the arithmetic example, measured as the recipe measures itself.

    python -m benchmarks.trl_online_dpo --model DIR --data DIR --output FILE [--seed 1] [--steps 12] [--every 4]
        [--batch 32] [--optimizer adamw_torch] [--in-order]

The settings are those of the recipe's CPU profile wherever both have them, but the learning rate, which was the
profile's until 45e0d1a, and TRL's defaults elsewhere. Every line of
the output is a step: `sampled` and `greedy` held-out accuracy (before the first step and every so many), `score` the
mean over the step's responses, `seconds` without the evaluation, their parts `gen`, `ref`, `update` (forward and
backward) and `optimizer` (with clipping), the step's `response_tokens`, and the cores that other processes kept busy
meanwhile. learning_curves.py and step.py run it.
"""

import argparse
import json
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from benchmarks.machine import OthersCores
from recipe.spin.examples.arithmetic.reward import compute_score

PROMPTS, NEW_TOKENS, SAMPLES = 32, 16, 4


def read(path: Path) -> Dataset:
    """The prompts and right answers of a file of the example."""
    rows = pq.read_table(path).to_pylist()
    return Dataset.from_list([{"prompt": row["prompt"], "gold": row["reward_model"]["ground_truth"]} for row in rows])


def reward(completions: list, gold: list[str], **_) -> list[float]:
    """The example's reward of TRL's completions."""
    pairs = zip(completions, gold, strict=True)
    return [compute_score("arithmetic", completion[0]["content"], right)["score"] for completion, right in pairs]


class TimedTrainer(OnlineDPOTrainer):
    """TRL's trainer with a clock around its parts; `spent` holds the seconds since the step began."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.spent: Counter = Counter()

    @contextmanager
    def clock(self, part: str):
        start = time.perf_counter()
        yield
        self.spent[part] += time.perf_counter() - start

    def _generate(self, *args, **kwargs):
        with self.clock("gen"):
            output = super()._generate(*args, **kwargs)
        self.spent["response_tokens"] += int(output[3].sum())
        return output

    def _forward(self, model, *args, **kwargs):
        if model is not self.ref_model:
            return super()._forward(model, *args, **kwargs)
        with self.clock("ref"):
            return super()._forward(model, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        with self.clock("micro_batches"):
            return super().training_step(*args, **kwargs)

    def parts(self, seconds: float) -> dict[str, float]:
        """Where the seconds of the step went; begins the next."""
        spent, self.spent = self.spent, Counter()
        update = spent["micro_batches"] - spent["gen"] - spent["ref"]
        optimizer = seconds - spent["micro_batches"]
        return {name: spent[name] for name in ("gen", "ref", "response_tokens")} | {
            "update": update,
            "optimizer": optimizer,
        }


class HeldOut(TrainerCallback):
    """Writes a line a step and, every `every` steps (0: never), the accuracy on held-out prompts with it."""

    trainer: TimedTrainer

    def __init__(self, tokenizer, data: Dataset, every: int, output: Path):
        self.tokenizer, self.data, self.every, self.output = tokenizer, data, every, output
        self.line: dict[str, float] = {}

    @torch.no_grad()
    def accuracy(self, model, samples: int, **sampling) -> float:
        prompts = [row["prompt"] for row in self.data]
        options = {"add_generation_prompt": True, "return_dict": True, "padding": True, "return_tensors": "pt"}
        inputs = self.tokenizer.apply_chat_template(prompts, **options)
        answers = model.generate(**inputs, max_new_tokens=NEW_TOKENS, num_return_sequences=samples, **sampling)
        texts = self.tokenizer.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        gold = [row["gold"] for row in self.data for _ in range(samples)]
        return sum(reward([[{"content": text}] for text in texts], gold)) / len(gold)

    def evaluate(self, model, seed: int) -> dict[str, float]:
        training = model.training
        model.eval()
        with torch.random.fork_rng():  # training draws the same samples with and without evaluations
            torch.manual_seed(seed)
            found = {
                "greedy": self.accuracy(model, 1, do_sample=False),
                "sampled": self.accuracy(model, SAMPLES, do_sample=True, temperature=1.0, top_k=0, top_p=1.0),
            }
        model.train(training)
        return found

    def write(self, step: int) -> None:
        with self.output.open("a") as file:
            file.write(json.dumps({"step": step} | self.line) + "\n")

    def on_train_begin(self, args, state, control, model=None, **_):
        if self.every:
            self.line = self.evaluate(model, args.seed)
            self.write(0)

    def on_step_begin(self, args, state, control, **_):
        self.begun = OthersCores()

    def on_step_end(self, args, state, control, model=None, **_):
        seconds, others = self.begun.read()
        self.line = {"seconds": seconds, "others_cores": others} | self.trainer.parts(seconds)

    def on_log(self, args, state, control, logs=None, model=None, **_):
        if "objective/scores" not in logs:
            return  # TRL's closing line
        self.line["score"] = logs["objective/scores"]
        if self.every and state.global_step % self.every == 0:
            self.line |= self.evaluate(model, args.seed)
        self.write(state.global_step)


def main() -> None:
    parser = argparse.ArgumentParser(description="TRL's OnlineDPOTrainer on the arithmetic example.")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--output", type=Path, required=True, help="the file of JSON lines to write")
    parser.add_argument("--seed", type=int, default=1, help="of the order of prompts and of sampling (1)")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps (12)")
    parser.add_argument("--every", type=int, default=4, help="steps between evaluations (4; 0: none)")
    parser.add_argument("--batch", type=int, default=PROMPTS, help="prompts per micro-batch (32)")
    parser.add_argument("--optimizer", default="adamw_torch", help="TRL's `optim` (adamw_torch)")
    parser.add_argument("--in-order", action="store_true", help="the file's order instead of a random one")
    options = parser.parse_args()

    set_seed(options.seed)
    options.output.unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32) for _ in range(2))
    config = OnlineDPOConfig(
        output_dir=str(options.output.with_suffix("")),
        seed=options.seed,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=PROMPTS // options.batch,
        train_sampling_strategy="sequential" if options.in_order else "random",
        dataloader_drop_last=True,
        max_steps=options.steps,
        max_new_tokens=NEW_TOKENS,
        temperature=1.0,
        beta=0.1,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim=options.optimizer,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    held_out = HeldOut(tokenizer, read(options.data / "test.parquet"), options.every, options.output)
    trainer = TimedTrainer(
        model=policy,
        ref_model=reference,
        reward_funcs=reward,
        args=config,
        processing_class=tokenizer,
        train_dataset=read(options.data / "train.parquet"),
        callbacks=[held_out],
    )
    held_out.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main()
