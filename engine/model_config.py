"""verl's model settings with the recipe's own key."""

from dataclasses import dataclass

from verl.workers.config import HFModelConfig


@dataclass
class RowModelConfig(HFModelConfig):
    """`actor_rollout_ref.model`.

    Attributes:
        share_prompt: compute a prompt once for all its responses. False gives each response a copy of it, which models
            need whose tokens depend on each other by more than attention (recurrent or linear layers).
    """

    share_prompt: bool = True
