"""`python -m recipe.spin.main_spin KEY=VALUE ...`: checks the settings, starts Ray and trains."""

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from recipe.spin import verl_patches
from recipe.spin.checks.check import check_config
from recipe.spin.checks.cluster import check_cluster, check_files
from recipe.spin.checks.finding import FAIL
from recipe.spin.checks.model_files import fit_weight_bucket
from recipe.spin.checks.paths import make_absolute
from recipe.spin.checks.pinned_model import fetch_pinned_model
from recipe.spin.common import heap
from recipe.spin.common.ray_address import joins_cluster
from recipe.spin.common.settings import ConfigError
from recipe.spin.engine.kernels import has_flash_attention_2
from recipe.spin.run import resume, signals
from recipe.spin.run.console import without_chatter
from recipe.spin.run.failure import RunFailed, same_command
from recipe.spin.run.lock import hold_run_folder

FOLDER = Path(__file__).resolve().parent
OmegaConf.register_new_resolver("spin_folder", lambda name: str(FOLDER / name), replace=True)
OmegaConf.register_new_resolver(
    "spin_attention",
    lambda share_prompt: "flash_attention_2" if not share_prompt and has_flash_attention_2() else "sdpa",
    replace=True,
)
OmegaConf.register_new_resolver(
    "spin_by_source", lambda source, reward, self_play: self_play if source == "self_play" else reward, replace=True
)
OmegaConf.register_new_resolver("spin_by_lora", lambda rank, lora, full: lora if rank else full, replace=True)
OmegaConf.register_new_resolver(
    "spin_by_gpus", lambda nodes, gpus, one, several: one if (nodes, gpus) == (1, 1) else several, replace=True
)
OmegaConf.register_new_resolver("spin_executor", lambda ranks: "uni" if ranks == 1 else "mp", replace=True)

# What the processes of a run need, to be imported once (run/worker_forks.py); the first of these do without Ray, and of
# those with it forked_ids comes before all classes
IMPORTED_AT_ONCE = ("torch._dynamo", "tensordict", "transformers")
IMPORTED_WITH_RAY = (
    "recipe.spin.run.forked_ids",
    "recipe.spin.main_spin",
    "recipe.spin.spin_trainer",
    "recipe.spin.rollout.server",
)


class TaskRunner:
    """The Ray actor that drives a run: builds the trainer and the agent loop, and trains.

    `environment` is set in its process: what must not stand in Ray's runtime environment, such as keys.
    """

    def __init__(self, environment: dict[str, str] | None = None):
        os.environ.update(environment or {})
        self.trainer = None

    @staticmethod
    def trainer_class(config: DictConfig) -> type:
        """The trainer that the config asks for; a recipe of yours may give its own."""
        from recipe.spin.async_trainer import AsyncSpinTrainer
        from recipe.spin.spin_trainer import SpinTrainer

        return AsyncSpinTrainer if config.trainer.v1.trainer_mode == "colocate_async" else SpinTrainer

    def run(self, config: DictConfig) -> None:
        """Trains as the config says; returns when the run is complete."""
        from verl.utils.logging_utils import configure_verl_logging

        from recipe.spin.rollout import queue
        from recipe.spin.rollout.agent_loop import RolloutManager

        def start_agent_loop() -> RolloutManager:
            queue.start(config.transfer_queue)
            return RolloutManager.start(config)  # its workers look for TransferQueue

        configure_verl_logging()
        succeeded = False
        try:
            self.trainer = self.trainer_class(config)(config)
            # Small processes start while the trainer loads the models; everything is imported, which threads disturb
            with ThreadPoolExecutor(1) as aside:
                agent_loop = aside.submit(start_agent_loop)
                self.trainer.init()
            agent_loop = agent_loop.result()
            agent_loop.connect(self.trainer.get_llm_client(), self.trainer.get_reward_handles())
            heap.hand_back()
            self.trainer.fit(agent_loop)
            succeeded = True
        finally:
            if hasattr(self.trainer, "logger"):
                self.trainer.logger.finish(exit_code=0 if succeeded else 1)
            queue.stop()

    def progress(self) -> dict | None:
        """What the trainer is doing, the last finished step and its metrics; None before there is a trainer."""
        return getattr(self.trainer, "progress", None)


def run_spin(config: DictConfig) -> None:
    """Runs a checked and resolved config on a Ray cluster and reports what came of it.

    Raises:
        ConfigError: when the cluster has too little for the run, which would then wait for ever.
        RunFailed: when a step, a worker or the cluster failed; the message has the cause on top.
    """
    from verl.trainer.main_ppo import run_ppo

    from recipe.spin.run import cluster, report
    from recipe.spin.run.failure import explained
    from recipe.spin.run.liveness import Liveness
    from recipe.spin.run.monitor import TASK_RUNNER, RunMonitor
    from recipe.spin.run.worker_forks import WorkerForks
    from recipe.spin.run_folder import FAILURE, read_history

    runner = TaskRunnerClass(config, name=TASK_RUNNER, num_cpus=1, max_concurrency=2)
    logs = Path(config.trainer.default_local_dir) / FAILURE
    go_on = same_command(config.trainer.resume_mode)
    with explained(logs, go_on=go_on):
        history, _ = read_history(logs.parent)
        forks = None
        if WorkerForks.fit(config):
            forks = WorkerForks(config.ray_kwargs.ray_init, IMPORTED_AT_ONCE, IMPORTED_WITH_RAY)
        joins, stall = cluster.prepare(config), config.trainer.stall_timeout_s
        monitor = RunMonitor(logs, config.trainer.device, joins, history, forks, stall)
        heap.hand_back()
        sigterm, imports = verl_patches.sigterm_kept_from_ray(), verl_patches.workers_without_folder_of_the_call()
        with monitor, explained(logs, monitor.logs, go_on), Liveness(forks, monitor.stalled), sigterm, imports:
            run_ppo(config, task_runner_class=runner)
        report.write(config, seconds=monitor.seconds, peak_memory_gb=monitor.peak_memory_gb)


def _check_by_verl(config: DictConfig) -> None:
    """Raises ConfigError with what verl itself refuses."""
    from verl.utils.config import validate_config

    try:
        with without_chatter():
            validate_config(config, use_reference_policy=True, use_critic=False)
    except Exception as error:  # assertions, and whatever its dataclasses raise
        raise ConfigError(f"verl refuses these settings: {error}") from error


class TaskRunnerClass:
    """TaskRunner as verl's run_ppo wants it: a class that it makes remote once it has started or joined Ray.

    That moment is used to take the signals back, and to look at what the cluster has. Keeps the actor alive, so that
    the run's last progress can be asked for.
    """

    def __init__(self, config: DictConfig, **options):
        self._config = config
        self._options = options

    def options(self, **options) -> "TaskRunnerClass":
        return TaskRunnerClass(self._config, **self._options, **options)

    def remote(self):
        import ray

        from recipe.spin.run.cluster import logging_settings

        signals.raise_received()
        signals.honor()  # again: the C++ part of Ray has set a handler that aborts the process
        _require_of_cluster(self._config)
        environment = logging_settings(dict(os.environ), Path(self._config.trainer.default_local_dir))
        self._actor = ray.remote(TaskRunner).options(**self._options).remote(environment)
        return self._actor


def _require_of_cluster(config: DictConfig) -> None:
    """Raises ConfigError where the cluster that Ray is connected to cannot carry the run."""
    finding = check_cluster(config)
    if finding.verdict != FAIL and joins_cluster(config):
        finding = check_files(config, resume.SETTINGS)
    if finding.verdict == FAIL:
        raise ConfigError(finding.text)


def _resolve(config: DictConfig) -> None:
    """Puts values in place of all `${...}`."""
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        key = next(_unresolvable(config))  # which the error does not name
        cause = str(error).partition("\n")[0]
        raise ConfigError(
            f"{key}: its value comes from elsewhere by ${{...}}, which fails: {cause}; correct what that names, or "
            f"give {key} a value of its own"
        ) from error


def _unresolvable(section: DictConfig | ListConfig, prefix: str = "") -> Iterator[str]:
    """Keys with a `${...}` that has no value."""
    for name in section if isinstance(section, DictConfig) else range(len(section)):
        try:
            value = section[name]
        except MissingMandatoryValue:  # has ???, and is left
            continue
        except OmegaConfBaseException:
            yield f"{prefix}{name}"
            continue
        if isinstance(value, DictConfig | ListConfig) and not OmegaConf.is_interpolation(section, name):
            yield from _unresolvable(value, f"{prefix}{name}.")


@hydra.main(config_path="config", config_name="spin_trainer", version_base=None)
def main(config: DictConfig) -> None:
    """Entry point: settings that cannot work end in one clear message, before Ray starts."""
    signals.honor()
    try:
        _resolve(config)
        make_absolute(config)
        fetch_pinned_model(config)
        check_config(config)
        _check_by_verl(config)
        fit_weight_bucket(config)
        hold_run_folder(config.trainer.default_local_dir)
        resume.prepare(config)
        with without_chatter():
            run_spin(config)
    except (ConfigError, RunFailed) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        _say(f"stopped; the same command {same_command(config.trainer.resume_mode)}\n")
        sys.exit(128 + (signals.received or [signal.SIGINT])[0])


def _say(text: str) -> None:
    """To stderr; where its terminal or pipe was closed to nobody, and so what Python itself still has to write."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    # Ray pickles classes by the name of their module, which must not be __main__.
    from recipe.spin.main_spin import main as importable_main

    importable_main()
