"""Log-probs of responses, implicit rewards and beta schedules against numbers worked out by hand."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipe.spin.core_algos import beta_at, implicit_rewards, length_desensitized_logps, sequence_logps, wpo_weights

ROOT = Path(__file__).resolve().parents[1]


# ---- sequence_logps, implicit_rewards

GARBAGE = float("nan")


def test_sequence_logps_sum_and_mean():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, GARBAGE, float("-inf")], [GARBAGE, 7.0, GARBAGE]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert sequence_logps(logps, mask).tolist() == [-6.0, -4.0, 0.0]
    assert sequence_logps(logps, mask, average=True).tolist() == [-2.0, -4.0, 0.0]  # -6 / 3, -4 / 1, nothing


@pytest.mark.parametrize("average", [False, True])
def test_sequence_logps_gradient_stays_inside_the_mask(average):
    logps = torch.tensor([[-1.0, -2.0, GARBAGE], [GARBAGE, float("inf"), -1.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    sequence_logps(logps, mask, average).sum().backward()
    share = 0.5 if average else 1.0
    assert logps.grad.tolist() == [[share, share, 0.0], [0.0, 0.0, 0.0]]


def test_sequence_logps_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"'token_logps': \(2, 3\), 'response_mask': \(1, 3\)"):
        sequence_logps(torch.zeros(2, 3), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("kind", "summed"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2]
)
def test_2000_tokens_of_half_precision_are_summed(kind, summed):
    """float16 ends at -65504."""
    logps, mask = torch.full((1, 2000), -50.0, dtype=kind, requires_grad=True), torch.ones(1, 2000)
    total = sequence_logps(logps, mask)
    assert total.tolist() == [-100000.0] and total.dtype == summed
    total.backward()
    assert logps.grad.dtype == kind and (logps.grad == 1).all()
    assert length_desensitized_logps(logps, mask, torch.tensor([1000]), 0.5).tolist() == [-75000.0]
    assert wpo_weights(logps, logps + 0.5, mask).tolist() == pytest.approx([math.exp(-0.5)])
    assert implicit_rewards(total, total + 1, 0.5).tolist() == [-0.5]


ROWS = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wpo_weights(ROWS, torch.zeros(3, 1), ROWS), r"'log_expected_probs': \(3, 1\)"),
        (lambda: wpo_weights(ROWS, torch.zeros(2), ROWS), r"'log_expected_probs': \(2,\)"),
        (lambda: implicit_rewards(torch.zeros(3), torch.zeros(3, 1), 0.1), r"'reference_logps': \(3, 1\).*\(N\)"),
        (lambda: length_desensitized_logps(ROWS[:1], ROWS, torch.zeros(3), 0.1), r"'token_logps': \(1, 2\)"),
        (lambda: sequence_logps([[-1.0]], ROWS), "token_logps is of type list: pass a tensor"),
    ],
)
def test_nothing_broadcasts(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_implicit_rewards():
    # 0.1 * (-2 - -5) = 0.3
    assert implicit_rewards(torch.tensor([-2.0]), torch.tensor([-5.0]), 0.1).tolist() == pytest.approx([0.3])


# ---- length_desensitized_logps, wpo_weights


def test_tokens_beyond_the_shorter_response_count_alpha():
    logps = torch.tensor([[-1.0, -2.0, -4.0, -8.0], [-3.0, GARBAGE, -5.0, GARBAGE]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]])  # the second has 2 tokens, one masked between them
    shared = torch.tensor([2, 2])
    # -1 - 2 + alpha * (-4 - 8); the shorter response counts whole
    assert length_desensitized_logps(logps, mask, shared, 0.25).tolist() == [-6.0, -8.0]
    assert length_desensitized_logps(logps, mask, shared, 0.0).tolist() == [-3.0, -8.0]
    assert length_desensitized_logps(logps, mask, shared, 1.0).tolist() == sequence_logps(logps, mask).tolist()


def test_the_gradient_of_a_token_is_its_weight():
    logps = torch.tensor([[-1.0, -2.0, -4.0]], requires_grad=True)
    length_desensitized_logps(logps, torch.tensor([[1, 1, 1]]), torch.tensor([1]), 0.5).sum().backward()
    assert logps.grad.tolist() == [[1.0, 0.5, 0.5]]


def test_beside_an_empty_response_every_token_counts_alpha():
    logps, mask = torch.tensor([[-1.0, -2.0], [0.0, 0.0]]), torch.tensor([[1, 1], [0, 0]])
    assert length_desensitized_logps(logps, mask, torch.tensor([0, 0]), 0.5).tolist() == [-1.5, 0.0]
    assert length_desensitized_logps(logps[:, :0], mask[:, :0], torch.tensor([0, 0]), 0.5).tolist() == [0.0, 0.0]


def test_length_desensitized_logps_takes_a_length_for_each_response():
    with pytest.raises(ValueError, match=r"'shared': \(1,\), 'responses': \(2,\)"):
        length_desensitized_logps(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([1]), 0.5)


def test_wpo_weights_by_hand():
    # two tokens of probability 1/2 and 1/4 where drawn ones have 1/2 and 1/2 in the mean: exp((0 + log 1/2) / 2)
    logps = torch.tensor([[0.5, 0.25], [0.5, GARBAGE]]).log().requires_grad_()
    expected = torch.tensor([[0.5, 0.5], [0.125, GARBAGE]]).log()
    weights = wpo_weights(logps, expected, torch.tensor([[1, 1], [1, 0]]))
    assert weights.tolist() == pytest.approx([0.5**0.5, 4.0])
    assert not weights.requires_grad


# ---- beta_at


def test_a_number_is_beta_at_every_step():
    assert beta_at(0.1, 1, 10) == beta_at(0.1, 10, 10) == 0.1


def test_linear_and_cosine():
    linear = {"schedule": "linear", "start": 0.1, "end": 0.5}
    # 5 steps are 4 strides of 0.1
    assert [beta_at(linear, step, 5) for step in range(1, 6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    cosine = {"schedule": "cosine", "start": 0.5, "end": 0.1}
    # share of start (1 + cos(pi p)) / 2: 1, 0.8535533906, 0.5, 0.1464466094, 0
    assert [beta_at(cosine, step, 5) for step in range(1, 6)] == pytest.approx(
        [0.5, 0.44142135624, 0.3, 0.15857864376, 0.1]
    )


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_first_and_last_step_are_exact(kind):
    schedule = {"schedule": kind, "start": 0.1, "end": 0.7}
    assert (beta_at(schedule, 1, 7), beta_at(schedule, 7, 7), beta_at(schedule, 1, 1)) == (0.1, 0.7, 0.1)


def test_a_list_by_epoch_whose_last_value_holds_on():
    betas = [beta_at([0.3, 0.2], step, 7, steps_per_epoch=2) for step in range(1, 8)]
    assert betas == [0.3, 0.3, 0.2, 0.2, 0.2, 0.2, 0.2]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (0, r"dpo_beta\) is or contains 0"),
        ("0.1", r"dpo_beta\) is or contains '0.1'"),
        ([0.1, -0.1], r"dpo_beta\) is or contains -0.1"),
        ([], r"dpo_beta\) is \[\]"),
        ({"schedule": "step", "start": 0.1, "end": 0.2}, r"dpo_beta\).*linear or cosine"),
        ({"schedule": "linear", "start": 0.1}, r"dpo_beta\).*start and end"),
        ({"schedule": "linear", "start": 0.1, "end": 0.2, "stop": 0.3}, r"dpo_beta\).*'stop'"),
        ({"schedule": "linear", "start": 0.1, "end": 0.0}, r"dpo_beta\) is or contains 0.0"),
        ({"schedule": "linear", "start": "a", "end": 0.1}, r"dpo_beta\) is or contains 'a'"),
    ],
)
def test_schedules_that_make_no_sense(schedule, message):
    with pytest.raises(ValueError, match=message):
        beta_at(schedule, 1, 10, steps_per_epoch=5)


@pytest.mark.parametrize("steps_per_epoch", [None, 0])
def test_a_list_takes_steps_per_epoch(steps_per_epoch):
    with pytest.raises(ValueError, match=f"steps_per_epoch.*{steps_per_epoch}"):
        beta_at([0.1], 1, 10, steps_per_epoch)


@pytest.mark.parametrize("step", [0, 11])
def test_steps_count_from_one_to_the_last(step):
    with pytest.raises(ValueError, match=f"step is {step}.*total_steps=10"):
        beta_at(0.1, step, 10)


# ---- the module


def test_import_takes_torch_alone():
    """Other recipes import this module without paying for Ray, vLLM, verl or transformers."""
    code = (
        "import sys, recipe.spin.core_algos; "
        "print(*sorted({'ray', 'vllm', 'verl', 'transformers', 'tensordict', 'omegaconf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
