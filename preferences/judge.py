"""Language models as judges: which of two responses to a prompt is better.

A response is worth the share of its comparisons that it wins, a tie counts half, or in a tournament the comparisons
that it wins less the one that it loses; scores are then paired as rewards are.
Every comparison is asked in both orders, and won where both answers say so: a judge that prefers what stands first
prefers nothing (arXiv 2306.05685, Section 3.4). Several judges decide by majority.
"""

import asyncio
import itertools
import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig

from recipe.spin import run_folder
from recipe.spin.common.secrets import shown_address
from recipe.spin.common.settings import Settings
from recipe.spin.preferences.judge_server import SHOWN, Answer, JudgeFailed, Server, probe
from recipe.spin.preferences.judge_settings import (
    EXAMPLE,
    OWN,
    REFERENCE,
    check_answer,
    check_length,
    check_settings,
    check_step_limit,
    cost,
    fault_of,
    judges,
    read_template,
    read_verdict,
    shown_content,
    warn_of_loopback,
)
from recipe.spin.preferences.source import Group, PreferenceSource, Score

VERDICTS = {"A": ("first", 1), "B": ("second", -1), "C": ("neither", 0)}
# Answers that tell what share of them a judge gives without a verdict: of few one says nothing, and what lies back does
# not count. Equal responses are not asked about, so that late in training a step may have two
ENOUGH, LATEST = 100, 1000
# Of an answer that cannot be read the run's folder keeps so many characters, and so many answers of a step
KEPT_LENGTH, KEPT_A_STEP = 2000, 100

logger = logging.getLogger(__name__)


@dataclass
class Tally:
    """What the comparisons of a prompt's responses took.

    Attributes:
        first, second, neither, unreadable: how many answers preferred what stood first, what stood second, neither, and
            how many could not be read.
        comparisons, ties: pairs of responses, and those of them that neither won.
        tokens: of questions and answers, a server's as it counted them.
        seconds: from the first question to the last answer.
    """

    first: int = 0
    second: int = 0
    neither: int = 0
    unreadable: int = 0
    comparisons: int = 0
    ties: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def count(self, answer: Answer) -> int | None:
        """Counts a judge's answer, and returns what it is worth to the response that stood first: 1, 0 or -1.

        None where it cannot be read. What stands in one that was cut off is reasoning towards a verdict, and none.
        """
        self.tokens += answer.tokens
        verdict = None if answer.fault else read_verdict(answer.text)
        if verdict is None:
            self.unreadable += 1
            return None
        name, worth = VERDICTS[verdict]
        setattr(self, name, getattr(self, name) + 1)
        return worth


class Readable:
    """Whether a judge's answers can be read: of its latest ones too many that cannot stop the run.

    Looked at where the answers come, as dynamic sampling drops prompts whose comparisons all tie before a step is
    there, and by judge: one of several that gives no verdicts votes for ties.
    """

    def __init__(self, judge: str, limit: float):
        """judge: its address, as it is shown. limit: `algorithm.judge.max_unreadable`."""
        self.judge, self._limit = judge, limit
        self._latest: deque[str | None] = deque(maxlen=LATEST)  # what was wrong with each answer; None: nothing
        self._first: str | None = None  # that could not be read

    def count(self, fault: str | None, text: str) -> None:
        """Counts an answer by why it cannot be read.

        Raises:
            JudgeFailed: when a larger share than the limit of the latest answers, ENOUGH at least, could not be.
        """
        self._latest.append(fault)
        if fault is None:
            return
        if self._first is None:
            self._first = text
        found = Counter(one for one in self._latest if one is not None)
        if found.total() <= self._limit * max(len(self._latest), ENOUGH):
            return
        raise JudgeFailed(
            f"judge {self.judge}: {found.total()} of its latest {len(self._latest)} answers could not be read "
            f"({found['']} without [[A]], [[B]] or [[C]], {found['cut']} cut off by their length, {found['refused']} "
            f"refused), more than algorithm.judge.max_unreadable={self._limit} of {ENOUGH} or more; the first is "
            f"{self._first[:SHOWN]!r}, and {run_folder.UNREADABLE} in the run's folder has others. Ask for a verdict "
            "in algorithm.judge.prompt, raise algorithm.judge.max_tokens, or take a judge that follows"
        )


class JudgeSource(PreferenceSource):
    """Scores a prompt's responses by what judges say of pairs of them (settings: `algorithm.judge`)."""

    def __init__(self, config: DictConfig, tokenizer):
        super().__init__(config, tokenizer)
        self._settings = config.algorithm.judge
        self._template = read_template(self._settings.prompt)
        workers = config.actor_rollout_ref.rollout.agent.num_workers
        self._calls = asyncio.Semaphore(max(1, self._settings.concurrency // workers))
        # Of the step or validation that is judged, when its first question was asked
        self._began: dict[tuple[int, bool], float] = {}
        if self.scores_with_reference(config):
            self.scoring_model = "reference"
        self._servers = [
            None if judge.address in OWN else Server(judge, self._settings) for judge in judges(self._settings)
        ]
        # A call to a server has a limit of time; one to the policy's own vLLM is as long as its queue
        self.limits_itself = None not in self._servers
        limit = self._settings.max_unreadable
        self._readable = [Readable(shown_address(address), limit) for address in self._settings.servers]
        self._kept: Counter[tuple[int, bool]] = Counter()  # answers that could not be read, of each step and validation

    @classmethod
    def scores_with_reference(cls, config: DictConfig) -> bool:
        return REFERENCE in config.algorithm.judge.servers

    @classmethod
    def check(cls, config: DictConfig) -> None:
        """Looks at the settings, asks each server what it serves and a question, and says what a step will ask."""
        settings = config.algorithm.judge
        check_settings(settings)
        warn_of_loopback(config)
        check_step_limit(config)
        question = read_template(settings.prompt).substitute(EXAMPLE)
        for judge in judges(settings):
            if judge.address in OWN:
                continue
            try:
                check_answer(probe(judge, question, settings), judge, settings)
            except JudgeFailed as error:
                raise ValueError(str(error)) from error
        sys.stderr.write(f"[spin] {cost(config, cls.compares_held_out(config))}\n")

    @classmethod
    def check_model(cls, settings: Settings, prompt_length: Callable[[list[dict]], int | None]) -> None:
        if not set(OWN).isdisjoint(settings["algorithm.judge.servers"]):
            check_length(settings, prompt_length)

    # ------------------------------------------------------------------ scores of one prompt's responses

    async def score_group(self, group: Group) -> list[Score]:
        tally, start = Tally(), time.monotonic()
        if (group.step, group.held_out) not in self._began:
            self._began = {(group.step, group.held_out): start}
        contest = self._tournament if self._settings.comparisons == "tournament" else self._all_pairs
        values = await contest(group, tally)
        tally.seconds = time.monotonic() - start
        return [Score(value, asdict(tally) if number == 0 else {}) for number, value in enumerate(values)]

    async def _all_pairs(self, group: Group, tally: Tally) -> list[float]:
        """The share of its comparisons that each response wins, when each meets each."""
        count = len(group.responses)
        pairs = list(itertools.combinations(range(count), 2))
        outcomes = await asyncio.gather(*(self._compare(group, a, b, tally) for a, b in pairs))
        points = [0.0] * count
        for (a, b), outcome in zip(pairs, outcomes, strict=True):
            points[a] += (1 + outcome) / 2
            points[b] += (1 - outcome) / 2
        return [value / (count - 1) for value in points]

    async def _tournament(self, group: Group, tally: Tally) -> list[float]:
        """Wins of each less its defeat in a knock-out of n - 1 comparisons; a tie is worth nothing, the first goes on.

        Whoever is worth least has then lost, and not to somebody whom the best has only tied with.
        """
        points = [0.0] * len(group.responses)
        left = list(range(len(group.responses)))
        while len(left) > 1:
            pairs = list(zip(left[::2], left[1::2], strict=False))
            outcomes = await asyncio.gather(*(self._compare(group, a, b, tally) for a, b in pairs))
            winners = [b if outcome < 0 else a for (a, b), outcome in zip(pairs, outcomes, strict=True)]
            for (a, b), outcome in zip(pairs, outcomes, strict=True):
                points[a] += outcome
                points[b] -= outcome
            left = winners + left[2 * len(pairs) :]
        return points

    async def _compare(self, group: Group, a: int, b: int, tally: Tally) -> int:
        """1 where response a is better, -1 where b is, 0 where neither is: the sign of what all judges say together."""
        first, second = group.responses[a], group.responses[b]
        tally.comparisons += 1
        if first == second:
            tally.ties += 1
            return 0
        request = "\n\n".join(f"{message['role']}: {shown_content(message['content'])}" for message in group.messages)
        questions = [
            self._template.substitute(request=request, first=one, second=other)
            for one, other in ((first, second), (second, first))
        ]
        asked = itertools.product(range(len(self._servers)), questions)
        found = await asyncio.gather(*(self._verdict(judge, question, group, tally) for judge, question in asked))
        # One order alone, the other unreadable or [[C]], would let the place decide
        by_judge = [there if there == -back else 0 for there, back in zip(found[::2], found[1::2], strict=True)]
        outcome = _sign(sum(by_judge))
        tally.ties += outcome == 0
        return outcome

    async def _verdict(self, judge: int, question: str, group: Group, tally: Tally) -> int:
        server = self._servers[judge]
        async with self._calls:
            asked = self._ask_own(question, group) if server is None else server.ask(question)
            answer = await self._in_time(asked, group)
        worth = tally.count(answer)
        if worth is None:
            self._keep(answer, self._readable[judge].judge, group)
        self._readable[judge].count(answer.fault if worth is None else None, answer.text)
        return worth or 0

    def _keep(self, answer: Answer, judge: str, group: Group) -> None:
        """Notes an answer that cannot be read in the log, and in the run's folder."""
        logger.warning("judge %s: an answer %s: %r", judge, fault_of(answer), answer.text)
        place = group.step, group.held_out
        self._kept[place] += 1
        if self._kept[place] <= KEPT_A_STEP:
            one = {"step": group.step, "held_out": group.held_out, "judge": judge, "fault": fault_of(answer)}
            one["text"] = answer.text[:KEPT_LENGTH]
            run_folder.keep_unreadable(Path(self.config.trainer.default_local_dir), one)

    async def _in_time(self, answer: Awaitable[Answer], group: Group) -> Answer:
        limit = self._settings.step_timeout_s
        left = None if limit is None else self._began[group.step, group.held_out] + limit - time.monotonic()
        try:
            return await asyncio.wait_for(answer, left)
        except asyncio.TimeoutError as error:
            place = f"{'the validation after ' * group.held_out}step {group.step}"
            raise JudgeFailed(
                f"{place}: its comparisons took longer than algorithm.judge.step_timeout_s={limit}; raise it or "
                "algorithm.judge.concurrency, or ask less (algorithm.judge.comparisons=tournament)"
            ) from error

    async def _ask_own(self, question: str, group: Group) -> Answer:
        """The answer of the policy's own vLLM server to a question."""
        tokens = self.prompt_tokens([{"role": "user", "content": question}])
        answer = await group.generate(tokens, {"temperature": 0.0, "max_tokens": self._settings.max_tokens})
        fault = "" if len(answer) and answer[-1] in self.end_tokens else "cut"
        return Answer(self.tokenizer.decode(answer, skip_special_tokens=True), len(tokens) + len(answer), fault)

    # ------------------------------------------------------------------ a step's metrics

    def metrics(self, infos: list[dict]) -> dict[str, float]:
        """How much was asked and how it was answered, of the prompts that dynamic sampling left."""
        tallies = [Tally(**info) for info in infos if info]
        read = {name: sum(getattr(tally, name) for tally in tallies) for name, _ in VERDICTS.values()}
        unreadable = sum(tally.unreadable for tally in tallies)
        asked = sum(read.values()) + unreadable
        decided = read["first"] + read["second"]
        metrics = {
            "judge/asked": asked,
            "judge/tie_rate": sum(tally.ties for tally in tallies) / sum(tally.comparisons for tally in tallies),
            "judge/seconds_per_prompt": sum(tally.seconds for tally in tallies) / len(tallies),
            "judge/tokens": sum(tally.tokens for tally in tallies),
        }
        if asked:
            metrics["judge/unreadable_rate"] = unreadable / asked
        if decided:
            metrics["judge/first_rate"] = read["first"] / decided
        return metrics


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
