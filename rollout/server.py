"""verl's vLLM server and replica, for rounds; a server ends with its engine."""

import os
import secrets
import sys
import threading
import time

import ray
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.sampling_params import RequestOutputKind

from recipe.spin.rollout.rounds import RoundServing
from recipe.spin.run import heap

ENGINE_POLL_SECONDS = 1.0


class RolloutServer(RoundServing, vLLMHttpServer):
    """verl's vLLM server with a call for a whole round; its workers take weights from this run alone."""

    def __init__(self, *args, **kwargs):
        # Requests come through Ray; the HTTP server that verl starts beside it answers nobody without the key
        os.environ.setdefault("VLLM_API_KEY", secrets.token_hex(16))
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

    async def generate(self, prompt_ids, sampling_params, request_id, **options) -> TokenOutput:
        """As verl's. vLLM reports each answer once, complete and as tokens: verl asks for neither parts nor text."""
        params = {"output_kind": RequestOutputKind.FINAL_ONLY, **sampling_params}
        params.setdefault("detokenize", bool(params.get("stop")))
        return await super().generate(prompt_ids, params, request_id, **options)


class RolloutReplica(vLLMReplica):
    """verl's replica with our server."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(RolloutServer)
