"""`python -m recipe.spin.main_spin KEY=VALUE ...`: checks the settings, starts Ray and trains."""

import signal
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from recipe.spin.config_check import ConfigError, check_config

FOLDER = Path(__file__).resolve().parent
OmegaConf.register_new_resolver("spin_folder", lambda name: str(FOLDER / name), replace=True)


class TaskRunner:
    """The Ray actor that drives a run: builds SpinTrainer and the agent loop, and trains."""

    def __init__(self):
        self.trainer = None

    def run(self, config: DictConfig) -> None:
        """Trains as the config says; returns when the run is complete."""
        import transfer_queue as tq
        from verl.trainer.ppo.v1 import AgentLoopManagerTQ
        from verl.utils.logging_utils import configure_verl_logging

        from recipe.spin.spin_trainer import SpinTrainer

        configure_verl_logging()
        config.transfer_queue.enable = True
        tq.init(config.transfer_queue)
        succeeded = False
        try:
            self.trainer = SpinTrainer(config)
            self.trainer.init()
            agent_loop = AgentLoopManagerTQ.create(
                config=config,
                llm_client=self.trainer.get_llm_client(),
                teacher_client=self.trainer.get_teacher_client(),
                reward_loop_worker_handles=self.trainer.get_reward_handles(),
            )
            self.trainer.fit(agent_loop)
            succeeded = True
        finally:
            if hasattr(self.trainer, "logger"):
                self.trainer.logger.finish(exit_code=0 if succeeded else 1)
            tq.close()

    def progress(self) -> dict | None:
        """The last finished step and its metrics, for the progress bar; None while the trainer starts."""
        return getattr(self.trainer, "progress", None)


def run_spin(config: DictConfig) -> None:
    """Runs a checked and resolved config on a Ray cluster and reports what came of it."""
    import ray
    from verl.trainer.main_ppo import run_ppo
    from verl.utils.config import validate_config

    from recipe.spin import report
    from recipe.spin.run_monitor import RunMonitor, TASK_RUNNER

    validate_config(config, use_reference_policy=True, use_critic=False)
    runner = ray.remote(TaskRunner).options(name=TASK_RUNNER, num_cpus=1, max_concurrency=2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with RunMonitor() as monitor:
        run_ppo(config, task_runner_class=runner)
    report.write(config, seconds=monitor.seconds, peak_memory_gb=monitor.peak_memory_gb)


@hydra.main(config_path="config", config_name="spin_trainer", version_base=None)
def main(config: DictConfig) -> None:
    """Entry point: one clear message and exit code 2 for settings that cannot work."""
    try:
        OmegaConf.resolve(config)
        check_config(config)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    run_spin(config)


if __name__ == "__main__":
    # Ray pickles classes by the name of their module, which must not be __main__.
    from recipe.spin.main_spin import main as importable_main

    importable_main()
