"""verl's vLLM servers and replica, for rounds and for reward models; a server ends with its engine."""

import asyncio
import os
import secrets
import sys
import threading
import time

import ray
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.sampling_params import RequestOutputKind

from recipe.spin.common import heap
from recipe.spin.rollout.orphans import SERVER_PID
from recipe.spin.rollout.rounds import ADMISSION_POLL_SECONDS, RoundServing

ENGINE_POLL_SECONDS = 1.0


class ModelServer(vLLMHttpServer):
    """verl's vLLM server, which ends with its engine. A reward model's answers over HTTP, to the reward function."""

    def __init__(self, *args, **kwargs):
        os.environ[SERVER_PID] = str(os.getpid())
        super().__init__(*args, **kwargs)

    def _get_worker_extension_cls(self) -> str:
        return "recipe.spin.rollout.vllm_worker.RolloutWorkerExtension"

    async def run_server(self, args) -> None:
        await super().run_server(args)
        heap.hand_back()
        threading.Thread(target=self._end_with_engine, name="end-with-engine", daemon=True).start()

    def _end_with_engine(self) -> None:
        """vLLM lets requests to an engine that died wait for ever; that a server is gone Ray tells everybody."""
        while not self.engine.errored:
            time.sleep(ENGINE_POLL_SECONDS)
        sys.stderr.write("vLLM's engine, a process of this server's, died; the server ends with it\n")
        sys.stderr.flush()
        os._exit(1)


class RolloutServer(RoundServing, ModelServer):
    """The policy's, with a call for a whole round."""

    def __init__(self, *args, **kwargs):
        self._passed: set[str] = set()  # the names of requests that are through verl's gate
        super().__init__(*args, **kwargs)

    async def run_server(self, args) -> None:
        """As verl's, whose HTTP server answers nobody without the key: requests come through Ray.

        The key is in no variable while vLLM starts: it keeps what it compiled under a name made of its variables, in
        each start another one then, and writes them beside it.
        """
        args.api_key = args.api_key or [os.environ.pop("VLLM_API_KEY", None) or secrets.token_hex(16)]
        await super().run_server(args)

    async def generate(self, prompt_ids, sampling_params, request_id, **options) -> TokenOutput:
        """As verl's. vLLM reports each answer once, complete and as tokens: verl asks for neither parts nor text."""
        params = {"output_kind": RequestOutputKind.FINAL_ONLY, **sampling_params}
        params.setdefault("detokenize", bool(params.get("stop")))
        try:
            return await super().generate(prompt_ids, params, request_id, **options)
        finally:
            self._passed.discard(request_id)

    async def _park_until_admitted(self, request_id: str) -> TokenOutput | None:
        rejected = await super()._park_until_admitted(request_id)
        if rejected is None:
            self._passed.add(request_id)
        return rejected

    async def abort_all_requests(self, reset_prefix_cache: bool = True, reject_request: bool = False) -> dict:
        """As verl's: closes the gate, and makes vLLM return what it has of each response.

        verl's waits, up to 60 s, until each request has given its first output: here that is the whole answer, and a
        request whose turn in vLLM has not come has none for long. That vLLM has them all is enough.
        """
        if self.node_rank != 0:
            return {"aborted_count": 0, "request_ids": []}
        self._submission_paused, self._rejecting = True, reject_request
        self._resume_event.clear()
        while self._passed - self._known():
            await asyncio.sleep(ADMISSION_POLL_SECONDS)
        aborted = list(self.engine.output_processor.request_states)
        await self.engine.pause_generation(mode="abort", clear_cache=reset_prefix_cache)
        return {"aborted_count": len(aborted), "request_ids": aborted}


class RolloutReplica(vLLMReplica):
    """verl's replica with our servers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(ModelServer if self.is_reward_model else RolloutServer)
