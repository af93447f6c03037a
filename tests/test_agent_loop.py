"""Rounds: a step's requests go to vLLM together and in one order, whatever order they come in and whatever fails."""

import asyncio
import inspect
import math
import re
import types

import numpy as np
import pytest
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.utils import tensordict_utils as tu
from verl.workers.rollout.replica import TokenOutput

from recipe.spin.checks.data_files import TAKEN
from recipe.spin.preferences.reward_error import RewardError
from recipe.spin.preferences.source import Group, PreferenceSource, Score
from recipe.spin.rollout import agent_loop, queue
from recipe.spin.rollout.agent_loop import (
    FIRST_ANSWER,
    GREEDY,
    SAMPLING_SEED,
    RolloutClient,
    RolloutWorker,
    VerlWorker,
)
from recipe.spin.rollout.rounds import Round


def test_no_column_of_the_data_meets_an_argument_of_the_rollout():
    """A row's columns are given by name to what answers and scores it."""
    takers = (VerlWorker, RolloutWorker)
    functions = [
        taker.__dict__[name]
        for taker in takers
        for name in ("_run_agent_loop", "_agent_loop_postprocess")
        if name in taker.__dict__
    ]
    functions += [AgentLoopWorker._run_agent_loop, SingleTurnAgentLoop.run]
    parameters = [one for function in functions for one in inspect.signature(function).parameters.values()]
    names = {one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
    names |= set(re.findall(r'prompt\.pop\("(\w+)"', inspect.getsource(VerlWorker._run_prompt)))
    assert {"output", "self", "priority", "__rollout_n__"} <= names
    assert names - {"agent_name", "_ray_trace_ctx"} <= TAKEN  # a column may name the agent loop of its row; Ray's own


class Server:
    """A vLLM server's handle: answers with the request's number, or fails as told."""

    def __init__(self, broken: set[str] = frozenset(), stops_after: int | None = None):
        self.rounds, self._broken, self._stops_after = [], broken, stops_after
        self.seeds = []
        self.generate_round = self
        self.generate = types.SimpleNamespace(remote=self._generate)

    def options(self, num_returns):
        assert num_returns == "streaming"
        return self

    async def remote(self, requests):
        self.rounds.append([request["prompt_ids"] for request in requests])
        self.seeds += [request["sampling_params"].get("seed") for request in requests]
        for number, request in reversed(list(enumerate(requests[: self._stops_after]))):
            broken = request["prompt_ids"] in self._broken
            yield _ready((number, ValueError("too long") if broken else _output(number)))

    async def _generate(self, **request):
        self.rounds.append([request["prompt_ids"]])
        self.seeds.append(request["sampling_params"].get("seed"))
        return _output(99)


async def _ready(value):
    return value


def _output(number: int) -> TokenOutput:
    return TokenOutput(token_ids=[number], extra_fields={"global_steps": 3})


def client_of(*servers) -> RolloutClient:
    client = RolloutClient.__new__(RolloutClient)
    client.config = types.SimpleNamespace(
        actor_rollout_ref=types.SimpleNamespace(rollout=types.SimpleNamespace(name="vllm"))
    )
    client._servers, client._tasks = list(servers), set()
    client._lb_require_acquire_fields, client._lb_require_release_fields = [], []
    return client


async def play(client: RolloutClient, responses: dict[str, int], sessions, first: int = 0) -> list:
    """Runs sessions (prompt, number, seconds before the request or None for a fault) as one round.

    `first` is the number of the round's first prompt among those of all rounds.
    """
    numbers = {uid: number for number, uid in enumerate(responses, start=first)}
    agent_loop._round.set(Round(responses, client.send, numbers))

    async def session(uid, number, delay):
        agent_loop._session.set((uid, number))
        try:
            if delay is None:
                raise RuntimeError("before the request")
            await asyncio.sleep(delay)
            return (await client.generate("id", prompt_ids=f"{uid}{number}", sampling_params={}, priority=0)).token_ids
        finally:
            agent_loop._round.get().leave((uid, number))

    tasks = [asyncio.create_task(session(*entry)) for entry in sessions]
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)


def test_requests_leave_together_in_the_order_of_their_prompts():
    server = Server()
    sessions = [("b", 1, 0.0), ("a", 1, 0.03), ("b", 0, 0.01), ("a", 0, 0.02)]
    answers = asyncio.run(play(client_of(server), {"b": 2, "a": 2}, sessions))
    assert server.rounds == [["b0", "b1", "a0", "a1"]]
    assert answers == [[1], [3], [0], [2]]


def test_replicas_share_a_round_by_prompt():
    servers = [Server(), Server()]
    sessions = [(uid, number, 0.001 * (7 * number % 5)) for number in (1, 0) for uid in "abc"]
    asyncio.run(play(client_of(*servers), dict.fromkeys("abc", 2), sessions))
    assert servers[0].rounds == [["a0", "a1", "c0", "c1"]] and servers[1].rounds == [["b0", "b1"]]


def test_the_prompts_of_several_workers_are_spread_over_all_replicas():
    """Each worker's round has fewer prompts than there are replicas, as with 64 prompts, 8 workers and 16 GPUs."""
    servers = [Server() for _ in range(6)]
    for first in (0, 4, 8):
        prompts = [f"p{first + place}/" for place in range(4)]
        sessions = [(uid, number, 0.0) for uid in prompts for number in (0, 1)]
        asyncio.run(play(client_of(*servers), dict.fromkeys(prompts, 2), sessions, first))
    found = [[name for requests in server.rounds for name in requests] for server in servers]
    assert found == [[f"p{number}/{place}" for number in (i, i + 6) for place in (0, 1)] for i in range(6)]


def test_nobody_waits_for_a_session_that_failed():
    server = Server()
    answers = asyncio.run(play(client_of(server), {"a": 2}, [("a", 0, 0.0), ("a", 1, None)]))
    assert answers[0] == [0] and isinstance(answers[1], RuntimeError)
    assert server.rounds == [["a0"]]


def test_nobody_waits_for_a_prompt_that_failed_before_its_sessions_began():
    sent = []

    async def leave():
        sessions = Round({"a": 1, "lost": 2}, sent.append, numbers={})
        answer = sessions.ask(("a", 0), {})
        assert not sent and not answer.done()
        sessions.leave_prompt("lost")
        sessions.leave_prompt("a")

    asyncio.run(leave())
    assert [[session for session, _, _ in requests] for requests in sent] == [[("a", 0)]]


def test_a_refused_request_fails_alone_and_a_lost_server_fails_all():
    answers = asyncio.run(play(client_of(Server(broken={"a0"})), {"a": 2}, [("a", 0, 0.0), ("a", 1, 0.0)]))
    assert isinstance(answers[0], ValueError) and answers[1] == [1]
    answers = asyncio.run(play(client_of(Server(stops_after=0)), {"a": 2}, [("a", 0, 0.0), ("a", 1, 0.0)]))
    assert all("without an answer" in str(answer) for answer in answers)


def test_a_sessions_second_request_goes_to_the_same_replica_at_once():
    servers = [Server(), Server()]

    async def run():
        client = client_of(*servers)
        agent_loop._round.set(Round({"a": 1, "b": 1}, client.send, {"a": 0, "b": 1}))

        async def session(uid):
            agent_loop._session.set((uid, 0))
            await client.generate("id", prompt_ids=uid, sampling_params={})
            return await client.generate("id", prompt_ids=uid + "2", sampling_params={})

        return await asyncio.wait_for(asyncio.gather(session("a"), session("b")), 5)

    asyncio.run(run())
    assert servers[0].rounds == [["a"], ["a2"]] and servers[1].rounds == [["b"], ["b2"]]


def test_a_sessions_second_request_draws_other_random_numbers_than_its_first():
    server = Server()

    async def run():
        client = client_of(server)
        agent_loop._round.set(Round({"a": 1}, client.send, {"a": 0}))
        agent_loop._session.set(("a", 0))
        for prompt in ("a", "a2", "a23"):
            await client.generate("id", prompt_ids=prompt, sampling_params={"top_k": 7, "seed": 5})

    asyncio.run(run())
    assert server.seeds[0] == 5 and len(set(server.seeds)) == 3


# ---------------------------------------------------------------------- how responses are sampled


@pytest.fixture
def sampling(monkeypatch):
    """The sampling parameters that verl runs an agent loop with, whichever the row names."""

    async def run(self, sampling_params, trajectory, *, agent_name, session_id, **row):
        return sampling_params

    monkeypatch.setattr(AgentLoopWorker, "_run_agent_loop", run)

    def params(seed_responses: bool, prompt: str | None = "p0", session: int = 0, greedy: bool = False) -> dict:
        worker = RolloutWorker.__new__(RolloutWorker)
        settings = {"seed_responses": seed_responses, "rollout": {"seed": 5}}
        worker.config = OmegaConf.create({"actor_rollout_ref": settings})
        agent_loop._round.set(Round({"a": 1}, None, {"a": 0}))
        row = {"uid": "a", "session_id": session, "agent_name": "tool_agent", GREEDY: greedy}
        row |= {SAMPLING_SEED: prompt} if prompt else {}
        asked = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
        return asyncio.run(worker._run_agent_loop(asked, trajectory={}, **row))

    return params


def test_each_sampled_response_has_a_seed_of_its_own_if_seeds_are_asked_for(sampling):
    seeds = [sampling(True, prompt, session)["seed"] for prompt in ("p0", "p1") for session in (0, 1)]
    assert len(set(seeds)) == 4 and seeds[0] == sampling(True)["seed"]
    assert sampling(False) == {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
    assert "seed" not in sampling(True, prompt=None)  # verl's own trainers name no prompts


@pytest.mark.parametrize("seed_responses", [True, False])
def test_a_greedy_answer_needs_no_seed(sampling, seed_responses):
    assert sampling(seed_responses, greedy=True) == {"temperature": 0.0, "top_p": 1.0, "top_k": -1}


# ---------------------------------------------------------------------- the worker


def answer_batch(
    monkeypatch, faults: set = frozenset(), others: tuple[Server, ...] = (), **columns
) -> tuple[Server, dict]:
    """Sends a batch of two prompts through the worker; returns the server and the prompts' last statuses.

    `others` are further replicas behind that server.
    """
    statuses, server = {}, Server()

    async def kv_put(key, partition_id, tag):
        statuses.setdefault(key, []).append(tag["status"])
        if (key, tag["status"]) in faults:
            raise ConnectionError("TransferQueue is away")

    async def run_agent_loop(self, sampling_params, trajectory, *, uid, session_id, **prompt):
        if (uid, session_id) in faults:
            raise RuntimeError("before the request")
        await asyncio.sleep(0.01 * (uid == "p0"))
        await self.llm_client.generate("id", prompt_ids=f"{uid}/{session_id}", sampling_params=sampling_params)

    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_put", kv_put)
    monkeypatch.setattr(AgentLoopWorker, "_run_agent_loop", run_agent_loop)
    worker = RolloutWorker.__new__(RolloutWorker)
    worker.background_tasks = set()
    rollout = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "calculate_log_probs": True, "n": 2}
    rollout |= {"val_kwargs": {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "n": 3}}
    rollout |= {"agent": {"default_agent_loop": "spin"}}
    worker.config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout, "seed_responses": False}})
    worker.llm_client = client_of(server, *others)
    columns = {"uid": ["p0", "p1"], "index": [0, 1], SAMPLING_SEED: ["held-out-0", "held-out-1"]} | columns
    batch = tu.get_tensordict({name: np.array(values, dtype=object) for name, values in columns.items() if values})
    tu.assign_non_tensor_data(batch, "global_steps", 1)
    if "__rollout_n__" in columns:
        tu.assign_non_tensor_data(batch, "validate", True)

    async def run():
        await worker.generate_sequences(batch)
        await asyncio.wait_for(worker.settle(), 5)

    asyncio.run(run())
    return server, {uid: history[-1] for uid, history in statuses.items()}


def test_a_worker_sends_what_it_is_asked_for_in_one_call_as_one_round(monkeypatch):
    server, statuses = answer_batch(monkeypatch)
    assert server.rounds == [["p0/0", "p0/1", "p1/0", "p1/1"]]
    assert statuses == {"p0": "finished", "p1": "finished"}


@pytest.mark.parametrize("name", ["00000003-{:08d}", "held-out-{}"])
def test_a_workers_prompts_go_to_the_replicas_of_their_numbers(monkeypatch, name):
    """Not to those of their places in what the worker was given, which begins at number 9 of all."""
    second, third, fourth = Server(), Server(), Server()
    names = [name.format(number) for number in (9, 10)]
    first, _ = answer_batch(monkeypatch, others=(second, third, fourth), **{SAMPLING_SEED: names})
    assert (first.rounds, fourth.rounds) == ([], [])
    assert (second.rounds, third.rounds) == ([["p0/0", "p0/1"]], [["p1/0", "p1/1"]])


def test_prompts_of_verls_own_trainers_which_have_no_names_are_spread_by_their_places(monkeypatch):
    second = Server()
    first, _ = answer_batch(monkeypatch, others=(second,), **{SAMPLING_SEED: None})
    assert (first.rounds, second.rounds) == ([["p0/0", "p0/1"]], [["p1/0", "p1/1"]])


def test_held_out_prompts_have_their_own_numbers_of_responses(monkeypatch):
    server, _ = answer_batch(monkeypatch, __rollout_n__=[3, 1])
    assert server.rounds == [["p0/0", "p0/1", "p0/2", "p1/0"]]


def test_faults_of_a_session_or_a_prompt_leave_the_others_their_round(monkeypatch):
    server, statuses = answer_batch(monkeypatch, faults={("p0", 1)})
    assert server.rounds == [["p0/0", "p1/0", "p1/1"]] and statuses == {"p0": "failure", "p1": "finished"}
    server, _ = answer_batch(monkeypatch, faults={("p0", "running")})
    assert server.rounds == [["p1/0", "p1/1"]]


# ---------------------------------------------------------------------- scores that are given meanwhile


class AnswersTheRestOnceScored(Server):
    """Answers two requests, and the others when the source has been asked about those."""

    def __init__(self):
        super().__init__()
        self.scored = asyncio.Event()

    async def remote(self, requests):
        for number in range(len(requests)):
            if number == 2:
                await asyncio.wait_for(self.scored.wait(), 2)
            yield _ready((number, _output(number)))


def test_the_source_is_asked_about_a_prompt_while_vllm_answers_another(monkeypatch):
    statuses, asked, given = {}, [], []

    class Judge(PreferenceSource):
        async def score_group(self, group: Group) -> list[Score]:
            asked.append(group.row["uid"])
            server.scored.set()
            return [Score(float(number)) for number in range(len(group.responses))]

    async def kv_put(key, partition_id, tag):
        statuses[key] = tag["status"]

    async def run_agent_loop(self, sampling_params, trajectory, **row):
        answer = await self.llm_client.generate("id", prompt_ids=row["uid"], sampling_params=sampling_params)
        output = types.SimpleNamespace(response_ids=answer.token_ids, reward_score=None, extra_fields={})
        await self._agent_loop_postprocess(output, False, **row)

    async def hand_on(self, output, validate, **row):
        given.append((row["uid"], row["session_id"], output.reward_score))

    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_put", kv_put)
    monkeypatch.setattr(AgentLoopWorker, "_run_agent_loop", run_agent_loop)
    monkeypatch.setattr(VerlWorker, "_agent_loop_postprocess", hand_on)
    server = AnswersTheRestOnceScored()
    worker = worker_with_unscored(server, count=2)
    rollout = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "calculate_log_probs": True, "n": 2}
    rollout |= {"agent": {"default_agent_loop": "spin"}}
    worker.config.actor_rollout_ref = {"rollout": rollout, "seed_responses": False}
    worker.background_tasks, worker._source, worker._at_once = set(), Judge(None, None), True
    columns = {"uid": ["p0", "p1"], "index": [0, 1], "raw_prompt": [[{"content": "a"}], [{"content": "b"}]]}
    batch = {name: np.empty(2, dtype=object) for name in columns}
    for name, values in columns.items():
        batch[name][:] = values
    batch = tu.get_tensordict(batch)
    tu.assign_non_tensor_data(batch, "global_steps", 1)

    async def run():
        await worker.generate_sequences(batch)
        await asyncio.wait_for(worker.settle(), 5)

    asyncio.run(run())
    assert asked == ["p0", "p1"] and statuses == {"p0": "finished", "p1": "finished"}
    assert sorted(given) == [("p0", 0, 0.0), ("p0", 1, 1.0), ("p1", 0, 0.0), ("p1", 1, 1.0)]


# ---------------------------------------------------------------------- held-out answers that a source compares


class PrefersLonger(PreferenceSource):
    async def score_group(self, group: Group) -> list[Score]:
        assert group.held_out and group.rewards is None
        return [Score(float(len(text)), {"step": group.step}) for text in group.responses]


@pytest.fixture
def compare(monkeypatch):
    """What a held-out answer of some tokens is worth beside the first validation's, and what the source noted."""

    async def scored(self, output, validate, **row):
        found.append((output.reward_score, output.extra_fields["reward_extra_info"]["preference"]))

    found: list[tuple[float, list]] = []
    monkeypatch.setattr(VerlWorker, "_agent_loop_postprocess", scored)

    def compare(tokens: int, **row) -> tuple[float, list]:
        worker = worker_with_unscored(Server(), count=2)
        worker._source, worker._compares_held_out = PrefersLonger(None, None), True
        row = {"uid": "a", "session_id": 0, "global_steps": 3, "raw_prompt": [{"content": "who?"}]} | row
        output = types.SimpleNamespace(response_ids=[0] * tokens, reward_score=None, extra_fields={})
        asyncio.run(worker._agent_loop_postprocess(output, True, **row))
        return found[-1]

    return compare


@pytest.mark.parametrize(("tokens", "worth"), [(4, 1.0), (3, 0.5), (2, 0.0)])
def test_a_held_out_answer_is_worth_what_it_is_beside_the_first_one(compare, tokens, worth):
    noted = [] if tokens == 3 else [{"step": 3}, {"step": 3}]  # the source is not asked about equal ones
    assert compare(tokens, **{FIRST_ANSWER: "xxx"}) == (worth, noted)


def test_the_first_held_out_answers_are_as_good_as_themselves(compare):
    assert compare(2) == (0.5, [])


def test_a_held_out_answer_that_has_none_beside_it_has_no_score(compare):
    worth, noted = compare(2, **{FIRST_ANSWER: None})
    assert math.isnan(worth) and noted == []


# ---------------------------------------------------------------------- scores that are given later


class Longest(PreferenceSource):
    """Asks vLLM about each group, and scores responses by their length."""

    async def score_group(self, group: Group) -> list[Score]:
        await group.generate(group.messages[0]["content"], {})
        return [Score(float(len(text)), {"step": group.step}) for text in group.responses[: self.config]]


FIRST, SECOND = "00000003-00000004", "00000003-00000005"  # uids of training prompts


def worker_with_unscored(*servers: Server, count: int, limit: float = 60.0) -> RolloutWorker:
    worker = RolloutWorker.__new__(RolloutWorker)
    worker.config = OmegaConf.create(
        {
            "reward": {"custom_reward_function": {"path": None}, "reward_model": {"enable": False}},
            "algorithm": {"reward_timeout_s": limit},
            "trainer": {"rollout_data_dir": None},
        }
    )
    worker.tokenizer = types.SimpleNamespace(decode=lambda tokens, skip_special_tokens: "x" * len(tokens))
    worker.llm_client, worker._source = client_of(*servers), Longest(count, None)
    row = {"global_steps": 3, "raw_prompt": [{"role": "user", "content": "who?"}]}
    worker._unscored = {
        uid: {
            n: (types.SimpleNamespace(response_ids=[0] * tokens, response_mask=[1] * tokens), row | {"session_id": n})
            for n, tokens in answers.items()
        }
        for uid, answers in {FIRST: {1: 7, 0: 5}, SECOND: {0: 2, 1: 1}}.items()
    }
    return worker


def test_groups_are_scored_once_in_the_order_of_their_responses():
    server = Server()
    worker = worker_with_unscored(server, count=2)
    found = asyncio.run(worker.score_groups())
    assert {uid: [score.value for score in scores] for uid, scores in found.items()} == {FIRST: [5, 7], SECOND: [2, 1]}
    assert found[FIRST][0].info == {"step": 3} and server.rounds == [["who?"], ["who?"]]
    assert asyncio.run(worker.score_groups()) == {} and len(server.rounds) == 2


def test_groups_are_scored_by_the_replicas_that_answered_them():
    servers = [Server() for _ in range(8)]
    asyncio.run(worker_with_unscored(*servers, count=2).score_groups())
    assert [len(server.rounds) for server in servers] == [0, 0, 0, 0, 1, 1, 0, 0]


def test_a_group_with_too_few_scores_is_refused():
    with pytest.raises(ValueError, match=r"Longest.score_group gave 1 scores for 2 responses to the prompt 'who\?'"):
        asyncio.run(worker_with_unscored(Server(), count=1).score_groups())


def test_a_reward_model_that_scores_later_has_given_a_source_no_rewards():
    rewards = []

    class Noting(Longest):
        async def score_group(self, group: Group) -> list[Score]:
            rewards.append(group.rewards)
            return await super().score_group(group)

    for given, expected in (([1.0, 2.0], [[1.0, 2.0], [1.0, 2.0]]), ([None, None], [None, None])):
        worker = worker_with_unscored(Server(), count=2)
        worker.config.reward.reward_model.enable, worker._source = True, Noting(2, None)
        for answers in worker._unscored.values():
            for number, (output, _) in answers.items():
                output.reward_score = given[number]
        asyncio.run(worker.score_groups())
        assert rewards == expected
        rewards.clear()


def test_scores_that_come_later_are_those_that_a_dump_of_the_step_shows(monkeypatch):
    kept = {}

    async def put(keys, fields, partition_id):
        assert partition_id == "train"
        kept.update(zip(keys, (row.tolist() for row in fields["rm_scores"].unbind()), strict=True))

    monkeypatch.setattr(queue.tq, "async_kv_batch_put", put)
    asyncio.run(worker_with_unscored(Server(), count=2).score_groups())
    assert kept == {}  # nothing else reads them
    worker = worker_with_unscored(Server(), count=2)
    worker.config.trainer.rollout_data_dir = "dump"
    asyncio.run(worker.score_groups())
    expected = {f"{FIRST}_0_0": 5, f"{FIRST}_1_0": 7, f"{SECOND}_0_0": 2, f"{SECOND}_1_0": 1}
    assert kept == {key: [0.0] * (score - 1) + [score] for key, score in expected.items()}


class Hanging(Longest):
    async def score_group(self, group: Group) -> list[Score]:
        await asyncio.sleep(0.4)
        return await super().score_group(group)


def test_a_source_that_gives_no_scores_is_given_up_unless_it_limits_itself():
    worker = worker_with_unscored(Server(), count=2, limit=0.1)
    worker._source = Hanging(2, None)
    told = r"Hanging.score_group did not return within algorithm.reward_timeout_s=0.1 s for the responses to the prompt"
    with pytest.raises(RewardError, match=told):
        asyncio.run(worker.score_groups())
    worker = worker_with_unscored(Server(), count=2, limit=0.1)
    worker._source = Hanging(2, None)
    worker._source.limits_itself = True
    assert len(asyncio.run(worker.score_groups())) == 2
