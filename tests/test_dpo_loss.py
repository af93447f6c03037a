"""The loss of a micro-batch and its metrics, on tensors made by hand."""

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from verl.utils import tensordict_utils as tu
from verl.utils.metric.utils import AggregationType, Metric
from verl.utils.torch_functional import get_constant_schedule_with_warmup
from worker_harness import nest

from recipe.spin.core_algos import LossOptions
from recipe.spin.dp_actor import DataParallelPPOActor, DPOSettings, coupled_gradient, dpo_loss
from recipe.spin.engine.plan import MiniBatch
from recipe.spin.engine.rows import make_rows

# Response lengths of 3 pairs (chosen, rejected), each of a row of its own; every prompt has 2 tokens.
LENGTHS = [(2, 3), (1, 2), (3, 1)]
LOGPS = [(-2.0, -4.0), (-1.0, -2.5), (-3.0, -1.5)]
REF_LOGPS = [(-3.0, -3.0), (-1.0, -1.5), (-2.0, -3.0)]
BETA = 0.5
H = [1 + 1, 0 + 1, -1 - 1.5]  # log-ratio of chosen less that of rejected: 2, 1, -2.5
PAIR_LOSSES = [math.log1p(math.exp(-BETA * h)) for h in H]


def micro_batch(numbers=range(3), weights=(1.0, 1.0, 1.0), dp_size=1, total=3.0, first_step=False):
    """Rows of the mini-batch above as dpo_loss gets them, and the model's output with its leaf of log-probs."""
    numbers = list(numbers)
    data = make_rows(
        [torch.tensor([7, 7])] * len(numbers), [[torch.full((n,), 5) for n in LENGTHS[i]] for i in numbers]
    )
    data["ref_logps"] = nest([list(REF_LOGPS[i]) for i in numbers])
    data["chosen"], data["rejected"] = nest([[0]] * len(numbers)), nest([[1]] * len(numbers))
    data["pair_weight"] = nest([[weights[i]] for i in numbers])
    data["prompt"] = torch.tensor(numbers)
    tu.assign_non_tensor(data, mini_batch=MiniBatch(3, total, 2.0), dp_size=dp_size, first_step=first_step)
    leaf = torch.tensor([logp for i in numbers for logp in LOGPS[i]], requires_grad=True)
    tokens = [[logp / n] * n for i in numbers for logp, n in zip(LOGPS[i], LENGTHS[i], strict=True)]
    output = {
        "logps": torch.nested.nested_tensor_from_jagged(leaf, torch.arange(0, 2 * len(numbers) + 1, 2)),
        "token_logps": nest([tokens[2 * i] + tokens[2 * i + 1] for i in range(len(numbers))]),
    }
    return output, data, leaf


def value_of(metrics: dict, name: str) -> float:
    assert metrics[name].aggregation is AggregationType.SUM
    return metrics[name].aggregate()


def test_loss_is_the_mean_over_pairs():
    output, data, leaf = micro_batch()
    loss, _ = dpo_loss(output, data, settings=DPOSettings(beta=BETA))
    assert loss.item() == pytest.approx(sum(PAIR_LOSSES) / 3, rel=1e-6)
    loss.backward()
    # d loss / d log-prob of pair p: -+ beta sigma(-beta h_p) / 3
    slopes = [BETA / (1 + math.exp(BETA * h)) / 3 for h in H]
    torch.testing.assert_close(leaf.grad, torch.tensor([s for slope in slopes for s in (-slope, slope)]))


def test_metrics_are_means_over_pairs():
    output, data, _ = micro_batch()
    _, metrics = dpo_loss(output, data, settings=DPOSettings(beta=BETA))
    expected = {
        "rewards/chosen": BETA * (1 + 0 - 1) / 3,
        "rewards/rejected": BETA * (-1 - 1 + 1.5) / 3,
        "rewards/margins": BETA * (2 + 1 - 2.5) / 3,
        "rewards/accuracies": 2 / 3,
        "logps/chosen": (-2 - 1 - 3) / 3,
        "logps/rejected": (-4 - 2.5 - 1.5) / 3,
        "kl/chosen": 0 / 3,
        "kl/sequence": (0 / 2 - 1 / 2 + 0.5 / 2) / 3,  # mean over both responses of a pair
        "response_length/chosen": 2.0,
        "response_length/rejected": 2.0,
    }
    assert metrics.keys() == expected.keys()
    assert {name: value_of(metrics, name) for name in metrics} == pytest.approx(expected, abs=1e-6)


def test_where_the_reference_is_the_policy_its_log_probs_are_the_policys():
    """log 2 a pair, no reward, and the gradient that equal log-probs of a reference would give."""
    output, data, leaf = micro_batch()
    tu.assign_non_tensor(data, mini_batch=replace(tu.get(data, "mini_batch"), reference_is_policy=True))
    del data["ref_logps"]
    loss, metrics = dpo_loss(output, data, settings=DPOSettings(beta=BETA))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert value_of(metrics, "rewards/margins") == value_of(metrics, "kl/sequence") == 0
    torch.testing.assert_close(leaf.grad, torch.tensor([-1.0, 1.0] * 3) * BETA / 2 / 3)


@pytest.mark.parametrize(
    "parts", [[[0], [1], [2]], [[0, 1], [2]], [[2, 0], [1]]], ids=lambda parts: "+".join(map(str, map(len, parts)))
)
@pytest.mark.parametrize("dp_size", [1, 2])
def test_micro_batches_and_ranks_add_up_to_the_mean(parts, dp_size):
    """Micro-batches add up within a rank; FSDP then averages over dp_size ranks."""
    losses, metrics, gradient = 0.0, Counter(), {}
    for part in parts:
        output, data, leaf = micro_batch(part, dp_size=dp_size)
        loss, values = dpo_loss(output, data, settings=DPOSettings(beta=BETA))
        losses += loss.item() / dp_size
        metrics.update({name: value_of(values, name) / dp_size for name in values})
        loss.backward()
        gradient |= {row: grad / dp_size for row, grad in zip(part, leaf.grad.split(2), strict=True)}
    output, data, leaf = micro_batch()
    whole, whole_metrics = dpo_loss(output, data, settings=DPOSettings(beta=BETA))
    whole.backward()
    assert losses == pytest.approx(sum(PAIR_LOSSES) / 3, rel=1e-6)
    assert dict(metrics) == pytest.approx({name: value_of(whole_metrics, name) for name in whole_metrics}, abs=1e-6)
    torch.testing.assert_close(torch.cat([gradient[row] for row in range(3)]), leaf.grad)


def length_desensitized(alpha: float) -> list[float]:
    """The losses of the pairs above if all tokens of a response are as likely, by the token's share of it."""
    losses = []
    for (chosen, rejected), lengths, reference in zip(LOGPS, LENGTHS, REF_LOGPS, strict=True):
        shares = [(min(lengths) + alpha * (length - min(lengths))) / length for length in lengths]
        h = shares[0] * (chosen - reference[0]) - shares[1] * (rejected - reference[1])
        losses.append(math.log1p(math.exp(-BETA * h)))
    return losses


def with_reference_tokens(data):
    """The rows with the reference's log-probs of tokens, all tokens of a response being as likely."""
    tokens = [
        [value / length for value, length in zip(REF_LOGPS[i], LENGTHS[i], strict=True) for _ in range(length)]
        for i in data["prompt"].tolist()
    ]
    data["ref_token_logps"] = nest(tokens)
    return data


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_length_desensitization_cuts_policy_and_reference_alike(alpha):
    output, data, _ = micro_batch()
    settings = DPOSettings(beta=BETA, options=LossOptions(ld_alpha=alpha))
    loss, metrics = dpo_loss(output, with_reference_tokens(data), settings=settings)
    assert loss.item() == pytest.approx(sum(length_desensitized(alpha)) / 3, rel=1e-6)
    # what tells of likelihood is of whole responses
    _, whole = dpo_loss(*micro_batch()[:2], settings=DPOSettings(beta=BETA))
    for name in ("logps/chosen", "logps/rejected", "kl/sequence"):
        assert value_of(metrics, name) == value_of(whole, name)


def test_length_desensitization_where_the_reference_is_the_policy():
    """Its tokens' log-probs are the policy's: log 2 a pair, and the gradient of tokens is cut."""
    output, data, _ = micro_batch()
    tu.assign_non_tensor(data, mini_batch=replace(tu.get(data, "mini_batch"), reference_is_policy=True))
    del data["ref_logps"]
    leaf = output["token_logps"].values().clone().requires_grad_()
    output["token_logps"] = torch.nested.nested_tensor_from_jagged(leaf, output["token_logps"].offsets())
    settings = DPOSettings(beta=BETA, options=LossOptions(ld_alpha=0.4))
    loss, metrics = dpo_loss(output, data, settings=settings)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert value_of(metrics, "rewards/margins") == 0
    weights = [-1, -1, 1, 1, 0.4, -1, 1, 0.4, -1, -0.4, -0.4, 1]  # chosen down, rejected up; lengths 2 3, 1 2, 3 1
    torch.testing.assert_close(leaf.grad, torch.tensor(weights) * BETA / 2 / 3)


def test_the_learning_rate_of_a_step_is_the_one_that_it_trained_with():
    """verl's worker advances the schedule after the last optimizer step, and reports what it comes to then."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=10)
    actor = DataParallelPPOActor.__new__(DataParallelPPOActor)
    actor.engine = SimpleNamespace(train_mode=nullcontext, optimizer=optimizer)
    actor._token_counts = lambda rows: [1]

    def train_batch(rows):
        optimizer.step()
        found = {"grad_norm": 1.0}
        if tu.get(rows, "update_lr_scheduler"):
            schedule.step()
            found["lr"] = schedule.get_last_lr()[0]
        return tu.get_tensordict({}, non_tensor_dict={"metrics": found})

    actor.train_batch = train_batch
    rates = []
    for _ in range(3):
        rows = make_rows([torch.ones(1).long()] * 2, [[torch.ones(1).long()]] * 2)
        tu.assign_non_tensor(rows, dpo=DPOSettings(beta=BETA), mini_batches=[MiniBatch(1, 1.0, 1.0)] * 2, epochs=1)
        rates.append(tu.get(actor.train_mini_batch(rows), "metrics")["lr"])
    assert rates == [[0.0, 0.0], pytest.approx([0.1, 0.1]), pytest.approx([0.2, 0.2])]


def test_wpo_weights_multiply_the_losses_of_pairs():
    output, data, leaf = micro_batch()
    weights = [(0.5, 1.0), (0.25, 2.0), (1.0, 1.0)]
    output["wpo_weights"] = nest([list(pair) for pair in weights])
    loss, metrics = dpo_loss(output, data, settings=DPOSettings(beta=BETA, options=LossOptions(use_weighting=True)))
    products = [chosen * rejected for chosen, rejected in weights]
    expected = sum(weight * loss for weight, loss in zip(products, PAIR_LOSSES, strict=True)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert value_of(metrics, "pairs/wpo_weight") == pytest.approx(sum(products) / 3)
    loss.backward()
    assert leaf.grad.abs().min() > 0


def test_pairs_without_weight_count_nothing():
    """The third row is a copy: neither its loss nor its gradient nor its metrics count."""
    output, data, leaf = micro_batch(weights=(1.0, 1.0, 0.0), total=2.0)
    loss, metrics = dpo_loss(output, data, settings=DPOSettings(beta=BETA))
    loss.backward()
    assert loss.item() == pytest.approx(sum(PAIR_LOSSES[:2]) / 2, rel=1e-6)
    assert value_of(metrics, "rewards/accuracies") == pytest.approx(1.0)
    assert value_of(metrics, "response_length/chosen") == pytest.approx(1.5)
    assert leaf.grad[-2:].abs().max() == 0 and leaf.grad[:-2].abs().min() > 0


def test_weights_of_pairs_are_relative():
    output, data, _ = micro_batch(weights=(0.5, 0.5, 1.0), total=2.0)
    loss, _ = dpo_loss(output, data, settings=DPOSettings(beta=BETA))
    assert loss.item() == pytest.approx((PAIR_LOSSES[0] + PAIR_LOSSES[1] + 2 * PAIR_LOSSES[2]) / 4, rel=1e-6)


def test_a_loss_that_sorts_pairs_refuses_weights_of_which_it_would_know_nothing():
    table = torch.cat([torch.randn(4, 3), torch.ones(2, 3), torch.tensor([[1.0, 1.0, 0.0]])])  # the last one is a copy
    settings = DPOSettings(beta=BETA, loss_type=("aot",))
    gradient, losses = coupled_gradient(table, settings)
    assert (gradient != 0).all(0).tolist() == (losses != 0).tolist() == [True, True, False]
    table[6, 1] = 0.5
    with pytest.raises(ValueError, match=r"weigh between 0.5 and 1, .* aot, .*preference_source"):
        coupled_gradient(table, settings)


def test_a_response_of_several_pairs_gets_the_gradient_of_each():
    """Three responses, the first preferred to both others."""
    data = make_rows([torch.tensor([7])], [[torch.tensor([5])] * 3])
    data["ref_logps"] = nest([[-3.0, -3.0, -2.0]])
    data["chosen"], data["rejected"], data["pair_weight"] = nest([[0, 0]]), nest([[1, 2]]), nest([[0.5, 0.5]])
    data["prompt"] = torch.tensor([0])
    tu.assign_non_tensor(data, mini_batch=MiniBatch(1, 1.0, 1.0), dp_size=1, first_step=False)
    leaf = torch.tensor([-2.0, -4.0, -1.0], requires_grad=True)
    output = {"logps": torch.nested.nested_tensor_from_jagged(leaf, torch.tensor([0, 3]))}
    loss, _ = dpo_loss(output, data, settings=DPOSettings(beta=BETA))
    loss.backward()
    slopes = [0.5 * BETA / (1 + math.exp(BETA * h)) for h in (1 + 1, 1 - 1)]
    torch.testing.assert_close(leaf.grad, torch.tensor([-sum(slopes), *slopes]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_makes_every_gradient_so(bad, capsys):
    """An infinite loss may have a finite gradient, by which the step would be taken."""
    output, data, leaf = micro_batch()
    data["ref_logps"] = nest([[bad, -3.0], [-1.0, -1.5], [-2.0, -3.0]])
    loss, _ = dpo_loss(output, data, settings=DPOSettings(beta=BETA))
    loss.backward()
    assert leaf.grad.isnan().all()
    told = capsys.readouterr().err
    assert "prompts [0, 1, 2]" in told and "-2.0, -1.0" in told


def test_mean_log_probs_are_divergences_of_whole_responses():
    """With dpo_average_log_prob the engine gives means; the divergence is still that of whole responses."""
    output, data, leaf = micro_batch([0], total=1.0)
    output["logps"] = torch.nested.nested_tensor_from_jagged(leaf / torch.tensor([2, 3]), torch.tensor([0, 2]))
    data["ref_logps"] = nest([[-1.5, -1.0]])  # means too
    loss, metrics = dpo_loss(output, data, settings=DPOSettings(beta=BETA, average_log_prob=True))
    h = (-2 / 2 + 1.5) - (-4 / 3 + 1.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-BETA * h)), rel=1e-6)
    assert value_of(metrics, "logps/chosen") == pytest.approx(-1.0)
    assert value_of(metrics, "kl/sequence") == pytest.approx((0.5 * 2 - 1 / 3 * 3) / 2, abs=1e-6)


def test_losses_are_added_up_with_their_weights():
    output, data, _ = micro_batch()
    both = DPOSettings(beta=BETA, loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.5))
    loss, _ = dpo_loss(output, data, settings=both)
    sft = sum(-chosen / 2.0 for chosen, _ in LOGPS) / 3  # 2 is the mini-batch's mean chosen length
    assert loss.item() == pytest.approx(sum(PAIR_LOSSES) / 3 + 0.5 * sft, rel=1e-6)


def test_reference_free_leaves_the_reference_out():
    output, data, _ = micro_batch([0], total=1.0)
    loss, _ = dpo_loss(output, data, settings=DPOSettings(beta=BETA, reference_free=True))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-BETA * 2)), rel=1e-6)


def test_gap_to_the_rollout_is_measured_before_the_first_step():
    """Only there are actor and rollout the same model."""
    for first_step in (True, False):
        output, data, _ = micro_batch([0], total=1.0, first_step=first_step)
        data["rollout_log_probs"] = nest([[-1.0, -1.25, *[-4 / 3] * 3]])
        _, metrics = dpo_loss(output, data, settings=DPOSettings(beta=BETA))
        assert ("rollout/logp_gap_max" in metrics) == first_step
        if first_step:
            assert metrics["rollout/logp_gap_max"].aggregate() == pytest.approx(0.25, abs=1e-6)
            assert Metric.aggregate_dp([metrics["rollout/logp_gap_max"]]) == pytest.approx(0.25, abs=1e-6)


def test_gap_to_the_opponent_is_that_of_its_responses():
    output, data, _ = micro_batch([0, 1], total=2.0)
    data["opponent_logps"] = nest([[math.nan, -3.5], [math.nan, -1.5]])  # the data's responses have none
    _, metrics = dpo_loss(output, data, settings=DPOSettings(beta=BETA))
    assert metrics["rollout/opponent_gap_max"].aggregate() == pytest.approx(0.5)
