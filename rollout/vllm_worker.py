"""What a vLLM worker has besides its own: verl's receiver of weights, on the run's socket and with a time limit."""

import os

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from recipe.spin import verl_patches
from recipe.spin.rollout.orphans import end_engine_with_server
from recipe.spin.rollout.weights import own_socket

verl_patches.limit_weight_transfer()
verl_patches.keep_rendezvous_on_loopback()
end_engine_with_server(os.environ)


class RolloutWorkerExtension(vLLMColocateWorkerExtension):
    def _get_zmq_handle(self) -> str:
        return own_socket(super()._get_zmq_handle())
