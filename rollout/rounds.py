"""Rounds: the requests of many sessions reach vLLM's scheduler at one time and in one order.

vLLM's batches, and with them what its arithmetic rounds, follow from the order and the time at which requests arrive.
Here neither depends on chance. `Round` collects the requests where they are made, `RoundServing` hands them to vLLM.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import cached_property
from typing import Any

ADMISSION_POLL_SECONDS = 0.002

Session = tuple[str, int]  # a prompt's uid, and the number of the response
Request = tuple[Session, dict[str, Any], asyncio.Future]


class Round:
    """The sessions of a round: their first requests are sent together, in the order of the sessions.

    A session that ends without a request, by a fault, leaves; nobody waits for it.

    Attributes:
        numbers: of each prompt, counted over the rounds of all workers: what spreads prompts over replicas. Places in
            a round would not: each worker's begin at 0, and replicas beyond the longest round would get no prompt.
    """

    def __init__(
        self, responses: dict[str, int], send: Callable[[list[Request]], None] | None, numbers: dict[str, int]
    ):
        self.responses = responses
        self.numbers = numbers
        self._send = send
        self.prompts = {uid: place for place, uid in enumerate(responses)}
        self._awaited = {(uid, number) for uid, count in responses.items() for number in range(count)}
        self._requests: list[Request] = []

    def awaits(self, session: Session) -> bool:
        return session in self._awaited

    def ask(self, session: Session, request: dict) -> asyncio.Future:
        """The answer to a session's first request."""
        answer = asyncio.get_running_loop().create_future()
        self._requests.append((session, request, answer))
        self._leave({session})
        return answer

    def leave(self, session: Session) -> None:
        self._leave({session})

    def leave_prompt(self, uid: str) -> None:
        self._leave({(uid, number) for number in range(self.responses[uid])})

    def _leave(self, sessions: set[Session]) -> None:
        self._awaited -= sessions
        if not self._awaited and self._requests:
            requests, self._requests = self._requests, []
            self._send(sorted(requests, key=lambda entry: (self.prompts[entry[0][0]], entry[0][1])))


class Hold:
    """Within, vLLM schedules nothing and takes requests; where rounds overlap, until the last of them leaves.

    Each agent loop worker sends rounds of its own. Were one to resume vLLM while another waits for its pause, that
    pause would end when vLLM has nothing more to do: with all others' answers.
    """

    def __init__(self, engine):
        self._engine = engine
        self._inside = 0
        self._turn = asyncio.Lock()  # a pause and a resume of vLLM's never overlap

    async def __aenter__(self) -> None:
        async with self._turn:
            if not self._inside:
                await self._engine.pause_generation(mode="keep", clear_cache=False)
            self._inside += 1

    async def __aexit__(self, *fault) -> None:
        async with self._turn:
            self._inside -= 1
            if not self._inside:
                await self._engine.resume_generation()


class RoundServing:
    """What verl's vLLM server needs besides to answer a round; uses its `generate`, `engine` and `config`."""

    @cached_property
    def _hold(self) -> AbstractAsyncContextManager:
        # Data-parallel engines agree on a pause among each other, which takes a wave of requests to happen
        return Hold(self.engine) if self.config.data_parallel_size == 1 else nullcontext()

    async def generate_round(self, requests: list[dict]) -> AsyncIterator[tuple[int, Any]]:
        """Answers requests that vLLM schedules from the first one on as if all had come at once, in their order.

        Yields (number of the request, answer or what it failed by) as they finish.
        """
        tasks: dict[asyncio.Task, int] = {}
        async with self._hold:
            for number, request in enumerate(requests):
                tasks[asyncio.create_task(self.generate(**request, priority=number))] = number
            await self._admitted(dict(zip(tasks, (request["request_id"] for request in requests), strict=True)))
        running = set(tasks)
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=tasks.get):
                yield tasks[task], task.exception() or task.result()

    async def _admitted(self, requests: dict[asyncio.Task, str]) -> None:
        """Waits until vLLM has each request or has refused it."""
        waiting = requests
        while waiting:
            await asyncio.sleep(ADMISSION_POLL_SECONDS)
            known = self._known()
            waiting = {task: name for task, name in waiting.items() if not task.done() and name not in known}

    def _known(self) -> set[str]:
        """The names of the requests that vLLM has."""
        states = self.engine.output_processor.request_states
        return {name for key in states for name in (key, key.rpartition("-")[0])}  # vLLM may append to an id
