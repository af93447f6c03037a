"""What verl 0.9.1 gets wrong for this recipe and offers no hook for."""

from verl.models.transformers import monkey_patch


def ignore_trl() -> None:
    """With TRL installed verl imports its value-head model to patch it; TRL 1.x has none, and loading a model fails."""
    monkey_patch.is_trl_available = lambda: False
