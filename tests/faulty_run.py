"""A run in which one process is killed: SPIN_FAULT=COMPONENT:MOMENT python -m faulty_run KEY=VALUE ...

The TaskRunner kills it, or sends it another signal (SPIN_SIGNAL), once, at that moment of a step behind the first that
it trains, which leaves a checkpoint; at the moment `validation` in the first validation. At the moment `report` the
driver kills itself, as all others have ended by then. The component `disk` is filled instead, by a file in the run's
folder. When that was stands in a file beside the folder, by the machine's monotonic clock. A module of its own, so that
Ray's workers can import it.
"""

import os
import signal
import threading
import time
from functools import cached_property
from pathlib import Path

import psutil

from recipe.spin import main_spin
from recipe.spin.run import report
from recipe.spin.run.liveness import _actors_of_this_job, class_of

FILLER = "filler"
STRUCK = "struck"
VLLM = {"engine": "EngineCore", "model": "Worker"}  # by the titles of its processes; the model has one with mp alone
ACTORS = {  # by the classes of the actors
    "server": "RolloutServer",
    "rank": "WorkerDict",
    "agent": "RolloutWorker",
    "reward": "RewardWorker",
    "controller": "TransferQueueController",
    "storage": "SimpleStorageUnit",
}


def process_of(component: str) -> int:
    if component in ACTORS:
        return next(row["Pid"] for row in _actors_of_this_job() if class_of(row) == ACTORS[component])
    if component in VLLM:
        children = psutil.Process(process_of("server")).children(recursive=True)
        return next(child.pid for child in children if VLLM[component] in " ".join(child.cmdline()))
    runner = psutil.Process()
    forks, driver, *_ = runner.parents()
    if component in ("raylet", "gcs_server"):
        return next(child.pid for child in driver.children() if child.name() == component)
    return {"runner": runner, "forks": forks, "driver": driver}[component].pid


def fill(folder: Path) -> None:
    """Leaves the disk of a folder without a free page."""
    with open(folder / FILLER, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


def strike(folder: Path, pid: int | None) -> None:
    """Kills a process of the run in a folder, or with none fills the folder's disk."""
    (folder.parent / STRUCK).write_text(str(time.monotonic()))
    if pid is None:
        fill(folder)
    else:
        os.kill(pid, getattr(signal, os.environ.get("SPIN_SIGNAL", "SIGKILL")))


def faulty(trainer: type) -> type:
    """A trainer class that kills."""
    component, moment = os.environ["SPIN_FAULT"].split(":")

    class Faulty(trainer):
        _begun_at, _struck = 0, False

        def _strike(self, now: str, after: float = 0.0) -> None:
            too_early = now != "validation" and self.global_steps < self._begun_at + 2
            if now != moment or too_early or self._struck:
                return
            self._struck = True
            folder = Path(self.config.trainer.default_local_dir)
            pid = None if component == "disk" else process_of(component)
            if after:
                threading.Timer(after, strike, (folder, pid)).start()
            else:
                strike(folder, pid)

        def on_init_end(self):
            self._begun_at = self.global_steps
            super().on_init_end()

        def on_sample_begin(self):  # the prompts have been sent
            self._strike("generation")
            self._strike("scoring", after=1.5)  # where the reward takes longer
            super().on_sample_begin()

        def _refresh_reference(self):
            self._strike("refresh")
            super()._refresh_reference()

        @cached_property
        def dpo(self):
            dpo = super().dpo
            update = dpo.update_actor

            def struck(*args):
                self._strike("update")
                return update(*args)

            dpo.update_actor = struck
            return dpo

        def _save_checkpoint(self):
            self._strike("checkpoint")
            super()._save_checkpoint()

        def on_step_end(self):
            self._strike("push")
            super().on_step_end()

        def on_validate_begin(self):
            self._strike("validation", after=0.2)
            super().on_validate_begin()

    return Faulty


class FaultyRunner(main_spin.TaskRunner):
    @staticmethod
    def trainer_class(config) -> type:
        return faulty(main_spin.TaskRunner.trainer_class(config))


def strike_and_write(config, **known):
    fills = os.environ["SPIN_FAULT"] == "disk:report"
    strike(Path(config.trainer.default_local_dir), None if fills else os.getpid())
    return WRITE_REPORT(config, **known)


WRITE_REPORT = report.write


def main() -> None:
    main_spin.TaskRunner = FaultyRunner
    if os.environ["SPIN_FAULT"].endswith(":report"):
        report.write = strike_and_write
    main_spin.main()


if __name__ == "__main__":
    from faulty_run import main as importable_main

    importable_main()
