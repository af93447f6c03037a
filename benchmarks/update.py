"""Reference pass and update of the recipe's own worker, without Ray and vLLM, by settings of its engine.

    .venv/bin/python -m benchmarks.update [--cases short long] [--arms ...] [--rounds 3] [--model DIR] [--profile]

short: prompts of 46 tokens with two responses of 12, the embedded model; long: 512 with two of 128, a small model with
random weights. Every arm runs in a process of its own, one rank with all cores, on the same pairs; the first round
warms up. Prints medians and the ratios to the first arm, and writes benchmarks/results/DATE-update.json.

--profile prints in their place where the time goes, by torch.profiler's operations: of the short pairs, in the CPU
profile's own micro-batches and with the activations that it keeps.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.inputs import MODEL, make_missing
from benchmarks.machine import ROOT, Finished, plain_environment, provenance, run_measured, write_result
from benchmarks.random_model import save_random_model
from recipe.spin.tools.device_probe import free_port

SEPARATE = "actor_rollout_ref.share_prompt=False"
RECOMPUTE = "actor_rollout_ref.model.enable_gradient_checkpointing"
KEEP_PRODUCTS = "actor_rollout_ref.keep_products"
ARMS: dict[str, list[str]] = {
    "a sequence a response, recomputed": [SEPARATE, f"{RECOMPUTE}=True", f"{KEEP_PRODUCTS}=False"],
    "a sequence a response": [SEPARATE, f"{RECOMPUTE}=False"],
    "the prompt once": [f"{RECOMPUTE}=False"],
    "the prompt once, products kept": [f"{RECOMPUTE}=True", f"{KEEP_PRODUCTS}=True"],
}


@dataclass(frozen=True)
class Case:
    """Pairs of random tokens, the tokens of a micro-batch, and whether the embedded model or a small random one."""

    prompt: int
    response: int
    pairs: int
    tokens_per_micro_batch: int
    embedded_model: bool


CASES = {
    "short": Case(46, 12, 32, 512, embedded_model=True),
    "long": Case(512, 128, 4, 2048, embedded_model=False),
}


def data_of(case: Case, model: str) -> list[str]:
    return [
        f"actor_rollout_ref.model.path={model}",
        f"data.train_batch_size={case.pairs}",
        f"data.max_prompt_length={case.prompt}",
        f"data.max_response_length={case.response}",
    ]


def overrides_of(case: Case, model: str) -> list[str]:
    tokens = case.tokens_per_micro_batch
    return [
        *data_of(case, model),
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={tokens}",
        f"actor_rollout_ref.ref.log_prob_max_token_len_per_gpu={tokens}",
    ]


def save_small_model(folder: Path) -> str:
    """A Llama of 27 million random parameters that takes long prompts."""
    from transformers import LlamaConfig

    return save_random_model(
        LlamaConfig,
        folder,
        8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def pairs_of(case: Case):
    """A batch as the tests' worker takes it: random tokens, the first response of every prompt preferred."""
    from worker_jobs import Batch

    draw = random.Random(0)
    prompts = [draw.choices(range(300), k=case.prompt) for _ in range(case.pairs)]
    responses = [draw.choices(range(300), k=case.response) for _ in range(2 * case.pairs)]
    chosen = list(range(0, 2 * case.pairs, 2))
    return Batch(
        prompts=[prompt for prompt in prompts for _ in range(2)],
        responses=responses,
        masks=[[1] * case.response] * (2 * case.pairs),
        chosen=chosen,
        rejected=[row + 1 for row in chosen],
        weights=[1.0] * case.pairs,
    )


def measure(case: Case, overrides: list[str], rounds: int) -> list[dict[str, float]]:
    """Seconds of the reference pass and of the update, round by round; runs in a process of its own."""
    from worker_harness import make_update
    from worker_jobs import lay_out

    dpo, batch = make_update(*overrides), pairs_of(case)
    return [timed_step(dpo, lay_out(dpo, batch), step) for step in range(1, rounds + 2)][1:]


def profile(case: Case, overrides: list[str]) -> dict[str, float]:
    """Seconds of a reference pass and an update by operation, each without what it calls, and of Python beside them.

    Runs in a process of its own; a step before it warms up.
    """
    from torch import profiler
    from worker_harness import make_update
    from worker_jobs import lay_out

    dpo, batch = make_update(*overrides), pairs_of(case)
    timed_step(dpo, lay_out(dpo, batch), 1)
    rows = lay_out(dpo, batch)
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as profiled:
        seconds = sum(timed_step(dpo, rows, 2).values())
    found = {event.key: event.self_cpu_time_total / 1e6 for event in profiled.key_averages()}
    return found | {"Python": seconds - sum(found.values())}


def timed_step(dpo, rows, step: int) -> dict[str, float]:
    from worker_jobs import optimize

    dpo.reference_equals_actor = False  # or there would be no reference pass in the first step
    times = [time.perf_counter()]
    dpo.add_ref_logps(rows)
    times.append(time.perf_counter())
    optimize(dpo, rows, step)
    times.append(time.perf_counter())
    return {"ref": times[1] - times[0], "update": times[2] - times[1]}


def run_arm(case: str, overrides: list[str], rounds: int, folder: Path) -> dict:
    """Measures one arm in a process with the CPU profile's environment."""
    found, process = run_alone([case, "--rounds", str(rounds)], overrides, folder)
    medians = {phase: statistics.median(one[phase] for one in found) for phase in ("ref", "update")}
    return medians | {"rounds": found, "process": asdict(process)}


def run_alone(arguments: list[str], overrides: list[str], folder: Path) -> tuple[Any, Finished]:
    """What `--run` with these arguments found in a process with the CPU profile's environment."""
    from worker_harness import cpu_environment

    output = folder / "found.json"
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    threads = cpu_environment() | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = plain_environment(**threads, **alone, PYTHONPATH=path)
    command = [sys.executable, "-m", "benchmarks.update", "--run", *arguments, "--output", str(output), *overrides]
    process = run_measured(command, environment, folder / "update.log")
    return json.loads(output.read_text()), process


def profile_table(found: dict[str, float]) -> str:
    """Operations that take a hundredth of the time or more, and the others as one."""
    total = sum(found.values())
    large = {name: value for name, value in found.items() if value >= total / 100}
    rows = sorted(large.items(), key=lambda row: -row[1]) + [("others", total - sum(large.values()))]
    lines = [f"| {name} | {value:.2f} | {value / total:.1%} |" for name, value in rows]
    return "\n".join(["| operation | s | share |", "| --- | ---: | ---: |", *lines])


def table(results: dict[str, dict[str, dict]]) -> str:
    lines = ["| case | arm | reference, s | update, s | both to the first arm's | peak memory, GB |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for case, arms in results.items():
        first = next(iter(arms.values()))
        for name, found in arms.items():
            ratio = (found["ref"] + found["update"]) / (first["ref"] + first["update"])
            memory = found["process"]["peak_memory_gb"]
            cells = f"{found['ref']:.2f} | {found['update']:.2f} | {ratio:.2f} | {memory:.1f}"
            lines.append(f"| {case} | {name} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Reference pass and update by settings of the engine.")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="where the time goes, in place of the arms")
    parser.add_argument("--run", choices=CASES, help=argparse.SUPPRESS)  # what run_arm's process does
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further overrides of all arms")
    options = parser.parse_args()
    if options.run:
        case, overrides = CASES[options.run], options.overrides
        found = profile(case, overrides) if options.profile else measure(case, overrides, options.rounds)
        options.output.write_text(json.dumps(found))
        return

    make_missing(options.model)
    sys.path.append(str(ROOT / "tests"))  # the tests' way to the worker without Ray
    if options.profile:
        with tempfile.TemporaryDirectory() as temporary:
            overrides = [*data_of(CASES["short"], options.model), *options.overrides]
            print(profile_table(run_alone(["short", "--profile"], overrides, Path(temporary))[0]))
        return
    print(compare_arms(options))


def compare_arms(options: argparse.Namespace) -> str:
    """Runs all arms and writes what they took; the table, and the file."""
    results: dict[str, dict[str, dict]] = {case: {} for case in options.cases}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_small_model(folder / "model")
        for case in options.cases:
            model = options.model if CASES[case].embedded_model else str(folder / "model")
            common = [*overrides_of(CASES[case], model), *options.overrides]
            for name in options.arms:
                results[case][name] = run_arm(case, [*common, *ARMS[name]], options.rounds, folder)
    path = write_result("update", provenance() | {"arms": ARMS, "overrides": options.overrides, "cases": results})
    return f"{table(results)}\n\n{path}"


if __name__ == "__main__":
    main()
