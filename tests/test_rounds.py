"""RoundServing: a round's requests are all with vLLM, in their order, before it schedules the first."""

import asyncio
import types

from recipe.spin.rollout.rounds import RoundServing


class Engine:
    """vLLM as far as a round needs it: takes requests after a while each, answers those it has when it is resumed."""

    def __init__(self):
        self.output_processor = types.SimpleNamespace(request_states={})
        self.events: list = []
        self.resumed = asyncio.Event()

    async def pause_generation(self, mode, clear_cache):
        assert (mode, clear_cache) == ("keep", False)
        self.events.append("pause")

    async def resume_generation(self):
        self.events.append("resume")
        self.resumed.set()

    async def answer(self, request_id: str, priority: int, seconds: float) -> str:
        await asyncio.sleep(seconds)
        self.output_processor.request_states[f"{request_id}-1234abcd"] = None
        self.events.append(priority)
        await self.resumed.wait()
        return request_id


class Server(RoundServing):
    """A server that refuses requests without a prompt."""

    def __init__(self, data_parallel_size: int):
        self.engine = Engine()
        self.config = types.SimpleNamespace(data_parallel_size=data_parallel_size)

    async def generate(self, request_id: str, prompt_ids: float | None, priority: int) -> str:
        if prompt_ids is None:
            raise ValueError("too long")
        return await self.engine.answer(request_id, priority, seconds=prompt_ids)


def serve(*requests: tuple[str, float | None], data_parallel_size: int = 1) -> tuple[list, dict]:
    """Runs a round of (id, seconds until vLLM has it, or None: it refuses) and returns (events, answers)."""

    async def run():
        server = Server(data_parallel_size)
        if data_parallel_size > 1:
            server.engine.resumed.set()
        calls = [{"request_id": name, "prompt_ids": delay} for name, delay in requests]
        return server.engine.events, {number: output async for number, output in server.generate_round(calls)}

    return asyncio.run(asyncio.wait_for(run(), 5))


def test_vllm_has_all_requests_with_their_places_before_it_goes_on():
    events, answers = serve(("a", 0.02), ("b", 0.0), ("c", 0.01))
    assert events == ["pause", 1, 2, 0, "resume"]
    assert answers == {0: "a", 1: "b", 2: "c"}


def test_a_refused_request_holds_nobody_up():
    events, answers = serve(("a", None), ("b", 0.0))
    assert events == ["pause", 1, "resume"]
    assert isinstance(answers[0], ValueError) and answers[1] == "b"


def test_rounds_that_overlap_are_held_together():
    """Of several agent loop workers: one that resumed vLLM would let another's pause wait for all answers."""

    async def run() -> list:
        server = Server(data_parallel_size=1)

        async def round_of(name: str, delay: float) -> list[str]:
            call = {"request_id": name, "prompt_ids": delay}
            return [output async for _, output in server.generate_round([call])]

        assert await asyncio.gather(round_of("a", 0.02), round_of("b", 0.04)) == [["a"], ["b"]]
        assert await round_of("c", 0) == ["c"]
        return server.engine.events

    events = asyncio.run(asyncio.wait_for(run(), 5))
    assert events == ["pause", 0, 0, "resume", "pause", 0, "resume"]


def test_data_parallel_engines_are_not_paused():
    events, answers = serve(("a", 0.0), ("b", 0.0), data_parallel_size=2)
    assert events == [0, 1] and len(answers) == 2
