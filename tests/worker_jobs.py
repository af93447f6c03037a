"""What the tests run on the ranks of worker_harness.Ranks; a module of its own, so that the processes can import it."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from ulysses_on_gloo import ulysses_on_gloo
from worker_harness import full_parameters, make_update, response_batch

STEPS, PROMPTS, MAX_PROMPT, MAX_RESPONSE = 5, 6, 8, 10


@dataclass(frozen=True)
class Batch:
    """The responses of one training step (n to a prompt, row by row) and the pairs that preferences made of them."""

    prompts: list[list[int]]  # a row each, so n times the same
    responses: list[list[int]]
    masks: list[list[int]]
    chosen: list[int]
    rejected: list[int]
    weights: list[float]
    n: int = 2


def make_batches(n: int = 2, longest_prompt: int = MAX_PROMPT, seed: int = 0) -> list[Batch]:
    """Five batches of 6 prompts; in each one prompt gives no pair. Response lengths from 0 to the limit.

    With n=2 a pair a prompt; with n=3 all three pairs of a prompt, each weighing a third.
    """
    draw = random.Random(seed)
    batches = []
    for step in range(STEPS):
        prompts, responses, masks, chosen, rejected, weights = [], [], [], [], [], []
        for prompt in range(PROMPTS):
            tokens = draw.choices(range(300), k=draw.randint(1, longest_prompt))
            for _ in range(n):
                prompts.append(tokens)
                responses.append(draw.choices(range(300), k=draw.randint(1, MAX_RESPONSE)))
            if prompt == (step + 4) % PROMPTS:
                continue  # a tie
            rows = draw.sample(range(prompt * n, prompt * n + n), n)  # from the best to the worst
            pairs = [(better, worse) for i, better in enumerate(rows) for worse in rows[i + 1 :]]
            chosen += [better for better, _ in pairs]
            rejected += [worse for _, worse in pairs]
            weights += [1 / len(pairs)] * len(pairs)
        responses[chosen[0]] = draw.choices(range(300), k=MAX_RESPONSE)
        responses[rejected[0]] = []  # nothing generated
        masks = [[1] * len(response) for response in responses]
        masks[chosen[1]] = [0] * len(masks[chosen[1]])  # tokens, but none of the policy's own
        if len(masks[rejected[1]]) > 2:
            masks[rejected[1]][1] = 0
        batches.append(Batch(prompts, responses, masks, chosen, rejected, weights, n))
    return batches


def lay_out(dpo, batch: Batch):
    """The rows of a batch's pairs."""
    import torch

    from recipe.spin.core_algos import PreferencePairs

    pairs = PreferencePairs(
        torch.tensor(batch.chosen),
        torch.tensor(batch.rejected),
        torch.ones(len(batch.chosen)),
        torch.tensor(batch.weights),
    )
    prompt_of = torch.arange(len(batch.prompts)) // batch.n
    return dpo.lay_out(response_batch(batch.prompts, batch.responses, batch.masks), pairs, prompt_of)


def optimize(dpo, rows, step: int = 1) -> dict:
    """The optimizer steps of a training step of 100, with its metrics."""
    from recipe.spin.core_algos import beta_at

    return dpo.update_actor(rows, beta_at(dpo.config.algorithm.dpo_beta, step, 100, 100), step)


def train(rank: int, overrides: list[str], batches: list[Batch], reference_passes: bool = False) -> dict:
    """Trains on one batch a step as SpinTrainer does; returns the metrics of each step and the final parameters.

    reference_passes: also where the reference equals the actor, whose own log-probs would do.
    """
    dpo = make_update(*overrides)
    frequency = dpo.config.trainer.ref_update_freq
    for step, batch in enumerate(batches, start=1):
        rows = lay_out(dpo, batch)
        if frequency > 0 and step % frequency == 0:
            dpo.refresh_reference()
        if reference_passes:
            dpo.reference_equals_actor = False
        dpo.add_ref_logps(rows)
        optimize(dpo, rows, step)
    group = dpo.workers
    return {"steps": group.updates, "parameters": full_parameters(group.worker.actor.engine)}


def train_over_a_bad_step(rank: int, overrides: list[str], batches: list[Batch], bad: float | None) -> dict:
    """Trains on a few batches; gives the second a reference log-prob that is `bad`.

    Returns the metrics of each step, and the parameters after each.
    """
    dpo = make_update(*overrides)
    dpo.reference_equals_actor = False
    seen, parameters = [], []
    for number, batch in enumerate(batches):
        rows = lay_out(dpo, batch)
        dpo.add_ref_logps(rows)
        if number == 1 and bad is not None:
            rows["ref_logps"].values()[0] = bad
        seen.append(optimize(dpo, rows))
        parameters.append(full_parameters(dpo.workers.worker.actor.engine))
    return {"metrics": seen, "parameters": parameters}


def train_with_ulysses(rank: int, *args) -> dict:
    """`train` where the ranks share sequences."""
    with ulysses_on_gloo():
        return train(rank, *args)


def run_within(rank: int, contexts: list[Callable[[], AbstractContextManager]], job: Callable, *args):
    """A job of this module within contexts that stand for what its process lacks."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        return job(rank, *args)


@dataclass(frozen=True)
class Scored:
    """The two responses to each prompt of a training step, and their scores, row by row."""

    prompts: list[list[int]]
    responses: list[list[int]]
    scores: list[float]


def make_scored(steps: int = 4, prompts: int = 5, seed: int = 1) -> list[Scored]:
    """Steps of random prompts with two random responses each, 1 to MAX_RESPONSE tokens; no scores tie."""
    draw = random.Random(seed)
    made = []
    for _ in range(steps):
        questions = [draw.choices(range(300), k=draw.randint(1, MAX_PROMPT)) for _ in range(prompts)]
        answers = [draw.choices(range(300), k=draw.randint(1, MAX_RESPONSE)) for _ in range(2 * prompts)]
        scores = draw.sample(range(100), 2 * prompts)
        made.append(Scored([question for question in questions for _ in range(2)], answers, [s / 10 for s in scores]))
    return made


def train_on_scores(rank: int, overrides: list[str], steps: list[Scored]) -> list[dict]:
    """From scores to the update, as SpinTrainer goes; returns the metrics of each step."""
    import torch

    from recipe.spin.preferences.source import load_source

    dpo = make_update(*overrides)
    source = load_source(dpo.config, tokenizer=None)  # the sources that need one are run end to end
    for step, scored in enumerate(steps, start=1):
        masks = [[1] * len(response) for response in scored.responses]
        mask = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in masks], batch_first=True)
        rewards = torch.zeros(mask.shape)
        rewards[range(len(masks)), mask.sum(-1) - 1] = torch.tensor(scored.scores)
        batch = response_batch(scored.prompts, scored.responses, masks)
        rows = dpo.lay_out(*source.pair(batch, rewards, mask, step))
        dpo.add_ref_logps(rows)
        optimize(dpo, rows, step)
    return dpo.workers.updates


# ---- Reference -------------------------------------------------------------------------------------------------------
def responses_of(rows) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, response and mask of each response of some rows."""
    found = []
    for ids, lengths, mask in zip(
        *(rows[name].unbind() for name in ("input_ids", "segments", "loss_mask")), strict=True
    ):
        prompt, *answers = ids.split(lengths.tolist())
        masks = mask.split(lengths[1:].tolist())
        found += [(prompt.tolist(), answer.tolist(), one.tolist()) for answer, one in zip(answers, masks, strict=True)]
    return found


class Players:
    """Actor and reference, whose log-probs of one fixed batch of pairs are watched."""

    def __init__(self, overrides: list[str], probe: Batch):
        self.dpo = make_update(*overrides)
        self.group = self.dpo.workers
        self.worker = self.group.worker
        self.probe = lay_out(self.dpo, probe)

    def _inputs(self):
        from verl.utils import tensordict_utils as tu

        data = self.probe.copy()
        tu.pop(data, "mini_batches")
        tu.assign_non_tensor(data, average_log_prob=False)
        return data

    def reference(self):
        """Log-probs of the probe's responses under the reference."""
        return self.group.compute_ref_logps(self._inputs())["logps"].values().cpu().numpy().copy()

    def actor(self):
        """The same under the actor: the reference's own method with the actor in its place."""
        worker = self.worker
        reference = worker.ref
        worker.ref = worker.actor
        try:
            return self.reference()
        finally:
            worker.ref = reference

    def both(self):
        return {"actor": self.actor(), "reference": self.reference()}

    def train(self, batch: Batch):
        """One optimizer step; both models have done forward passes before it and hold what FSDP gathered for them."""
        rows = lay_out(self.dpo, batch)
        self.dpo.reference_equals_actor = False
        self.dpo.add_ref_logps(rows)
        optimize(self.dpo, rows)

    def actor_parameters(self):
        return full_parameters(self.worker.actor.engine)


def play(rank: int, overrides: list[str], batches: list[Batch], folder: str) -> dict:
    """Trains, refreshes and saves by turns; returns log-probs of the probe, the first batch, at each stage."""
    import os

    players = Players(overrides, batches[0])
    worker = players.worker
    seen = {"loaded": players.both()}
    players.train(batches[0])
    seen["trained"] = players.both()
    worker.save_checkpoint(f"{folder}/unrefreshed/actor", global_step=1)
    players.train(batches[1])
    seen["trained twice"] = players.both()
    worker.refresh_reference()
    seen["refreshed"] = players.both()
    parameters = {"refreshed": players.actor_parameters()}
    players.train(batches[2])
    seen["trained on"] = players.both()
    worker.save_checkpoint(f"{folder}/refreshed/actor", global_step=3)
    resumed = {}
    for name in ("unrefreshed", "refreshed"):
        fresh = Players(overrides, batches[0])
        fresh.worker.load_checkpoint(f"{folder}/{name}/actor")
        resumed[name] = fresh.both()
    fresh.worker.save_checkpoint(f"{folder}/again/actor", global_step=3)

    parameters["trained on"] = players.actor_parameters()
    worker.refresh_reference(0.3)
    seen["mixed"] = players.both()
    worker.refresh_reference()
    seen["refreshed again"] = players.both()
    folders = {name: sorted(os.listdir(f"{folder}/{name}")) for name in ("unrefreshed", "refreshed", "again")}
    return {
        "rows": responses_of(players.probe),
        "seen": seen,
        "resumed": resumed,
        "parameters": parameters,
        "folders": folders,
    }


def make_long_batch(prompts: int = 4, length: int = 400, response: int = MAX_RESPONSE, seed: int = 2) -> Batch:
    """One batch of long prompts with two responses each: far positions show what positions are computed from."""
    draw = random.Random(seed)
    questions = [draw.choices(range(300), k=length) for _ in range(prompts)]
    responses = [draw.choices(range(300), k=response) for _ in range(2 * prompts)]
    masks = [[1] * len(response) for response in responses]
    first = list(range(0, 2 * prompts, 2))
    repeated = [question for question in questions for _ in range(2)]
    return Batch(repeated, responses, masks, first, [row + 1 for row in first], [1.0] * prompts)


def refresh(rank: int, overrides: list[str], batch: Batch, folder: str) -> dict:
    """Trains once, refreshes, saves and resumes; returns log-probs of the batch at each stage."""
    players = Players(overrides, batch)
    seen = {"loaded": players.both()}
    players.train(batch)
    seen["trained"] = players.both()
    players.worker.refresh_reference()
    seen["refreshed"] = players.both()
    players.worker.save_checkpoint(f"{folder}/actor", global_step=1)
    resumed = Players(overrides, batch)
    resumed.worker.load_checkpoint(f"{folder}/actor")
    seen["resumed"] = resumed.both()
    return seen


def refresh_at_once(rank: int, overrides: list[str], batch: Batch) -> dict:
    """Refreshes before either model was asked for anything; returns log-probs of the batch."""
    players = Players(overrides, batch)
    players.worker.refresh_reference()
    return players.both()


def train_adapter(rank: int, overrides: list[str], batches: list[Batch], folder: str) -> dict:
    """Trains an adapter, saves and resumes; returns log-probs of the first batch at each stage."""
    players = Players(overrides, batches[0])
    seen = {"base": players.reference()}
    for batch in batches:
        players.train(batch)
    seen["trained"] = players.actor()
    players.worker.save_checkpoint(f"{folder}/actor", global_step=1)
    seen["saved"] = players.actor()
    resumed = Players(overrides, batches[0])
    resumed.worker.load_checkpoint(f"{folder}/actor")
    seen["resumed"] = resumed.actor()
    return {"rows": responses_of(players.probe), "seen": seen}


def count_offloads(rank: int, overrides: list[str]) -> int:
    """How many of a worker's two models FSDP was told to keep on the host."""
    from unittest import mock

    from torch.distributed import fsdp
    from verl.workers.engine.fsdp import transformer_impl
    from worker_harness import make_worker

    with (
        mock.patch.object(fsdp, "CPUOffload", wraps=fsdp.CPUOffload) as fsdp1,
        mock.patch.object(transformer_impl, "CPUOffloadPolicy", wraps=transformer_impl.CPUOffloadPolicy) as fsdp2,
    ):
        make_worker(*overrides)
    return fsdp1.call_count + fsdp2.call_count


def refuse(rank: int, overrides: list[str]) -> str:
    """The message with which a reference is refused that is sharded unlike the actor."""
    worker = make_update(*overrides).workers.worker
    try:
        worker.refresh_reference()
    except ValueError as error:
        return str(error)
    return ""


class Runs:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, folder: str):
        self.folder = folder

    def __reduce__(self):
        import os

        return os.mkdir, (self.folder,)


def load_what_names_code(rank: int, overrides: list[str], batch: Batch, folder: str) -> dict[str, str]:
    """What the worker says of each file of a checkpoint that a stranger wrote in its place, by the file's name."""
    import pickle
    from pathlib import Path

    import torch

    players = Players(overrides, batch)
    players.train(batch)
    players.worker.save_checkpoint(f"{folder}/actor", global_step=1)
    said = {}
    for file in sorted(Path(folder, "actor").glob("*.pt")):
        saved = file.read_bytes()
        torch.save({"state": Runs(f"{folder}/ran")}, file)
        try:
            players.worker.load_checkpoint(f"{folder}/actor")
        except pickle.UnpicklingError as error:
            said[file.name] = str(error)
        file.write_bytes(saved)
    players.worker.load_checkpoint(f"{folder}/actor")
    return said


def probe_update(rank: int, folder: str):
    """The doctor's finding of its update, on the CPU."""
    from recipe.spin.tools.device_probe import PROBES, Worker

    return Worker("cpu", folder, PROBES["cpu"]).update_beside_plain_pytorch()
