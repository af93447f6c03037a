"""How a prompt is answered: verl's single turn, with a seed of its own for every response."""

import zlib
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

# Columns that SpinTrainer adds to a batch of prompts
GREEDY = "spin_greedy"  # answer greedily, whatever the sampling parameters say
SAMPLING_SEED = "spin_sampling_seed"  # names the prompt within the run


class SpinAgentLoop(SingleTurnAgentLoop):
    """Seeds each response by the run's seed, the prompt's place in the run and the response's number.

    What a response is then depends neither on how requests meet in vLLM's batches nor on earlier runs.
    """

    async def run(self, sampling_params: dict[str, Any], **kwargs) -> AgentLoopOutput:
        params = dict(sampling_params)
        if kwargs.get(GREEDY, False):
            params.update(temperature=0.0, top_p=1.0, top_k=-1)
        else:
            identity = f"{self.rollout_config.seed}/{kwargs[SAMPLING_SEED]}/{kwargs['session_id']}"
            params["seed"] = zlib.crc32(identity.encode())
        return await super().run(params, **kwargs)
