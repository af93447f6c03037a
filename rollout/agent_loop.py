"""How prompts are answered: verl's agent loops, with seeds for the responses and requests in rounds (rounds.py)."""

import asyncio
import math
import zlib
from collections import defaultdict
from collections.abc import Awaitable
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

import ray
import torch
from ray.actor import ActorHandle
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.rollout_trace import rollout_trace_op
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from recipe.spin import verl_patches
from recipe.spin.common import heap
from recipe.spin.preferences.reward_error import NoScore, RewardError
from recipe.spin.preferences.source import Group, PreferenceSource, Score, has_reward, load_source
from recipe.spin.rollout import queue
from recipe.spin.rollout.groups import GroupScoring, checked, win
from recipe.spin.rollout.rounds import Request, Round, Session
from recipe.spin.rollout.scoring import Scoring, prompt_name

verl_patches.own_transfer_queue()

# Columns that SpinTrainer adds to a batch of prompts
GREEDY = "spin_greedy"  # answer greedily, whatever the sampling parameters say
SAMPLING_SEED = "spin_sampling_seed"  # names the prompt within the run; ends with its number (`prompt_number`)
FIRST_ANSWER = "spin_first_answer"  # of the run's first validation to a held-out prompt, None if it gave none
PREFERENCE = "preference"  # of a response's extra fields: what the source noted about it


def prompt_number(name: str) -> int:
    """A prompt's number within its step, or among the held-out ones, from its SAMPLING_SEED."""
    return int(name.rpartition("-")[2])


class SpinAgentLoop(SingleTurnAgentLoop):
    """verl's loop of one turn, of which one object answers all prompts: it keeps nothing of them."""


# ---------------------------------------------------------------------- to vLLM

_round: ContextVar[Round] = ContextVar("round")
_session: ContextVar[Session] = ContextVar("session")
_group: ContextVar[GroupScoring | None] = ContextVar("group", default=None)  # of a prompt whose responses meet


class RolloutClient(LLMServerClient):
    """Sends a round's requests to vLLM's replicas, to each the same prompts in every run.

    A session's later requests (tools, further turns) go to the replica that has its prompt in the cache.
    """

    def __init__(self, config, load_balancer_handle: ActorHandle | None = None, *, servers: list[ActorHandle]):
        super().__init__(config, load_balancer_handle)
        self._servers = servers
        self._tasks: set[asyncio.Task] = set()

    @rollout_trace_op
    async def generate(self, request_id, **request) -> TokenOutput:
        sessions, session = _round.get(), _session.get()
        if not sessions.awaits(session):
            request["sampling_params"] = of_a_later_part(request["sampling_params"], request["prompt_ids"])
            return await super().generate(request_id, **request)
        left_out = ("priority", "mm_processor_output")  # the round's order is the priority; the other is SGLang's
        request = {name: value for name, value in request.items() if value is not None and name not in left_out}
        output = await sessions.ask(session, {"request_id": self._vllm_request_id(request_id), **request})
        steps = output.extra_fields.get("global_steps")
        output.extra_fields |= {"min_global_steps": steps, "max_global_steps": steps}
        return output

    def send(self, requests: list[Request]) -> None:
        """Gives each replica its share of a round."""
        shares = defaultdict(list)
        for session, request, answer in requests:
            shares[self._replica(session)].append((request, answer))
        for replica, share in shares.items():
            task = asyncio.create_task(self._answer(self._servers[replica], *zip(*share, strict=True)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _answer(server: ActorHandle, requests: list[dict], answers: list[asyncio.Future]) -> None:
        fault: BaseException = RuntimeError("vLLM's server ended a round without an answer")
        try:
            async for item in server.generate_round.options(num_returns="streaming").remote(list(requests)):
                number, output = await item
                if isinstance(output, BaseException):
                    answers[number].set_exception(output)
                else:
                    answers[number].set_result(output)
        except ray.exceptions.RayError as error:
            fault = error
        finally:
            for answer in answers:
                if not answer.done():
                    answer.set_exception(fault)

    def _replica(self, session: Session) -> int:
        return _round.get().numbers[session[0]] % len(self._servers)

    async def _acquire_server(self, request_id: str, **extra) -> tuple[str, ActorHandle]:
        replica = self._replica(_session.get())
        return str(replica), self._servers[replica]

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        """There is no count of requests in flight to bring up to date."""


def of_a_later_part(sampling_params: dict[str, Any], prompt_ids: list[int]) -> dict[str, Any]:
    """The sampling parameters of a part of a response: one seed would give it the random numbers of the beginning."""
    if "seed" not in sampling_params:
        return sampling_params
    return sampling_params | {"seed": zlib.crc32(f"{sampling_params['seed']}/{len(prompt_ids)}".encode())}


class PartByPart(LLMServerClient):
    """What verl's client leaves out of the parts of a response: random numbers, and the weights' version, of each."""

    async def generate(self, request_id, *, prompt_ids, sampling_params, **options) -> TokenOutput:
        sampling_params = of_a_later_part(sampling_params, prompt_ids)
        output = await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **options)
        if not output.token_ids:  # stopped before it began: other weights will begin it
            output.extra_fields["global_steps"] = None
        return output


class ResumingClient(FullyAsyncLLMServerClient, PartByPart):
    """verl's client for responses that weight updates interrupt: it asks again until they are whole."""


# ---------------------------------------------------------------------- verl's agent loop worker and manager


# The class that verl wrote, before Ray made an actor class of it
VerlWorker = AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__


class RolloutWorker(Scoring, VerlWorker):
    """verl's agent loop worker; what it is asked for in one call makes a round.

    Where the source of preferences scores a prompt's responses together, they wait for each other before they are
    handed on.
    """

    _source: PreferenceSource | None = None  # one that scores responses together
    _at_once = False  # whether that is done as soon as they are there; else `score_groups` does it later
    _compares_held_out = False  # whether it scores held-out answers too

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        verl_patches.build_agent_loops_once(f"{SpinAgentLoop.__module__}.{SpinAgentLoop.__name__}")
        if self.config.trainer.v1.trainer_mode == "sync":  # the others' checkpoints hold the queue, row by row
            verl_patches.write_together(queue.Outbox())
        source = load_source(self.config, self.tokenizer)
        if source.scores_groups():
            self._source = source
            self._at_once = source.scoring_model == "actor"
            self._compares_held_out = source.compares_held_out(self.config)
        self._unscored: dict[str, dict[int, tuple[AgentLoopOutput, dict]]] = defaultdict(dict)
        heap.hand_back()

    def connect(self, llm_client: LLMServerClient, reward_loop_worker_handles: list[ActorHandle] | None) -> None:
        """Gives the worker, which started before them, vLLM's servers and the reward's workers."""
        if hasattr(self.llm_client, "tokenizer"):  # set where traces hold text
            llm_client.tokenizer = self.llm_client.tokenizer
        self.llm_client = llm_client
        self.reward_loop_worker_handles = reward_loop_worker_handles

    async def generate_sequences(self, batch) -> None:
        uids = list(batch["uid"])
        rollout = self.config.actor_rollout_ref.rollout
        n = rollout.val_kwargs.n if "validate" in batch and batch["validate"] else rollout.n
        counts = list(batch["__rollout_n__"]) if "__rollout_n__" in batch else [n] * len(uids)
        send = getattr(self.llm_client, "send", None)  # only RolloutClient's
        # verl's own trainers name no prompts: their places among those of this worker must do
        numbers = map(prompt_number, batch[SAMPLING_SEED]) if SAMPLING_SEED in batch else range(len(uids))
        _round.set(Round(dict(zip(uids, counts, strict=True)), send, dict(zip(uids, numbers, strict=True))))
        await super().generate_sequences(batch)

    async def _run_prompt(self, prompt: dict, sampling_params: dict, trajectory: dict, **kwargs) -> None:
        uid = prompt["uid"]
        if self._at_once and not trajectory["validate"]:
            _group.set(GroupScoring(_round.get().responses[uid], self._score_group))
        try:
            await super()._run_prompt(prompt, sampling_params, trajectory, **kwargs)
        finally:
            _round.get().leave_prompt(uid)

    async def _run_agent_loop(self, sampling_params: dict, *args, uid: str, session_id: int, **kwargs):
        _session.set((uid, session_id))
        try:
            params = self._sampling_params(sampling_params, session_id, kwargs)
            return await super()._run_agent_loop(params, *args, uid=uid, session_id=session_id, **kwargs)
        except Exception as error:
            if _group.get() is not None:
                _group.get().give_up(error)
            raise
        finally:
            _round.get().leave((uid, session_id))

    def _sampling_params(self, params: dict[str, Any], session_id: int, row: dict[str, Any]) -> dict[str, Any]:
        """Greedy ones where the row says so, and with a seed if `actor_rollout_ref.seed_responses` does; of any loop.

        A seed follows from the run's seed, the prompt's place in the run and the response's number. What is drawn then
        depends neither on how requests meet in vLLM's batches nor on what was drawn before.
        """
        settings = self.config.actor_rollout_ref
        if row.get(GREEDY, False):
            return params | {"temperature": 0.0, "top_p": 1.0, "top_k": -1}
        # verl's own trainers name no prompts
        if SAMPLING_SEED not in row or not settings.seed_responses:
            return params
        identity = f"{settings.rollout.seed}/{row[SAMPLING_SEED]}/{session_id}"
        return params | {"seed": zlib.crc32(identity.encode())}

    async def _agent_loop_postprocess(self, output, validate, **row) -> None:
        outputs = output if isinstance(output, list) else [output]
        last = outputs[-1]
        if _group.get() is not None:
            if has_reward(self.config.reward):
                await self._compute_score(outputs, kwargs=row)
            found: Score = await _group.get().score(row["session_id"], (last, row))
            last.reward_score = found.value
            last.extra_fields |= {PREFERENCE: found.info}
            last.extra_fields.setdefault("reward_extra_info", {})
        elif self._source is not None and not self._at_once and not validate:
            if not has_reward(self.config.reward):
                last.reward_score = 0.0  # the trainer puts the group's in its place
                last.extra_fields.setdefault("reward_extra_info", {})
            self._unscored[row["uid"]][row["session_id"]] = (last, row)
        elif self._compares_held_out and validate:
            last.reward_score, infos = await self._compare_held_out(last, row)
            last.extra_fields["reward_extra_info"] = {PREFERENCE: infos}
        await super()._agent_loop_postprocess(output, validate, **row)

    async def _score_group(self, answers: list[tuple[AgentLoopOutput, dict]]) -> list[Score]:
        outputs, row = [output for output, _ in answers], answers[0][1]
        texts = list(map(self._text, outputs))
        # A reward model in the policy's pool scores later
        given = has_reward(self.config.reward) and outputs[0].reward_score is not None
        rewards = [output.reward_score for output in outputs] if given else None
        return await self._ask_source(texts, rewards, row)

    async def _compare_held_out(self, output: AgentLoopOutput, row: dict) -> tuple[float, list[dict]]:
        """1 where the source prefers a held-out answer to that of the run's first validation, 0 where it prefers the
        earlier one, 0.5 where neither.

        NaN, no score, where that validation had no answer to the prompt. And what the source noted.
        """
        text = self._text(output)
        before = row.get(FIRST_ANSWER, text)  # in the first validation it is its own
        if before is None:
            return math.nan, []
        if before == text:
            return 0.5, []
        scores = await self._ask_source([before, text], None, row, held_out=True)
        return win(scores), [score.info for score in scores]

    def _text(self, output: AgentLoopOutput) -> str:
        return self.tokenizer.decode(output.response_ids, skip_special_tokens=True)

    async def _ask_source(
        self, texts: list[str], rewards: list[float] | None, row: dict, held_out: bool = False
    ) -> list[Score]:
        group = Group(row["global_steps"], list(row["raw_prompt"]), texts, rewards, row, self._generate, held_out)
        scores = self._source.score_group(group)
        if not self._source.limits_itself:
            scores = self._in_time(scores, group)
        return checked(await scores, group, type(self._source).__name__)

    async def _in_time(self, scores: Awaitable[list[Score]], group: Group) -> list[Score]:
        try:
            return await self._patience.wait_for(scores)
        except NoScore as error:
            source, prompt = type(self._source).__name__, prompt_name(group.row)
            raise RewardError(
                f"{source}.score_group {error} for the responses to {prompt}; mend it, or raise "
                "algorithm.reward_timeout_s"
            ) from error

    async def score_groups(self) -> dict[str, list[Score]]:
        """Scores of the responses that were given since the last call, by their prompt's uid, in their order."""
        unscored = {uid: [answers[n] for n in sorted(answers)] for uid, answers in self._unscored.items()}
        self._unscored.clear()
        # The replica that answered a prompt has it in the cache; a training prompt's uid is its SAMPLING_SEED
        _round.set(Round(dict.fromkeys(unscored, 0), send=None, numbers={uid: prompt_number(uid) for uid in unscored}))

        async def score(uid: str) -> list[Score]:
            _session.set((uid, 0))
            return await self._score_group(unscored[uid])

        scores = dict(zip(unscored, await asyncio.gather(*map(score, unscored)), strict=True))
        if scores and self.config.trainer.rollout_data_dir:  # verl's dump of a step reads them there
            await self._keep(unscored, scores)
        return scores

    @staticmethod
    async def _keep(unscored: dict[str, list[tuple[AgentLoopOutput, dict]]], scores: dict[str, list[Score]]) -> None:
        """Puts the scores into TransferQueue in place of those with which the responses were handed on."""
        rows = {}
        for uid, answers in unscored.items():
            for (output, row), score in zip(answers, scores[uid], strict=True):
                token_scores = torch.zeros(len(output.response_mask))
                token_scores[-1] = score.value
                rows[f"{uid}_{row['session_id']}_0"] = {"rm_scores": token_scores}
        await queue.write(rows)

    async def _generate(self, prompt_ids: list[int], sampling_params: dict[str, Any]) -> list[int]:
        request = uuid4().hex
        return (
            await self.llm_client.generate(request, prompt_ids=prompt_ids, sampling_params=sampling_params)
        ).token_ids

    async def count_answering(self) -> int:
        """How many prompts are being answered."""
        return len(self.background_tasks)

    async def settle(self) -> None:
        """Returns when no prompt is being answered."""
        while self.background_tasks:
            await asyncio.wait(self.background_tasks)


class RolloutManager(AgentLoopManagerTQ):
    """verl's manager with our workers, which start while the models load and are connected to vLLM afterwards."""

    @classmethod
    def start(cls, config) -> "RolloutManager":
        return cls.create(config=config, llm_client=LLMServerClient(config))

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(RolloutWorker)

    def connect(self, llm_client: LLMServerClient, reward_loop_worker_handles: list[ActorHandle] | None) -> None:
        ray.get([worker.connect.remote(llm_client, reward_loop_worker_handles) for worker in self.agent_loop_workers])

    def score_groups(self) -> dict[str, list[Score]]:
        """All workers' scores of the responses that wait for them, by prompt."""
        found = ray.get([worker.score_groups.remote() for worker in self.agent_loop_workers])
        return {uid: scores for part in found for uid, scores in part.items()}

    def count_answering(self) -> int:
        """How many prompts are being answered. Raises when a worker died."""
        return sum(ray.get([worker.count_answering.remote() for worker in self.agent_loop_workers]))

    def settle(self, seconds: float) -> bool:
        """Waits for the prompts being answered, at most so long; whether all are. Raises when a worker died."""
        waits = [worker.settle.remote() for worker in self.agent_loop_workers]
        ready, running = ray.wait(waits, num_returns=len(waits), timeout=seconds)
        ray.get(ready)
        return not running
