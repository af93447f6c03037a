"""Processes of a run killed at its moments: whichever dies, the run ends, names it, leaves nothing and goes on.

One run is killed again and again: every row starts it with the same command, which goes on from the last checkpoint,
and fails it by another fault. In the end it must have come to what a run without any fault comes to. Any part of the
rows makes such a chain. All of them are left out of the suite but for a sample: `bash tests/run.sh tests/test_faults.py
-m "slow or long"`.
"""

import glob
import json
import math
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from faulty_run import FILLER, STRUCK
from judges import settings as judges
from whole_runs import finish, metrics, processes, start, temporary_folder

from benchmarks.rule_judge import RuleJudge
from recipe.spin.run_folder import metrics_files, tracked_step

ROOT = Path(__file__).resolve().parent.parent
# The same file for all rows, as a run does not go on with another: how it behaves stands in a file beside it
REWARD = """
import asyncio
import time
from pathlib import Path

def in_order(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return float(len(solution_str)) + sum(map(ord, solution_str)) % 97 / 100

def slow(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    time.sleep(2)
    return in_order(data_source, solution_str, ground_truth)

def none(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return None

def for_ever(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    while True:
        time.sleep(1)

def without_pause(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    while True:
        pass

async def later(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    await asyncio.sleep(1e6)

async def alone(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    time.sleep(1e6)  # nor does anything else in this reward's process go on

def sometimes(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    if sum(map(ord, solution_str)) % 4 == 0:
        raise ValueError("of no use")
    return in_order(data_source, solution_str, ground_truth)

compute_score = globals()[Path(__file__).with_name("behaviour").read_text()]
"""
NEVER = "did not return within algorithm.reward_timeout_s=5 s"
FAILING_REWARDS = {
    "none": "returned None, which is no finite number,",
    "for_ever": NEVER,
    "without_pause": NEVER,
    "later": NEVER,
    "alone": NEVER,
    "sometimes": "raised ValueError: of no use",
}
NAMES = {
    "engine": "vLLM's server 0",  # which ends with its engine
    "model": "vLLM's server 0",  # which ends with it, by way of the engine
    "server": "vLLM's server 0",
    "rank": "the trainer's rank 0",
    "agent": "agent loop worker 0",
    "reward": "reward worker 0",
    "controller": "TransferQueue's controller",
    "storage": "TransferQueue's storage 0",
    "runner": "the run's task runner",
    "forks": "the process that workers are forked from",
    "raylet": "Ray's node manager (raylet)",
    "gcs_server": "Ray's control service (gcs_server)",
}
# By component, what a run needs to have it: as on GPUs, a process of its own for vLLM's model
APART = {"model": ["actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend=mp"]}
# In which a run has named a process that died, and ended. A bound against hangs: it is not measured here
SECONDS_TO_END = 60
MOMENTS = ("generation", "scoring", "update", "refresh", "push", "validation", "checkpoint")
SAMPLE = {("engine", "generation"), ("forks", "update")}  # in every run of the suite
CASES = [
    pytest.param(component, moment, marks=pytest.mark.slow if (component, moment) in SAMPLE else pytest.mark.long)
    for component in NAMES
    for moment in MOMENTS
]


class Chain:
    """A run in `folder / "run"`, its reward, and a temporary folder for what its processes may leave."""

    def __init__(self, folder: Path, temporary: Path, start):
        self.run, self.temporary, self._start = folder / "run", temporary, start
        self.reward = folder / "reward.py"
        self.reward.write_text(REWARD)

    def start(self, *overrides: str, reward: str = "in_order", **options):
        """The command that begins the run or goes on with it, a checkpoint every step."""
        self.reward.with_name("behaviour").write_text(reward)
        self._struck.unlink(missing_ok=True)
        settings = [f"reward.custom_reward_function.path={self.reward}", "trainer.save_freq=1"]
        # So slowly that after hundreds of steps the responses to a prompt still differ: without pairs it would stop
        settings += ["trainer.val_before_train=False", "actor_rollout_ref.actor.optim.lr=1e-6"]
        return self._start(self.run, *settings, "trainer.total_training_steps=1000", *overrides, **options)

    def start_faulty(self, moment: str, *overrides: str):
        """The same, with the fault of the environment's SPIN_FAULT at that moment."""
        validates = ["trainer.test_freq=1", "trainer.val_before_train=True"] if moment == "validation" else []
        reward = "slow" if moment == "scoring" else "in_order"
        return self.start(*validates, *overrides, reward=reward, program=["-m", "faulty_run"])

    @property
    def step(self) -> int:
        return tracked_step(self.run) or 0

    @property
    def _struck(self) -> Path:
        return self.run.with_name(STRUCK)

    @property
    def seconds_since_the_kill(self) -> float:
        return time.monotonic() - float(self._struck.read_text())

    def failure(self, process, begun_at: int) -> str:
        """The error of a run that went on from a step and failed as it should, nothing left."""
        output = finish(process, timeout=240)
        assert process.returncode == 1 and "Traceback" not in output, output[-5000:]
        lines = output[output.index("error: ") :].splitlines()
        assert "same command" in lines[-2] and lines[-1].startswith(f"logs: {self.run}"), output[-5000:]
        self.went_on_from(begun_at)
        self.leaves_nothing()
        return lines[0]

    def death(self, process, begun_at: int) -> None:
        """The end of a run that went on from a step and whose command was killed: no error, no process left."""
        output = finish(process, timeout=240)
        assert process.returncode == -signal.SIGKILL, output[-5000:]
        assert not [line for line in output.splitlines() if line.startswith("error: ")], output[-5000:]
        while (alive := processes(self.run)) and self.seconds_since_the_kill < SECONDS_TO_END:
            time.sleep(0.1)
        assert alive == []
        self.went_on_from(begun_at)

    def success(self, *overrides: str, **options) -> None:
        """Starts the command, which must come to a good end."""
        process = self.start(*overrides, **options)
        output = finish(process, timeout=600)
        assert process.returncode == 0, output[-5000:]
        self.leaves_nothing()

    def start_up_to_ray(self, **options):
        """Starts the command, and waits until Ray starts."""
        sessions = f"{self.temporary}/spin-*/ray/session_*"
        before, process, deadline = set(glob.glob(sessions)), self.start(**options), time.monotonic() + 120
        while not set(glob.glob(sessions)) - before:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"Ray has not started: {finish(process)[-5000:]}")
            time.sleep(0.01)
        return process

    def leaves_nothing(self) -> None:
        assert processes(self.run) == [] and list(self.temporary.iterdir()) == []

    def went_on_from(self, step: int) -> None:
        assert step in [begun_at for begun_at, _ in metrics_files(self.run)], "it began at another step"


@pytest.fixture(scope="module")
def a_chain(task, tiny_llama, tmp_path_factory):
    """Makes chains in a temporary folder of their own, so that what is left there is theirs."""
    temporary = temporary_folder()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        begin = partial(start, task, tiny_llama, temporary=temporary)
        yield lambda name: Chain(tmp_path_factory.mktemp(name), temporary, begin)
    shutil.rmtree(temporary)


@pytest.fixture(scope="module")
def chain(a_chain) -> Chain:
    """The one that all rows fail and go on with."""
    return a_chain("chain")


@pytest.mark.parametrize(("component", "moment"), CASES)
def test_a_killed_process_is_named_and_ends_the_run(component, moment, chain, monkeypatch):
    monkeypatch.setenv("SPIN_FAULT", f"{component}:{moment}")
    begun_at = chain.step
    error = chain.failure(chain.start_faulty(moment, *APART.get(component, [])), begun_at)
    assert chain.seconds_since_the_kill < SECONDS_TO_END
    assert error.startswith(f"error: {NAMES[component]} (process ")
    assert chain.step > begun_at or moment == "validation"


@pytest.mark.long
@pytest.mark.parametrize(
    ("component", "moment"),
    [("engine", "generation"), ("model", "push"), ("rank", "update"), ("controller", "push"), ("runner", "update")],
)
def test_a_stopped_process_is_named_and_ends_the_run(component, moment, chain, monkeypatch):
    """It lives, and all others wait for it."""
    monkeypatch.setenv("SPIN_FAULT", f"{component}:{moment}")
    monkeypatch.setenv("SPIN_SIGNAL", "SIGSTOP")
    begun_at = chain.step
    settings = ["trainer.stall_timeout_s=45", *APART.get(component, [])]
    error = chain.failure(chain.start(*settings, program=["-m", "faulty_run"]), begun_at)
    assert chain.seconds_since_the_kill < 45 + SECONDS_TO_END
    assert error.startswith("error: the run has not got on for ") and "is stopped" in error
    assert chain.step > begun_at


@pytest.mark.slow
def test_the_command_goes_on_after_the_fault_of_a_row(chain):
    """To a good end, by which the run is as long as one without the fault; the last test compares what it came to."""
    if not chain.step:
        pytest.skip("no fault came before")
    begun_at, last = chain.step, chain.step + 1
    chain.success(f"trainer.total_training_steps={last}")
    chain.went_on_from(begun_at)
    history = metrics(chain.run)
    assert chain.step == max(history) == last and math.isfinite(history[last]["actor/loss"])


@pytest.mark.long
@pytest.mark.parametrize("moment", MOMENTS, ids=[f"driver-{moment}" for moment in MOMENTS])
def test_a_killed_command_leaves_nothing_when_the_next_has_started(moment, chain, monkeypatch):
    """The run's processes end with it. Its folder stays, which the next start removes, however short that is."""
    monkeypatch.setenv("SPIN_FAULT", f"driver:{moment}")
    begun_at = chain.step
    chain.death(chain.start_faulty(moment), begun_at)
    assert chain.step > begun_at or moment == "validation"
    assert len(list(chain.temporary.glob("spin-*"))) == 1
    chain.stop(signal.SIGINT)


@pytest.mark.long
def test_a_command_killed_as_it_writes_the_report_writes_it_when_started_again(chain, monkeypatch):
    """The same command, which has nothing to train any more."""
    monkeypatch.setenv("SPIN_FAULT", "driver:report")
    begun_at = chain.step
    whole = f"trainer.total_training_steps={begun_at + 2}"
    chain.death(chain.start(whole, program=["-m", "faulty_run"]), begun_at)
    chain.leaves_nothing()
    assert chain.step == begun_at + 2 and not (chain.run / "summary.json").exists()
    chain.success(whole)
    assert json.loads((chain.run / "summary.json").read_text())["steps"] == chain.step == begun_at + 2


@pytest.mark.long
@pytest.mark.parametrize(("behaviour", "words"), FAILING_REWARDS.items(), ids=FAILING_REWARDS)
def test_a_reward_that_fails_is_named_and_ends_the_run(behaviour, words, chain):
    begun_at = chain.step
    error = chain.failure(chain.start("algorithm.reward_timeout_s=5", reward=behaviour), begun_at)
    assert f"compute_score of {chain.reward} {words} for response" in error and "to the prompt 'train " in error


@pytest.mark.long
def test_the_run_that_failed_again_and_again_comes_to_what_one_without_a_fault_does(chain, a_chain):
    """To the bit, in every metric. Of a step that failed between its checkpoint and its metrics there are none."""
    if not chain.step:
        pytest.skip("no fault came before")
    last, histories = chain.step + 1, []
    for one in (chain, a_chain("faultless")):
        one.success(f"trainer.total_training_steps={last}")
        histories.append(metrics(one.run))
    failed, faultless = ({step: learned(entry) for step, entry in history.items() if step} for history in histories)
    assert len(faultless) == last and last in failed
    assert failed == {step: faultless[step] for step in failed}


def learned(entry: dict) -> dict:
    """A step's metrics less those of speed and memory, and of validations, which the faults' own runs add."""
    others = ("timing", "perf/", "actor/mfu", "val-")
    return {name: value for name, value in entry.items() if not name.startswith(others)}


@pytest.mark.long
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(small_disk, a_chain, monkeypatch):
    """A checkpoint, a step's metrics and the report in turn meet the end of a real disk."""
    within, folder, seen = small_disk
    chain = a_chain("full")
    chain.run = folder / "run"
    small = ["trainer.check_memory=False", "trainer.max_actor_ckpt_to_keep=1", "trainer.total_training_steps=8"]
    for moment, more in (("checkpoint", []), ("push", ["trainer.save_freq=3"]), ("report", [])):
        monkeypatch.setenv("SPIN_FAULT", f"disk:{moment}")
        process = chain.start(*small, *more, program=["-m", "faulty_run"], within=within)
        output = finish(process, timeout=240)
        lines = output[output.index("error: ") :].splitlines()
        assert process.returncode == 1 and "Traceback" not in output, output[-5000:]
        assert f"No space is left on the disk of {chain.run}" in output and "same command" in lines[-2], output[-5000:]
        chain.leaves_nothing()
        (seen / "run" / FILLER).unlink()
    chain.success(*small, within=within)
    assert max(metrics(seen / "run")) == tracked_step(seen / "run") == 8


@pytest.mark.long
def test_a_reward_that_fails_now_and_then_can_be_tolerated(a_chain):
    tolerant = a_chain("tolerant")
    tolerant.success("algorithm.reward_error=skip", "trainer.total_training_steps=4", reward="sometimes")
    missing = [entry["score/missing"] for step, entry in metrics(tolerant.run).items() if step]
    assert len(missing) == 4 and 0 < sum(missing) < 4 * 8


@pytest.mark.long
def test_a_judge_that_fails_midway_is_named_and_the_run_goes_on_when_it_answers(a_chain):
    chain = a_chain("judged")
    with RuleJudge(worth) as server:

        def busy_from_the_second_step_on(request: str, response: str) -> float:
            server.refusals = 1_000_000 if chain.step else 0
            return worth(request, response)

        server.rule = busy_from_the_second_step_on
        error = chain.failure(chain.start(*judges(server)), begun_at=0)
        assert server.address in error and "status 429" in error and "too many requests" in error
        server.rule, server.refusals, last = worth, 0, chain.step + 1
        chain.success(*judges(server), f"trainer.total_training_steps={last}")
    assert chain.step == last > 1 and metrics(chain.run)[last]["judge/asked"] > 0


def worth(request: str, response: str) -> float:
    return sum(map(ord, response))


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_can_be_stopped_while_ray_starts(number, a_chain):
    chain = a_chain("stopped")
    process = chain.start_up_to_ray()
    process.send_signal(number)
    output = finish(process, timeout=120)
    assert process.returncode == 128 + number and "the same command goes on" in output, output[-5000:]
    chain.leaves_nothing()


@pytest.mark.long
def test_a_run_whose_terminal_is_closed_leaves_nothing(a_chain):
    """The window, or the connection to the machine: a signal comes, and nothing can be printed any more."""
    chain = a_chain("closed")
    process = chain.start_up_to_ray(within=(sys.executable, str(ROOT / "tests/terminal.py")))
    process.send_signal(signal.SIGUSR1)
    assert finish(process, timeout=120) == "" and process.returncode == 128 + signal.SIGHUP
    chain.leaves_nothing()
