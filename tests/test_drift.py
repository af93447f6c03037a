"""When a run warns that likelihood or length leave their bounds, and that a healthy run never does."""

import io
import json
import sys

import pytest

from benchmarks.results import FOLDER
from recipe.spin.run import monitor
from recipe.spin.run.drift import WINDOW, Drift, find_drift
from recipe.spin.run.monitor import RunMonitor

# The default run of 2026-11-28 on a CPU, seed 1: tokens' log-prob, chosen and rejected lengths, mean length,
# rewards/chosen
DEFAULT_RUN = [
    (-1.456, 13.357, 14.214, 13.969, 0.000),
    (-0.865, 11.611, 14.667, 13.016, 0.112),
    (-0.786, 12.174, 12.957, 12.289, 0.126),
    (-0.282, 10.227, 12.364, 11.094, 0.321),
    (-0.364, 10.176, 11.647, 10.625, 0.000),
    (-0.106, 10.278, 10.556, 10.562, 0.040),
    (-0.173, 9.923, 8.769, 10.070, 0.059),
    (-0.046, 9.500, 11.167, 10.023, 0.061),
    (-0.318, 10.538, 10.308, 10.102, 0.004),
    (-0.319, 10.818, 10.182, 9.914, 0.000),
    (-0.052, 9.875, 10.000, 10.125, 0.055),
    (-0.045, 10.571, 11.286, 10.336, -0.026),
]
# The same with half the learning rate, the default of 2026-11-25
EARLIER_RUN = [
    (-1.295, 13.071, 14.286, 13.945, 0.000),
    (-0.637, 11.462, 13.000, 13.234, 0.031),
    (-0.766, 11.938, 15.438, 13.398, 0.071),
    (-0.655, 11.053, 13.579, 12.648, 0.117),
    (-1.138, 12.238, 13.952, 12.305, 0.000),
    (-0.638, 11.722, 12.333, 12.188, 0.019),
    (-0.798, 11.150, 12.600, 12.250, 0.034),
    (-0.567, 10.500, 12.167, 11.281, 0.094),
    (-0.401, 11.333, 10.333, 10.969, 0.140),
    (-0.359, 11.077, 14.308, 11.828, 0.000),
    (-0.412, 10.688, 12.625, 11.273, 0.020),
    (-0.222, 10.800, 11.600, 11.281, 0.022),
]


def metrics(token=-0.5, chosen=10.0, rejected=10.0, mean=10.0, reward=0.0, refreshed=0.0) -> dict[str, float]:
    return {
        "logps/chosen_token": token,
        "response_length/gap": chosen - rejected,
        "response_length/mean": mean,
        "kl/chosen": reward / 0.1,
        "training/reference_refreshed": refreshed,
    }


def history(*steps: dict[str, float]) -> list[dict[str, float]]:
    return [{"step": number, **one} for number, one in enumerate(steps, start=1)]


@pytest.mark.parametrize("run", [DEFAULT_RUN, EARLIER_RUN])
def test_the_default_run_warns_of_nothing(run):
    steps = history(*(metrics(*row, refreshed=float(step in (5, 10))) for step, row in enumerate(run, start=1)))
    assert [find_drift(steps[:number]) for number in range(len(steps) + 1)] == [{}] * (len(steps) + 1)


@pytest.mark.parametrize("judge", ["knows the rule", "turned round"])
def test_the_recorded_runs_of_judges_warn_of_nothing(judge):
    """Turned round it unlearns the task, and what that judge prefers loses no likelihood."""
    found = json.loads((FOLDER / "2026-11-30-judge.json").read_text())["runs"][judge]
    steps = [{"step": int(step), **one} for step, one in found["by_step"].items()]
    assert [find_drift(steps[:number]) for number in range(len(steps) + 1)] == [{}] * (len(steps) + 1)


def test_chosen_responses_that_lose_likelihood():
    good, bad = [metrics(-0.4)] * 4, [metrics(-1.0)] * 4
    (kind, text), *others = find_drift(history(*good, *bad)).items()
    assert kind == "likelihood" and not others
    assert "-1.00 nats a token over steps 5 to 8, after -0.40 at best (logps/chosen_token)" in text
    for remedy in ("sft", "algorithm.dpo_beta", "actor_rollout_ref.actor.optim.lr", "docs/losses.md"):
        assert remedy in text
    assert not find_drift(history(*good, *good, *bad[:3]))  # the mean of four has lost 0.45
    assert not find_drift(history(*bad, *good))


def test_likelihood_that_falls_from_the_start_on_shows_in_the_fifth_step():
    """By as much a step as a judge turned round made it fall in a run of 2026-11-25."""
    steps = history(*map(metrics, (-2.33, -2.65, -2.97, -3.30, -3.62)))
    assert "nats a token over steps 2 to 5, after -2.33 at best" in find_drift(steps)["likelihood"]
    assert not find_drift(steps[:4])


def test_one_bad_step_is_not_a_drift():
    assert not find_drift(history(*[metrics(-0.4)] * 9, metrics(-2.0)))


def test_chosen_responses_below_the_reference():
    """Two nats below, at beta 0.1; steps in which the reference is the policy itself do not count."""
    fallen, fresh = metrics(reward=-0.2), metrics(refreshed=1.0)
    text = find_drift(history(fresh, fallen, fallen, fresh, fallen, fallen))["reference"]
    assert "less likely than under the reference: by 2.0 nats each over steps 2 to 6" in text and "sft" in text
    assert not find_drift(history(fallen, fallen, fallen))
    assert not find_drift(history(*[metrics(reward=-0.09)] * 8))


@pytest.mark.parametrize(("chosen", "which"), [(14.0, "longer"), (6.0, "shorter")])
def test_lengths_that_drift_apart(chosen, which):
    found = find_drift(history(*[metrics()] * 4, *[metrics(chosen=chosen)] * 4))
    assert list(found) == ["gap"]
    assert f"the chosen are {which} by 40% of a response, +0% at first" in found["gap"]
    assert "algorithm.dpo_length_penalty" in found["gap"] and "algorithm.dpo_ld_alpha" in found["gap"]


def test_lengths_that_differ_from_the_start_or_come_together_do_not_drift_apart():
    assert not find_drift(history(*[metrics(chosen=6.0)] * 8))
    assert not find_drift(history(*[metrics(chosen=6.0)] * 4, *[metrics()] * 4))


def test_growth_counts_where_the_chosen_are_longer():
    short, longer = [metrics(chosen=11.0)] * 4, [metrics(chosen=21.0, rejected=20.0, mean=20.0)] * 4
    found = find_drift(history(*short, *longer))
    assert list(found) == ["growth"] and "20 tokens over steps 5 to 8, 10 at first" in found["growth"]
    assert not find_drift(history(*short, *[metrics(chosen=20.0, rejected=21.0, mean=20.0)] * 4))


def test_steps_without_a_pair_are_passed_over():
    empty = {"training/reference_refreshed": 0.0}
    steps = [metrics(-0.4)] * 4 + [empty] * 3 + [metrics(-1.0)] * 4
    assert list(find_drift(history(*steps))) == ["likelihood"]
    assert not find_drift(history(*[empty] * 10))


def test_a_step_without_a_pair_is_told_of():
    tied = {"training/reference_refreshed": 0.0, "pairs/used": 0}
    text = find_drift(history(metrics(), tied))["pairs"]
    assert "step 2 gave no pair" in text and "trainer.max_steps_without_pairs" in text and "judge/" not in text
    assert "in 97% (judge/first_rate" in find_drift(history(tied | {"judge/first_rate": 0.97}))["pairs"]
    assert not find_drift(history(tied, metrics() | {"pairs/used": 3}))
    drift = Drift()
    assert [len(drift.see(step, tied)) for step in (1, 2, 3)] == [1, 0, 0]


def test_a_resumed_run_knows_the_steps_before():
    before = {0: {"val-core/sums/acc/mean@4": 0.1}, **{step: metrics(-0.4) for step in range(1, 5)}}
    before |= {5: metrics(-0.4) | {"actor/beta": None}, 6: metrics(-0.1), 7: metrics(-0.1)}
    drift = Drift(before)
    assert drift.see(5, {}) == []  # as it is shown before the first step
    said = [drift.see(step, metrics(-1.0)) for step in (6, 7, 8, 9)]
    assert said[:3] == [[], [], []] and "over steps 6 to 9, after -0.40 at best" in said[3][0]
    unknowing = Drift()
    assert not any(unknowing.see(step, metrics(-1.0)) for step in (6, 7, 8, 9))


def test_a_run_is_told_once():
    drift = Drift()
    steps = [metrics(-0.4)] * WINDOW + [metrics(-1.0)] * 2 * WINDOW
    said = [text for number, one in enumerate(steps, start=1) for _ in range(3) for text in drift.see(number, one)]
    assert len(said) == 1


def test_one_good_first_step_is_no_best():
    assert find_drift(history(metrics(-0.3), *[metrics(-0.9)] * 7)) == {}


def test_what_the_last_steps_warn_of_is_told_at_the_end(tmp_path, monkeypatch):
    console = io.StringIO()
    monkeypatch.setattr(sys, "stderr", console)
    fallen = metrics(-1.0) | {"timing_s/step": 1.0}
    finished = tuple((step, fallen) for step in range(5, 9))
    progress = {"doing": "training", "step": 8, "total": 8, "metrics": fallen, "finished": finished}
    monkeypatch.setattr(monitor, "_ask_task_runner", lambda: progress)
    with RunMonitor(tmp_path, joins=True, history={step: metrics(-0.4) for step in (1, 2, 3, 4)}):
        pass  # it ends before the monitor looks
    assert console.getvalue().count("[spin] warning: the chosen responses lose likelihood") == 1


def test_the_monitor_shows_warnings_on_the_console(tmp_path, monkeypatch):
    console = io.StringIO()
    monkeypatch.setattr(sys, "stderr", console)
    watching = RunMonitor(tmp_path, history={step: metrics(-0.4) for step in (1, 2, 3, 4)})
    fallen = metrics(-1.0) | {"timing_s/step": 1.0}
    finished = tuple((step, fallen) for step in range(5, 9))  # between two looks of the monitor
    for _ in range(2):
        progress = {"doing": "training", "step": 8, "total": 8, "metrics": fallen, "finished": finished}
        watching._show(progress)
    assert console.getvalue().count("[spin] warning: the chosen responses lose likelihood") == 1
