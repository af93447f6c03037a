"""How held-out prompts are answered: samples and one greedy answer each, in one pass of verl's validation.

Where the source of preferences says what the answers are worth it compares the greedy ones with those of the run's
first validation, which the run's folder keeps.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from recipe.spin import run_folder
from recipe.spin.rollout.agent_loop import FIRST_ANSWER, GREEDY, PREFERENCE, SAMPLING_SEED
from recipe.spin.rollout.answers import are_numbers
from recipe.spin.rollout.validation_metrics import as_win_rate, held_out_faults


class HeldOutValidation:
    """What differs from the validation of verl's trainer, to be put before it among a trainer's bases."""

    def _validate(self) -> dict[str, float]:
        """Answers the held-out prompts greedily and, if `val_kwargs` ask for samples, with these too, all in one go.

        Where the source compares answers there are greedy ones alone, and the metrics are its win rate. What of it
        failed, and was let pass, goes into the run's progress, which the console shows.
        """
        loader, val_kwargs = self.val_dataloader, self.config.actor_rollout_ref.rollout.val_kwargs
        compares = self.source.compares_held_out(self.config)
        first = self._first_answers() if compares else None
        self.val_dataloader = self._held_out = HeldOutRows(loader, val_kwargs, compares, first)
        try:
            metrics = super()._validate()
        finally:
            self.val_dataloader = loader
        if compares:
            metrics = as_win_rate(metrics)
            if not self._held_out.met:
                folder = Path(self.config.trainer.default_local_dir)
                run_folder.keep_answers(folder, self.global_steps, self._answers)
        self.progress["validation"] = {"step": self.global_steps, "faults": held_out_faults(metrics)}
        return metrics

    def _first_answers(self) -> list[tuple[list[dict], str]] | None:
        """The held-out prompts and answers of the run's first validation; None where this is the first."""
        if self.global_steps == 0:
            return None
        return run_folder.first_answers(Path(self.config.trainer.default_local_dir))

    def _maybe_log_val_generations(self, inputs, outputs, scores):
        self._texts = outputs  # verl has no other place that shows them all
        super()._maybe_log_val_generations(inputs, outputs, scores)

    def _val_metrics_update(self, data_sources, sample_uids, infos, turns, expected_acc_counts=None):
        """verl's metrics of the answers that `val_kwargs` ask for, and of the greedy ones under names of their own.

        Prompts with a response that the reward gave no score (`algorithm.reward_error=skip`) are left out and counted.

        Raises:
            RuntimeError: when more answers failed than `trainer.max_failed_validation` allows.
        """
        infos = without_made_up_accuracy(infos)
        infos = {name: values for name, values in infos.items() if name == PREFERENCE or _can_be_told(values)}
        noted = [info for infos_of_one in infos.pop(PREFERENCE, ()) for info in infos_of_one]
        unscored = {uid for uid, reward in zip(sample_uids, infos["reward"], strict=True) if math.isnan(reward)}
        uids = [uid for _, uid in expected_acc_counts]  # one a row, in the rows' order
        if self._held_out.compares:
            texts = dict(zip(sample_uids, self._texts, strict=True))
            rows = zip(self._held_out.prompts, uids, strict=True)
            self._answers = [(prompt, texts[uid]) for prompt, uid in rows if uid in texts]
        greedy_prompts = {uid for uid, greedy in zip(uids, self._held_out.greedy, strict=True) if greedy}
        metrics = {"val-failed/answers": self._failed_share(len(sample_uids), sum(expected_acc_counts.values()))}
        if noted:
            metrics |= {f"val-{name}": value for name, value in self.source.metrics(noted).items()}
        for greedy, prefix in ((False, "val-"), (True, "val-greedy-")):
            kept = {uid for uid in uids if (uid in greedy_prompts) == greedy} - unscored
            places = [place for place, uid in enumerate(sample_uids) if uid in kept]
            if places:
                part = super()._val_metrics_update(
                    [data_sources[place] for place in places],
                    [sample_uids[place] for place in places],
                    {name: [values[place] for place in places] for name, values in infos.items()},
                    [turns[place] for place in places],
                    {key: n for key, n in expected_acc_counts.items() if key[1] in kept},
                )
                metrics |= {name.replace("val-", prefix, 1): value for name, value in part.items()}
        if unscored:
            metrics["val-aux/prompts_without_score"] = len(unscored)
        return metrics

    def _failed_share(self, answers: int, expected: int) -> float:
        """Share of the answers that generating or scoring failed to give; verl counts them as wrong, or not at all."""
        share, limit = 1 - answers / expected, self.config.trainer.max_failed_validation
        if share > limit:
            raise RuntimeError(
                f"step {self.global_steps}: {expected - answers} of {expected} held-out answers failed, and "
                f"trainer.max_failed_validation={limit} is the share that may; mend the cause, which the logs of the "
                "agent loop's worker hold, or raise it"
            )
        return share


def without_made_up_accuracy(infos: dict[str, list]) -> dict[str, list]:
    """What is known of each answer, without the `acc` that verl adds where a reward is a number and not a dict."""
    if "acc" not in infos:
        return infos
    graded = infos.get("score") or [None] * len(infos["acc"])
    acc = [value if score is not None else None for value, score in zip(infos["acc"], graded, strict=True)]
    return infos | {"acc": acc}


def _can_be_told(values: list) -> bool:
    """Whether verl has a metric, or a vote, of what a reward returned beside its score; other things are left out."""
    given = [value for value in values if value is not None]
    return are_numbers(given) or all(isinstance(value, str) for value in given)


class HeldOutRows:
    """The held-out batches with the columns by which RolloutWorker samples: the same seeds at every validation.

    Where `val_kwargs` ask for samples each row is followed by itself once more, to be answered greedily; else it stands
    once, for its one greedy answer, and so it does where answers are compared: then each row has that of the run's
    first validation beside it, by the prompts and answers in `first`.

    Attributes:
        compares: whether answers are compared.
        greedy: of each row handed out, whether it is the greedy one.
        prompts: of each, the messages.
        met: whether any had an answer of the first validation beside it.
    """

    def __init__(self, loader, val_kwargs, compares: bool = False, first: list[tuple[list[dict], str]] | None = None):
        self._loader = loader
        self.compares = compares
        samples = val_kwargs.do_sample and val_kwargs.temperature > 0 and not compares
        self._kinds = (False, True) if samples else (True,)
        self._n = val_kwargs.n
        self._first = None if first is None else {_key(prompt): answer for prompt, answer in first}
        self.greedy: list[bool] = []
        self.prompts: list[list[dict]] = []
        self.met = False

    def __iter__(self):
        row = 0
        self.greedy, self.prompts = [], []
        for batch in self._loader:
            size, copies = len(batch["raw_prompt"]), len(self._kinds)
            greedy = list(self._kinds) * size
            self.greedy += greedy
            columns = {
                SAMPLING_SEED: [f"held-out-{row + i // copies}" for i in range(size * copies)],
                GREEDY: greedy,
                "__rollout_n__": [1 if kind else self._n for kind in greedy],
            }
            rows = {
                name: values.repeat_interleave(copies, 0) if torch.is_tensor(values) else values.repeat(copies, 0)
                for name, values in batch.items()
            }
            self.prompts += [list(prompt) for prompt in rows["raw_prompt"]]
            if self._first is not None:
                columns[FIRST_ANSWER] = [self._first.get(_key(prompt)) for prompt in rows["raw_prompt"]]
                self.met = self.met or any(answer is not None for answer in columns[FIRST_ANSWER])
            yield rows | {name: np.array(values, dtype=object) for name, values in columns.items()}
            row += size


def _key(prompt: Sequence[dict]) -> str:
    """A prompt's messages as one text."""
    return json.dumps(list(prompt))
