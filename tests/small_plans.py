"""Plans of rows for tests, with what does not matter filled in."""

from recipe.spin.engine.plan import plan_mini_batches


def plan(prompts, dp_size=1, prompts_per_mini_batch=100, tokens=None, weights=None, lengths=None, micro=None):
    rows = len(prompts)
    weights = weights or [1.0] * rows
    lengths = lengths or [5] * rows
    return plan_mini_batches(
        prompts,
        tokens or [10] * rows,
        weights,
        [weight * length for weight, length in zip(weights, lengths, strict=True)],
        prompts_per_mini_batch,
        dp_size,
        micro,
    )
