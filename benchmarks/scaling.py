"""Growth of a step: measures sizes that run here, fits the model of growth.py and writes docs/scaling.md's tables.

    .venv/bin/python -m benchmarks.scaling plain     the arithmetic: plain PyTorch steps; 5 minutes on two cores
    .venv/bin/python -m benchmarks.scaling engine    whole runs of this recipe; goes on where it was stopped
    .venv/bin/python -m benchmarks.scaling tables    the tables, from what was measured last; seconds

Plain steps go to benchmarks/results/DATE-scaling-plain.json, runs to scaling-engine.json.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import plain_step
from benchmarks.arithmetic import Model
from benchmarks.growth import (
    A10,
    A100,
    H100,
    MODELS,
    QWEN_0_5B,
    Load,
    Machine,
    Prediction,
    adamw_seconds,
    decoding_steps,
    layout_of,
    predict,
    refresh_seconds,
)
from benchmarks.inputs import DATA, MODEL, make_missing
from benchmarks.machine import (
    ROOT,
    memory_bandwidth,
    plain_environment,
    provenance,
    results_file,
    run_measured,
    run_missing,
    write_result,
)
from benchmarks.random_model import save_random_model
from benchmarks.tiny_models import save_tiny_model
from recipe.spin.checks import memory
from recipe.spin.checks.fit import fitting

DOCUMENT = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"
ENGINE_FILE = results_file("scaling-engine")
SMOLLM2 = Model(30, 576, 1536, 9, 3, 64, 49152, tied=True)
TINY = Model(2, 64, 128, 2, 1, 32, 316, tied=False)
SHAPES = {"tiny": TINY, "135M": SMOLLM2, "0.5B": QWEN_0_5B}

# ---- Plain PyTorch ---------------------------------------------------------------------------------------------------
# Model, pairs, longest response; what varies is one of them at a time
PLAIN = [("135M", pairs, 16) for pairs in (8, 16, 32)] + [("135M", 16, longest) for longest in (4, 64, 128)]
PLAIN += [("0.5B", 4, 16), ("0.5B", 8, 16), ("tiny", 32, 16)]


def save_model(name: str, folder: Path) -> str:
    """A model of a shape with random weights and the tiny models' tokenizer."""
    from transformers import Qwen2Config

    if name == "tiny":
        return str(save_tiny_model(folder, "llama"))
    shape = SHAPES[name]
    return save_random_model(
        Qwen2Config,
        folder,
        shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
    )


def measure_plain(embedded: str, rounds: int) -> dict:
    """The plain step on all sizes, each in a process of its own."""
    measured = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {"135M": embedded} | {name: save_model(name, folder / name) for name in ("tiny", "0.5B")}
        for model, pairs, longest in PLAIN:
            command = [sys.executable, "-m", "benchmarks.plain_step", "--model", models[model], "--layouts", "shared"]
            command += ["--pairs", str(pairs), "--longest", str(longest), "--rounds", str(rounds)]
            process = run_measured(
                [*command, "--output", str(folder / "plain.json")], plain_environment(), folder / "plain.log"
            )
            found = json.loads((folder / "plain.json").read_text())
            shared = found["layouts"]["shared"]
            measured.append(
                {"model": model, "pairs": pairs, "longest": longest, "others_cores": process.others_cores}
                | {name: found[name] for name in ("prompt_tokens", "response_tokens")}
                | {"rate": max(found["gflops"].values()) * 1e9, "peak_memory_gb": process.peak_memory_gb}
                | {"best": {phase: min(one[phase] for one in shared["rounds"]) for phase in plain_step.PHASES}}
            )
    return {"memory_bandwidth": memory_bandwidth(), "measured": measured}


def plain_machine(result: dict) -> Machine:
    """This machine, its shares of the rate fitted to the plain steps of at least 100 million parameters."""
    sizes = [one for one in result["measured"] if SHAPES[one["model"]].parameters > 1e8]
    rate = statistics.median(one["rate"] for one in sizes)
    machine = cpu(result["machine"]["kind"], rate, result["memory_bandwidth"])
    steps = [(SHAPES[one["model"]], plain_load(one), one["best"]) for one in sizes]
    return fit_shares(machine, steps)


Step = tuple[Model, Load, dict]  # what was trained on what, and the seconds that it took, by phase
# By share of the rate: the model's phase, and what a step calls it
SHARES = {"forward_share": ("reference", "ref"), "update_share": ("update", "update")}


def fit_shares(machine: Machine, steps: list[Step]) -> Machine:
    """The machine with the shares of its rate, medians over the steps, at which it takes as long as they took."""
    shares = {}
    for share, (phase, measured) in SHARES.items():
        full = replace(machine, **{share: 1.0}, memory_bandwidth=float("inf"))
        shares[share] = statistics.median(
            predict(full, model, load).seconds[phase] / seconds[measured] for model, load, seconds in steps
        )
    return replace(machine, **shares)


def cpu(kind: str, rate: float, bandwidth: float) -> Machine:
    """A machine without a GPU: fp32 throughout, one device for all cores."""
    return Machine(
        kind,
        rate,
        bandwidth,
        memory=0.0,
        token_seconds=0.0,
        sync_seconds=0.0,
        step_seconds=0.0,
        response_seconds=0.0,
        compute_bytes=4,
        reference_bytes=4,
    )


def plain_load(size: dict) -> Load:
    """The load of a plain step, in mean lengths."""
    return Load(
        prompts=size["pairs"],
        n=2,
        prompt=round(size["prompt_tokens"] / size["pairs"]),
        response=round(size["response_tokens"] / size["pairs"] / 2),
        checkpointing=False,
    )


def plain_table(result: dict) -> str:
    machine = plain_machine(result)
    lines = [
        f"{machine.name}: {machine.flops / 1e9:.0f} GFLOP/s, {machine.memory_bandwidth / 1e9:.0f} GB/s; fitted shares "
        f"of the rate: reference {machine.forward_share:.0%}, update {machine.update_share:.0%}.",
        "",
        "| model | pairs | tokens a response, mean | reference, s: measured / predicted | update, s | AdamW, s | "
        "peak memory, GB | others' cores |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in result["measured"]:
        model, load = SHAPES[one["model"]], plain_load(one)
        found = predict(machine, model, load).seconds
        adamw = adamw_seconds(machine, model, devices=1)
        pairs = [("ref", found["reference"]), ("update", found["update"] - adamw), ("optimizer", adamw)]
        cells = " | ".join(f"{one['best'][phase]:.2f} / {predicted:.2f}" for phase, predicted in pairs)
        lines.append(
            f"| {one['model']} | {one['pairs']} | {load.response} | {cells} | {one['peak_memory_gb']:.1f} | "
            f"{one['others_cores']:.1f} |"
        )
    return "\n".join(lines)


# ---- This recipe -----------------------------------------------------------------------------------------------------
# What varies, by name: prompts, n, response length, ranks, model
ENGINE: dict[str, dict] = {
    "8 prompts of 0.5B": {"prompts": 8, "model": "0.5B"},
    "32 prompts": {"prompts": 32},
    "8 prompts": {"prompts": 8},
    "64 prompts": {"prompts": 64},
    "32 prompts, 4 responses, all pairs": {"prompts": 32, "n": 4, "pairing": "all"},
    "32 prompts, 8 responses, all pairs": {"prompts": 32, "n": 8, "pairing": "all"},
    "16 prompts, up to 64 tokens": {"prompts": 16, "longest": 64},
    "32 prompts, 2 ranks": {"prompts": 32, "ranks": 2},
    "8 prompts of the tiny model": {"prompts": 8, "model": "tiny"},
}
STEPS = 5


def engine_overrides(size: dict) -> list[str]:
    longest = size.get("longest", 16)
    return [
        f"data.train_batch_size={size['prompts']}",
        f"actor_rollout_ref.rollout.n={size.get('n', 2)}",
        f"data.max_response_length={longest}",
        f"actor_rollout_ref.rollout.max_model_len={128 + longest}",
        f"algorithm.dpo_pairing={size.get('pairing', 'best_worst')}",
        "algorithm.dpo_tie_policy=first",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.ref_update_freq={STEPS}",
        # The largest tensor must fit: 0.5B's embedding has 545 MB in fp32
        f"actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes="
        f"{640 if size.get('model') == '0.5B' else 128}",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
    ]


def measure_engine(name: str, embedded: str, data: Path) -> dict:
    """A whole run of the recipe; the shortest of the steps that neither warm up nor refresh counts."""
    size = ENGINE[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = size.get("model", "135M")
        environment = plain_environment(
            RUN_DIR=str(folder / "run"),
            MODEL_PATH=embedded if model == "135M" else save_model(model, folder / model),
            DATA_DIR=str(data),
            SPIN_PROFILE="cpu",
            PYTHON=sys.executable,
            N_GPUS_PER_NODE=str(size.get("ranks", 1)),
        )
        command = ["bash", str(ROOT / "run_spin.sh"), *engine_overrides(size)]
        process = run_measured(command, environment, folder / "run.log")
        steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    *_, refreshed = steps
    counted = min(steps[1:-1], key=lambda step: step["timing_s/step"])
    seconds = {name[9:]: value for name, value in counted.items() if name.startswith("timing_s/")}
    return (
        provenance()
        | size
        | {"seconds": seconds, "refresh": refreshed["timing_s/refresh_ref"]}
        | {"response_length": counted["response_length/mean"], "pairs": counted["pairs/used"]}
        | {"tokens": counted["perf/total_num_tokens"]}
        | {"peak_memory_gb": process.peak_memory_gb, "others_cores": process.others_cores}
    )


def engine_load(run: dict) -> Load:
    """A run's step, in mean lengths."""
    n = run.get("n", 2)
    return Load(
        prompts=run["prompts"],
        n=n,
        prompt=round(run["tokens"] / run["prompts"] / n - run["response_length"]),
        response=round(run["response_length"]),
        paired=n if run.get("pairing") == "all" else 2,
        longest=run.get("longest", 16),
        most_sequences=128,  # of the CPU profile
        checkpointing=False,  # the products are kept: what is recomputed takes next to nothing
    )


def fit_generation(machine: Machine, steps: list[Step]) -> Machine:
    """The machine with the share of its rate, and the seconds of a decoding step, that fit generation best.

    Least squares of the relative errors.
    """
    full = replace(machine, prefill_share=1.0, token_seconds=0.0, memory_bandwidth=float("inf"))
    rows, ones = [], np.ones(len(steps))
    for model, load, seconds in steps:
        arithmetic = predict(full, model, load).seconds["generation"]
        rows.append(np.array([arithmetic, decoding_steps(load, load.prompts)]) / seconds["gen"])
    (slower, token_seconds), *_ = np.linalg.lstsq(np.array(rows), ones, rcond=None)
    return replace(machine, prefill_share=1 / slower, token_seconds=token_seconds)


def engine_machine(runs: list[dict], plain: dict) -> Machine:
    """This machine, fitted to the runs of at least 100 million parameters on one rank."""
    machine = plain_machine(plain)
    steps = []
    for run in runs:
        model = SHAPES[run.get("model", "135M")]
        if model.parameters > 1e8 and run.get("ranks", 1) == 1:
            seconds = run["seconds"]["update_actor"] - adamw_seconds(machine, model, devices=1)
            steps.append((model, engine_load(run), run["seconds"] | {"update": seconds}))
    return fit_generation(fit_shares(machine, steps), steps)


def engine_table(found: dict[str, dict], plain: dict) -> str:
    runs = [found[name] for name in ENGINE if name in found]
    machine = engine_machine(runs, plain)
    columns = ["model", "ranks", "prompts", "n", "tokens a response, mean", "pairs"]
    columns += ["generation, s: measured / predicted", "reference, s", "update, s", "weights to vLLM, s", "step, s"]
    columns += ["refresh, s", "peak memory, GB", "others' cores"]
    lines = [
        f"{runs[0]['machine']['kind']}: fitted shares of the rate: generation {machine.prefill_share:.0%} and "
        f"{machine.token_seconds * 1000:.0f} ms a decoding step, reference {machine.forward_share:.0%}, update "
        f"{machine.update_share:.0%}.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
    ]
    for run in runs:
        name, seconds = run.get("model", "135M"), run["seconds"]
        phases = predict(machine, SHAPES[name], engine_load(run))
        cells = [name, run.get("ranks", 1), run["prompts"], run.get("n", 2)]
        cells += [f"{run['response_length']:.1f}", f"{run['pairs']:.0f}"]
        for phase, measured in (("generation", "gen"), ("reference", "ref"), ("update", "update_actor")):
            cells.append(f"{seconds[measured]:.2f} / {phases.seconds[phase]:.2f}")
        cells += [f"{seconds['update_weights']:.2f}", f"{seconds['step']:.2f} / {phases.step_seconds:.2f}"]
        cells += [f"{run['refresh']:.2f}", f"{run['peak_memory_gb']:.1f}", f"{run['others_cores']:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


# ---- GPUs ------------------------------------------------------------------------------------------------------------
GPU_LOAD = Load(prompts=1024, n=2, prompt=200, response=300, longest=1024)
GPUS = (1, 8, 64, 512)
GPU_PHASES = ("generation", "reference", "update", "weight sync", "rest")


def gpu_table(prompts: int | None = None) -> str:
    """Predictions for Qwen2.5 on H100s; `prompts` a GPU, or 1,024 in all."""
    columns = ["model", "GPUs", "prompts", *(f"{phase}, s" for phase in (*GPU_PHASES, "step")), "refresh, s"]
    columns += ["responses/s"]
    columns += ["memory a GPU, GB", "received a GPU, GB"]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for name in ("Qwen2.5-3B", "Qwen2.5-7B"):
        for gpus in GPUS:
            load = replace(GPU_LOAD, prompts=prompts * gpus) if prompts else GPU_LOAD
            found = predict(H100, MODELS[name], load, gpus)
            lines.append(gpu_row(name, gpus, load, found))
    return "\n".join(lines)


def gpu_row(name: str, gpus: int, load: Load, found: Prediction) -> str:
    memory = found.peak_memory
    fits = "" if memory < H100.memory else " (too much)"
    seconds = [*(found.seconds[phase] for phase in GPU_PHASES), found.step_seconds]
    cells = [name, str(gpus), f"{load.prompts:,}", *(f"{value:.1f}" for value in seconds)]
    cells += [f"{refresh_seconds(H100, MODELS[name], gpus):.3f}"]
    cells += [f"{load.prompts * load.n / found.step_seconds:.0f}", f"{memory / 1e9:.0f}{fits}"]
    return f"| {' | '.join([*cells, f'{sum(found.network.values()) / 1e9:.0f}'])} |"


PROFILE_LOAD = Load(prompts=64, n=8, prompt=200, response=300, longest=1024)
PROFILE_FULLEST = replace(PROFILE_LOAD, prompt=512, response=1024)  # what memory must suffice for
LONGEST_ROW = 512 + 2 * 1024


def fit_table() -> str:
    """Qwen2.5 on 1 and 8 GPUs of three sizes: what the profile takes, what makes it fit, and a step then."""
    columns = ["model", "GPUs", "training, GB", "generating, GB", "settings to add", "GB then"]
    columns += [f"{phase}, s" for phase in (*GPU_PHASES[:-1], "step")]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for name, model in MODELS.items():
        for machine in (A10, A100, H100):
            lines += [fit_row(name, model, machine, gpus) for gpus in (1, 8)]
    return "\n".join(lines)


def fit_row(name: str, model: Model, machine: Machine, gpus: int) -> str:
    """A row of fit_table: memory for the longest prompts and responses, seconds for those of a mean length."""
    layout = layout_of(machine, PROFILE_FULLEST, gpus)
    peaks = memory.peaks(model, layout, machine.memory)
    cells = [name, f"{gpus} x {machine.name}", *(f"{peaks[phase] / 1e9:.0f}" for phase in ("training", "generation"))]
    fit = fitting(model, layout, machine.memory, row=LONGEST_ROW)
    if fit is None:
        return f"| {' | '.join([*cells, 'none suffice', *[''] * 6])} |"
    settings, layout = fit
    found = predict(machine, model, PROFILE_LOAD, gpus, layout)
    cells += [" ".join(map(shorten, settings)) or "none needed", f"{found.peak_memory / 1e9:.0f}"]
    seconds = [*(found.seconds[phase] for phase in GPU_PHASES[:-1]), found.step_seconds]
    return f"| {' | '.join([*cells, *(f'{value:.1f}' for value in seconds)])} |"


def parts_table() -> str:
    """What holds the memory of one A10 in training, in GB, and the phases beside it."""
    lines = []
    for name, model in MODELS.items():
        layout = layout_of(A10, PROFILE_FULLEST, devices=1)
        peaks = memory.peaks(model, layout, A10.memory)
        held = memory.training(model, layout) | {"in all": peaks["training"], "generating": peaks["generation"]}
        if not lines:
            lines = [f"| model | {' | '.join(held)} |", f"|{' --- |' * (len(held) + 1)}"]
        lines.append(f"| {name} | {' | '.join(f'{value / 1e9:.1f}' for value in held.values())} |")
    return "\n".join(lines)


def shorten(settings: str) -> str:
    """Keys without actor_rollout_ref and fsdp_config."""
    return " ".join(
        f"`{one.replace('actor_rollout_ref.', '').replace('fsdp_config.', '')}`" for one in settings.split()
    )


# ---- The document ----------------------------------------------------------------------------------------------------
def latest_plain(kind: str | None = None) -> dict:
    """The newest measurement of plain steps, on that kind of machine if there is one."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("*-scaling-plain*.json")]
    there = [one for one in found if one["machine"]["kind"] == kind] or found
    return max(there, key=lambda one: one["date"])


def fill(text: str, tables: dict[str, str]) -> str:
    """The document with its tables, each between two marks, made anew.

    Raises:
        ValueError: when the document lacks a table's marks.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{DOCUMENT.name} has no place for the table '{name}': put the lines {begin} and {end} in")
        text = pattern.sub(lambda _, table=table, begin=begin, end=end: f"{begin}\n{table}\n{end}", text)
    return text


def tables() -> dict[str, str]:
    """The document's tables by name: what the formula says, and what was measured last."""
    runs = json.loads(ENGINE_FILE.read_text())["runs"]
    kind = next(iter(runs.values()))["machine"]["kind"]
    return {
        "1,024 prompts": gpu_table(),
        "128 prompts a GPU": gpu_table(prompts=128),
        "fit": fit_table(),
        "parts": parts_table(),
        "plain": plain_table(latest_plain()),
        "engine": engine_table(runs, latest_plain(kind)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Growth of a training step.")
    parser.add_argument("what", choices=("plain", "engine", "tables"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rounds", type=int, default=1, help="rounds of a plain step that count (1)")
    options = parser.parse_args()
    if options.what != "tables":
        make_missing(options.model, options.data)
    if options.what == "plain":
        write_result("scaling-plain", provenance() | measure_plain(options.model, options.rounds))
    elif options.what == "engine":
        run_missing([], ENGINE, lambda name: measure_engine(name, options.model, options.data), ENGINE_FILE, "runs")
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), tables()))


if __name__ == "__main__":
    main()
