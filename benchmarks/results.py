"""The recorded runs of benchmarks.step, and the table of RESULTS.md that is made from them.

.venv/bin/python -m benchmarks.results
"""

import json
from pathlib import Path

from benchmarks.machine import ROOT

FOLDER = ROOT / "benchmarks" / "results"
TABLE = ROOT / "benchmarks" / "RESULTS.md"
HEAD = """# Results

Made by `.venv/bin/python -m benchmarks.results` from the files in `results/`; `.venv/bin/python -m benchmarks.step`
adds one (once a kind of machine after `.venv/bin/python -m benchmarks.trl_settings`).

A step is one optimizer step of online DPO on SmolLM2-135M-Instruct, 32 prompts with 2 responses each, fp32,
this recipe and TRL's OnlineDPOTrainer in turn on the same machine; ratios are medians over rounds. Neither recomputes
activations (the CPU profile does, in part), and TRL has the fastest of the settings tried on that machine. The floor is
the arithmetic of a step that computes every prompt once (this recipe computes what all begin with once, which is less),
at the machine's measured rate of matrix products. On AMD's processors with AVX-512 this recipe's CPU profile takes
oneDNN's products from 2026-11-30 on, TRL and the plain step torch's own. "To plain" is the
reference pass and the update to those of `plain_step.py`, per operation. "Others" are the cores that other programs
kept busy during the worst of the runs: well above 0, the seconds mean little.
"""
COLUMNS = ("date", "commit", "machine", "to TRL, same 32 pairs", "to TRL, ties dropped", "ours, s", "TRL, s")
COLUMNS += ("floor, s", "to plain", "memory ours / TRL, GB", "GFLOP/s", "others", "file")


def recorded(folder: Path = FOLDER) -> list[tuple[Path, dict]]:
    """The runs of benchmarks.step, the oldest first."""
    runs = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return sorted(((path, run) for path, run in runs if "step_ratio_to_trl" in run), key=lambda one: one[1]["date"])


def table(runs: list[tuple[Path, dict]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for path, run in runs:
        dropped, ours, trl = run["ties_dropped"], run["ours"], run["trl"]
        others = max(found["others_cores"] for found in (ours, dropped["ours"], trl))
        cells = [
            run["date"],
            run["commit"],
            run["machine"]["kind"],
            f"**{run['step_ratio_to_trl']:.2f}**",
            f"**{dropped['step_ratio_to_trl']:.2f}**",
            f"{ours['step_seconds']:.1f} / {dropped['ours']['step_seconds']:.1f}",
            f"{trl['step_seconds']:.1f}",
            f"{run['floor_seconds']:.1f}",
            f"{run['ref_update_ratio_to_plain_per_operation']:.2f}",
            f"{ours['peak_memory_gb']:.1f} / {trl['peak_memory_gb']:.1f}",
            f"{run['gflops']:.0f}",
            f"{others:.1f}",
            f"[{path.stem}](results/{path.name})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(folder: Path = FOLDER, path: Path = TABLE) -> None:
    """Makes RESULTS.md from the files."""
    path.write_text(f"{HEAD}\n{table(recorded(folder))}\n")


if __name__ == "__main__":
    write_table()
