"""A training step of this recipe beside TRL's OnlineDPOTrainer and beside a plain-PyTorch step, in one command.

    .venv/bin/python -m benchmarks.step [--rounds 3] [--steps 3] [--name step] [KEY=VALUE ...]

Same model, prompts in the same order, lengths, precision and threads; in every round, one after the other: this recipe
on the same 32 pairs as TRL (ties kept), this recipe with ties dropped as its defaults say (the reward is 0 or 1; TRL
trains on all), TRL in the fastest setting that benchmarks.trl_settings found here, and benchmarks.plain_step. TRL's
first step warms up and does not count; here the first two, as the reference, which is the policy itself in the first,
is first asked in the second. This recipe's last step refreshes the reference and is reported apart.

Prints medians and the ratios round by round, writes benchmarks/results/DATE-NAME.json, and makes RESULTS.md anew.
KEY=VALUE are further overrides of this recipe. Three rounds take 20 minutes on two cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks import results
from benchmarks.arithmetic import Model, forward_flop, necessary, sampling, update_flop
from benchmarks.inputs import DATA, MODEL, make_missing
from benchmarks.machine import ROOT, matrix_product_rates, plain_environment, provenance, run_measured, write_result
from benchmarks.trl_settings import fastest, run_trl, settings_file

PROMPTS, RESPONSES = 32, 2
WARM_UP = 2
# What TRL's process has too: two responses, no recomputation of activations
SETTINGS = [f"data.train_batch_size={PROMPTS}", "data.shuffle=False", f"actor_rollout_ref.rollout.n={RESPONSES}"]
SETTINGS += ["actor_rollout_ref.model.enable_gradient_checkpointing=False", "actor_rollout_ref.actor.optim.lr=1e-5"]
QUIET = ["trainer.val_before_train=False", "trainer.test_freq=-1", "trainer.save_freq=-1"]
ARMS = {"same_pairs": ["algorithm.dpo_tie_policy=first"], "ties_dropped": ["algorithm.dpo_tie_policy=drop"]}
# Names of the phases here and in the recipe's metrics
PHASES = {"gen": "gen", "ref": "ref", "update": "update_actor", "weights": "update_weights", "refresh": "refresh_ref"}


# ---- One run of each -------------------------------------------------------------------------------------------------
def run_ours(model: str, data: Path, steps: int, overrides: list[str], folder: Path) -> dict:
    """One run of the recipe: WARM_UP steps, `steps` that count, and one that refreshes the reference first."""
    total = WARM_UP + steps + 1
    command = ["bash", str(ROOT / "run_spin.sh"), *SETTINGS, *QUIET, *overrides]
    command += [f"trainer.total_training_steps={total}", f"trainer.ref_update_freq={total}"]
    environment = plain_environment(
        RUN_DIR=str(folder / "run"), MODEL_PATH=model, DATA_DIR=str(data), SPIN_PROFILE="cpu", PYTHON=sys.executable
    )
    process = run_measured(command, environment, folder / "ours.log")
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    steps_by_number = {line["step"]: our_step(line) for line in lines if "timing_s/step" in line}
    counted = [steps_by_number[number] for number in range(WARM_UP + 1, total)]
    return {
        "step_seconds": statistics.median(step["seconds"] for step in counted),
        "phases": {phase: median_of(counted, phase) for phase in ("gen", "ref", "update", "weights")},
        "process": asdict(process),
        "steps": counted,
        "first": steps_by_number[1],
        "refreshed": steps_by_number[total],
    }


def our_step(line: dict) -> dict[str, float]:
    """A step's seconds by phase, and its pairs and tokens, from a line of metrics.jsonl."""
    phases = {phase: line[f"timing_s/{name}"] for phase, name in PHASES.items() if f"timing_s/{name}" in line}
    responses = PROMPTS * RESPONSES
    response_tokens = round(line["response_length/mean"] * responses)
    return phases | {
        "seconds": line["timing_s/step"],
        "pairs": line["pairs/used"],
        "response_tokens": response_tokens,
        "prompt_tokens": round((line["perf/total_num_tokens"] - response_tokens) / RESPONSES),
        "paired_lengths": [line.get(f"response_length/{kind}", 0.0) for kind in ("chosen", "rejected")],
    }


def median_of(steps: list[dict], name: str) -> float:
    return statistics.median(step.get(name, 0.0) for step in steps)


def run_plain(model: str, folder: Path) -> dict:
    """The plain step with the prompt shared, in a process of its own."""
    output = folder / "plain.json"
    command = [sys.executable, "-m", "benchmarks.plain_step", "--model", model, "--layouts", "shared"]
    command += ["--rounds", "2", "--output", str(output)]
    process = run_measured(command, plain_environment(), folder / "plain.log")
    return json.loads(output.read_text()) | {"process": asdict(process)}


# ---- What the runs say -----------------------------------------------------------------------------------------------
def flop_of(model: Model, step: dict) -> dict[str, float]:
    """The least floating-point operations of a step's phases, from its pairs and mean lengths."""
    prompt = round(step["prompt_tokens"] / PROMPTS)
    answered = [(prompt, [round(step["response_tokens"] / PROMPTS / RESPONSES)] * RESPONSES)] * PROMPTS
    paired = [(prompt, [round(length) for length in step["paired_lengths"]])] * round(step["pairs"])
    forward = forward_flop(model, necessary(paired))
    return {
        "gen": forward_flop(model, sampling(answered)),
        "ref": forward,
        "update": update_flop(model, necessary(paired)),
    }


def as_pairs(step: dict, prompt_tokens: float) -> dict:
    """TRL's step in the terms of flop_of: all its responses are paired."""
    length = step["response_tokens"] / PROMPTS / RESPONSES
    return step | {"pairs": PROMPTS, "prompt_tokens": prompt_tokens, "paired_lengths": [length] * 2}


def summarize(rounds: list[dict], model: Model, rate: float) -> dict:
    """Medians over all counted steps of one trainer's runs, its memory, and how near it comes to the arithmetic."""
    steps = [step for one in rounds for step in one["steps"]]
    seconds = statistics.median(step["seconds"] for step in steps)
    phases = {phase: statistics.median(one["phases"][phase] for one in rounds) for phase in rounds[0]["phases"]}
    flop = {name: statistics.median(flop_of(model, step)[name] for step in steps) for name in ("gen", "ref", "update")}
    tokens = statistics.median(step["prompt_tokens"] + step["response_tokens"] for step in steps)
    trained = phases["ref"] + phases["update"]
    return {
        "step_seconds": seconds,
        "phases": phases,
        "peak_memory_gb": max(one["process"]["peak_memory_gb"] for one in rounds),
        "others_cores": max(one["process"]["others_cores"] for one in rounds),
        "pairs": statistics.median(step["pairs"] for step in steps),
        "response_tokens": statistics.median(step["response_tokens"] for step in steps),
        "prompts_per_second": PROMPTS / seconds,
        "tokens_per_second": tokens / seconds,
        "floor_phases": {phase: flop[phase] / rate / 1e9 for phase in flop},
        "floor_seconds": sum(flop.values()) / rate / 1e9,
        "share_of_rate": {phase: flop[phase] / phases[phase] / rate / 1e9 for phase in flop if phases[phase]}
        | {"ref+update": (flop["ref"] + flop["update"]) / trained / rate / 1e9},
    }


def summarize_arm(ours: list[dict], trl: list[dict], plain: list[dict], model: Model, rate: float) -> dict:
    """One arm's medians, and its ratios round by round: to TRL's step, and to the plain step per operation."""
    summary = summarize(ours, model, rate)
    to_trl = [one["step_seconds"] / other["step_seconds"] for one, other in zip(ours, trl, strict=True)]
    to_plain = [ratio_to_plain(one, other, model) for one, other in zip(ours, plain, strict=True)]
    refreshed = [one["refreshed"] for one in ours]
    summary["first_step_seconds"] = statistics.median(one["first"]["seconds"] for one in ours)
    summary["refreshed_step_seconds"] = median_of(refreshed, "seconds")
    summary["refresh_seconds"] = median_of(refreshed, "refresh")
    return {
        "step_ratio_to_trl": statistics.median(to_trl),
        "step_ratios": to_trl,
        "ref_update_ratio_to_plain": statistics.median(ratio["seconds"] for ratio in to_plain),
        "ref_update_ratio_to_plain_per_operation": statistics.median(ratio["per_operation"] for ratio in to_plain),
        "floor_seconds": summary["floor_seconds"],
        "ours": summary,
    }


def ratio_to_plain(ours: dict, plain: dict, model: Model) -> dict[str, float]:
    """Reference pass and update with its optimizer, ours to the plain step's: in seconds, and per operation."""
    shared = plain["layouts"]["shared"]
    seconds = (ours["phases"]["ref"] + ours["phases"]["update"]) / shared["step_seconds"]
    flop = statistics.median(flop_of(model, step)["ref"] + flop_of(model, step)["update"] for step in ours["steps"])
    plain_flop = plain["floor_seconds"] * max(plain["gflops"].values()) * 1e9
    return {"seconds": seconds, "per_operation": seconds * plain_flop / flop}


def combine(rounds: list[dict], model: Model) -> dict:
    """The result of all rounds; each holds an `ours` by arm, a `trl`, a `plain` and the machine's `gflops`."""
    rate = statistics.median(max(one["gflops"].values()) for one in rounds)
    plain = [one["plain"] for one in rounds]
    prompt_tokens = statistics.median(step["prompt_tokens"] for step in rounds[0]["ours"]["same_pairs"]["steps"])
    trl = [one["trl"] | {"steps": [as_pairs(step, prompt_tokens) for step in one["trl"]["steps"]]} for one in rounds]
    arms = {
        arm: summarize_arm([one["ours"][arm] for one in rounds], trl, plain, model, rate) for arm in rounds[0]["ours"]
    }
    shared = [one["layouts"]["shared"] for one in plain]
    return arms.pop("same_pairs") | {
        "trl": summarize(trl, model, rate) | {"setting": rounds[0]["trl_setting"]},
        "plain": {
            "step_seconds": statistics.median(one["step_seconds"] for one in shared),
            "phases": {
                name: statistics.median(one["seconds"][name] for one in shared) for name in shared[0]["seconds"]
            },
            "share_of_rate": statistics.median(one["share_of_rate"]["both"] for one in shared),
        },
        "gflops": rate,
        **arms,
        "rounds": rounds,
    }


def report(result: dict) -> str:
    """The medians as a table, and the ratios round by round."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"| --- |{' ---: |' * len(COLUMNS)}"]
    rows = {"ours, same pairs": result["ours"], "ours, ties dropped": result["ties_dropped"]["ours"]}
    for label, found in (rows | {"TRL": result["trl"]}).items():
        phases = found["phases"]
        cells = [f"{found['step_seconds']:.1f}", *(f"{phases[name]:.1f}" for name in ("gen", "ref", "update"))]
        cells.append(f"{phases['weights']:.2f}" if "weights" in phases else f"({phases['optimizer']:.1f})")
        cells += [f"{found['pairs']:.0f}", f"{found['prompts_per_second']:.2f}", f"{found['tokens_per_second']:.0f}"]
        cells += [f"{found['peak_memory_gb']:.1f}", f"{found['floor_seconds']:.1f}"]
        cells.append(" / ".join(f"{found['share_of_rate'].get(name, 0):.0%}" for name in ("ref", "update")))
        cells.append(f"{found['others_cores']:.1f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    plain = result["plain"]
    lines += [
        "",
        f"plain PyTorch, the prompt shared: {plain['step_seconds']:.1f} s a step, {plain['share_of_rate']:.0%}",
    ]
    for label, arm in (("same pairs", result), ("ties dropped", result["ties_dropped"])):
        ratios = ", ".join(f"{ratio:.2f}" for ratio in arm["step_ratios"])
        lines.append(
            f"{label}: {arm['step_ratio_to_trl']:.2f} of TRL's step (by round {ratios}); reference and update "
            f"{arm['ref_update_ratio_to_plain']:.2f} times the plain step's, per operation "
            f"{arm['ref_update_ratio_to_plain_per_operation']:.2f}; refresh {arm['ours']['refresh_seconds']:.2f} s"
        )
    return "\n".join(lines)


COLUMNS = ("step, s", "gen", "ref", "update", "weights (TRL: optimizer)", "pairs", "prompts/s", "tokens/s")
COLUMNS += ("peak memory, GB", "floor, s", "share of rate, ref / update", "others' cores")


def main() -> None:
    parser = argparse.ArgumentParser(description="A step of this recipe beside TRL's and beside plain PyTorch.")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps of a run that count (3)")
    parser.add_argument("--name", default="step", help="in the result's file name (step)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further overrides of this recipe")
    options = parser.parse_args()

    tried = settings_file()
    if not tried.exists():
        sys.exit(f"error: {tried} is missing: TRL's fastest setting here; run python -m benchmarks.trl_settings first")
    best = fastest(json.loads(tried.read_text())["tried"].values())
    setting = {"batch": best["batch"], "allocator": best["allocator"]}
    make_missing(options.model, options.data)
    from transformers import AutoConfig

    model = Model.of(AutoConfig.from_pretrained(options.model))
    origin = provenance()
    rounds, path = [], None
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            found: dict = {"gflops": matrix_product_rates(), "trl_setting": setting, "ours": {}}
            for arm, overrides in ARMS.items():
                say(f"round {number + 1} of {options.rounds}: this recipe, {arm}")
                overrides = [*overrides, *options.overrides]
                found["ours"][arm] = run_ours(options.model, options.data, options.steps, overrides, folder / arm)
            say(f"round {number + 1} of {options.rounds}: TRL, {setting}")
            found["trl"] = run_trl(options.model, options.data, options.steps, folder=folder, **setting)
            say(f"round {number + 1} of {options.rounds}: plain PyTorch")
            found["plain"] = run_plain(options.model, folder)
        rounds.append(found)
        result = origin | {"overrides": options.overrides} | combine(rounds, model)
        path = write_result(options.name, result, replaced=path)  # what is stopped has the rounds that it came to
        results.write_table()
    print(f"{report(result)}\n\n{path}")


def say(text: str) -> None:
    sys.stderr.write(f"[benchmark] {text} ...\n")


if __name__ == "__main__":
    main()
