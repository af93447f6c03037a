"""The report of a run says what was measured: accuracy where the reward gives one, else the score."""

import pytest

from recipe.spin.run import report


@pytest.mark.parametrize(("variable", "measure"), [("acc", "accuracy"), ("reward", "score")])
def test_the_report_names_what_was_measured(tmp_path, capsys, variable, measure):
    names = (f"val-core/sums/{variable}/mean@4", f"val-greedy-core/sums/{variable}/mean@1")
    history = {0: dict.fromkeys(names, 0.25), 4: dict.fromkeys(names, 0.5)}
    summary = report.summarize(history)
    assert summary["measure"] == measure and summary["after"] == {"greedy": 0.5, "sampled": 0.5}
    report.print_summary(summary | {"seconds": 1, "peak_memory_gb": 1, "checkpoint": None}, tmp_path)
    assert f"held-out {measure}, sampled: 0.250 before, 0.500 after" in capsys.readouterr().out.replace("  ", " ")
