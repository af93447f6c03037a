"""What benchmarks of many default runs ask of each: one run started anew, summed up, and means over seeds."""

import pytest

from benchmarks import default_run
from benchmarks.default_run import arm_and_seed, arms_with_seeds, cell, over_seeds, recorded, seeded, summarize, train

VALIDATION = "val-core/arithmetic/acc/mean@4", "val-greedy-core/arithmetic/acc/mean@1"


def history(sampled: float) -> list[dict]:
    """Two steps as the recipe writes them, with the held-out accuracies before and after."""
    before, after = (dict(zip(VALIDATION, (value, value / 2), strict=True)) for value in (0.1, sampled))
    step = {"response_length/gap": 1.0, "kl/chosen": 0.0, "training/reference_refreshed": 0.0}
    first = {"logps/chosen_token": -1.0, "response_length/mean": 14.0, "score/accuracy": 0.2, "timing_s/step": 10}
    last = {"logps/chosen_token": -0.5, "response_length/mean": 11.0, "score/accuracy": 0.3, "timing_s/step": 20}
    pairs = ({"pairs/used": 12}, {"pairs/used": 20})
    return [
        {"step": 0, **before},
        {"step": 1, **step, **first, **pairs[0]},
        {"step": 2, **step, **last, **after, **pairs[1]},
    ]


def test_a_run_is_summed_up():
    found = summarize(history(0.7))
    before, after = {"greedy": 0.05, "sampled": 0.1}, {"greedy": 0.35, "sampled": 0.7}
    assert found["held_out"] == {"0": before, "2": after} and found["before"] == before and found["after"] == after
    assert found["steps"] == 2 and found["training_accuracy"] == {"1": 0.2, "2": 0.3} and found["pairs"] == 16
    assert found["logp_per_chosen_token"] == [-1.0, -0.5] and found["response_length"] == [14.0, 11.0]
    assert found["step_seconds"] == 15 and found["warnings"] == []


def script(tmp_path, monkeypatch, text: str) -> None:
    (tmp_path / "run_spin.sh").write_text(text)
    monkeypatch.setattr(default_run, "ROOT", tmp_path)


def test_a_run_is_made_anew_as_a_user_starts_it(tmp_path, monkeypatch):
    line = """echo '{"step": 3}' > "$RUN_DIR/metrics.jsonl"\n"""
    script(tmp_path, monkeypatch, 'mkdir -p "$RUN_DIR"\nls "$RUN_DIR"\necho "$SPIN_PROFILE" "$@"\n' + line)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "stopped").touch()
    lines, _ = train(seeded(7), tmp_path / "one")
    assert lines == [{"step": 3}]
    said = (tmp_path / "one.log").read_text()
    assert said == "cpu trainer.save_freq=-1 data.seed=7 actor_rollout_ref.rollout.seed=7\n"


def test_a_run_that_fails_leaves_its_last_words(tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, 'echo "error: the DPO loss is nan" >&2\nexit 1\n')
    found = recorded(["algorithm.dpo_beta=1"], tmp_path / "one")
    assert found["failed"] == "error: the DPO loss is nan" and found["overrides"] == ["algorithm.dpo_beta=1"]
    assert found["commit"] and found["machine"]


def test_means_are_over_the_seeds_of_an_arm_that_did_not_fail():
    names = arms_with_seeds(["a, b", "c"], [3, 4])
    assert names == ["a, b, seed 3", "c, seed 3", "a, b, seed 4", "c, seed 4"] and arm_and_seed(names[2]) == ("a, b", 4)
    found = {name: {"after": {"sampled": value}} for name, value in zip(names, (0.5, 0.1, 0.75, 0.2), strict=True)}
    mean, deviation, number = over_seeds(found, "a, b")["sampled"]
    assert (mean, number) == (0.625, 2) and deviation == pytest.approx(0.125 * 2**0.5)
    assert over_seeds(found | {names[2]: {"failed": "no"}}, "a, b") == {"sampled": (0.5, 0.0, 1)}
    assert over_seeds(found, "a") == {}
    assert cell(0.625, 0.1768, 2) == "0.625 (0.177)" and cell(0.5, 0.0, 1) == "0.500"
