"""The watch over a run's processes: it names the first that died, and ends a run that waits for it."""

import signal
import threading
import time
import types

import pytest
from ray.core.generated.common_pb2 import ActorDeathCause, ActorDiedErrorContext

from recipe.spin.run import liveness, signals
from recipe.spin.run.failure import CannotGoOn
from recipe.spin.run.liveness import Liveness, in_words


def actor(
    number: int, kind: str, state: str = "ALIVE", name: str = "", reason=None, end: int = 0, oom: str = ""
) -> dict:
    """A row of Ray's table of actors."""
    cause = ActorDeathCause()
    if reason is not None:
        cause.actor_died_error_context.reason = reason
        detail = "Worker exits. There are some potential root causes. (1) memory"
        cause.actor_died_error_context.error_message = f"The actor is dead. Worker exit detail: {detail}"
    if oom:
        cause.oom_context.error_message = oom
    row = {"Address": {"IPAddress": "here"}}
    row |= {"ActorID": str(number), "ActorClassName": kind, "Name": name, "Pid": 100 + number, "StartTime": number}
    return row | {"State": state, "EndTime": end, "DeathCause": cause}


@pytest.fixture
def table(monkeypatch, tmp_path) -> list[dict]:
    """Ray's table of actors, to be filled by the test; Ray's logs are in tmp_path."""
    rows: list[dict] = []
    monkeypatch.setattr(liveness, "_actors_of_this_job", lambda: rows)
    monkeypatch.setattr(liveness, "ray_logs", lambda: tmp_path)
    node = types.SimpleNamespace(node_ip_address="here", dead_processes=lambda: [])
    monkeypatch.setattr(liveness.ray_worker, "_global_node", node)
    return rows


def test_the_first_that_died_is_named_with_its_last_words(table, tmp_path):
    died = ActorDiedErrorContext.WORKER_DIED
    table += [actor(1, "RolloutServer"), actor(2, "RewardWorker", "DEAD", reason=died, end=20)]
    table += [actor(3, "SimpleStorageUnit", "DEAD", reason=died, end=10)]
    (tmp_path / "worker-a-01000000-103.out").write_text("")
    tracker = "  x/resource_tracker.py:254: UserWarning: resource_tracker: leaked\n    warnings.warn('%d '\n" * 9
    text = ":actor_name:SimpleStorageUnit\n" + "".join(f"line {i}\n\n" for i in range(9)) + tracker
    (tmp_path / "worker-a-01000000-103.err").write_text(text)
    watch = Liveness()
    watch._look()
    assert watch.lost.component == "TransferQueue's storage 0" and watch.lost.how == "Worker exits."
    assert watch.lost.last_words.splitlines() == [f"  line {i}" for i in range(3, 9)]


@pytest.mark.parametrize(
    ("how", "hint"),
    [
        ("it ended with code -9.", True),
        ("Worker unexpectedly exits with a connection error code 2. End of file.", True),
        ("it ended with code 1.", False),
        ("Worker exits with an exit code 1.", False),
    ],
)
def test_want_of_memory_is_thought_of_where_nothing_else_explains_the_end(how, hint):
    assert ("want of memory" in str(liveness.Lost("vLLM's server 0", 7, how, ""))) == hint


def test_the_fork_server_that_died_is_named_with_its_last_words(table, tmp_path):
    (tmp_path / "fork_server.log").write_text("Traceback\nModuleNotFoundError: No module named 'x'\n")
    process = types.SimpleNamespace(pid=7, returncode=1, poll=lambda: 1)
    watch = Liveness(types.SimpleNamespace(process=process, log=tmp_path / "fork_server.log"))
    watch._look()
    component, how = "the process that workers are forked from", "it ended with code 1."
    assert str(watch.lost).startswith(f"{component} (process 7) died: {how}")
    assert watch.lost.last_words.splitlines()[-1] == "  ModuleNotFoundError: No module named 'x'"


def test_a_death_is_seen_although_its_log_cannot_be_read(table, tmp_path):
    table.append(actor(3, "RewardWorker", "DEAD", reason=ActorDiedErrorContext.WORKER_DIED))
    (tmp_path / "worker-a-01000000-103.err").symlink_to(tmp_path / "gone")
    watch = Liveness()
    watch._look()
    assert watch.lost.component == "reward worker 0" and watch.lost.last_words == ""


def test_the_log_of_another_machines_process_is_not_there(table, tmp_path):
    row = actor(1, "RewardWorker", "DEAD", reason=ActorDiedErrorContext.WORKER_DIED)
    table.append(row | {"Address": {"IPAddress": "elsewhere"}})
    (tmp_path / "worker-a-01000000-101.err").write_text("of a process here with the same number")
    watch = Liveness()
    watch._look()
    assert watch.lost.component == "reward worker 0" and watch.lost.last_words == ""


def test_a_process_that_died_with_its_machine_is_lost(table):
    row = actor(1, "WorkerDict", "DEAD", name="x3WorkerDict_0:0", reason=ActorDiedErrorContext.NODE_DIED)
    row["DeathCause"].actor_died_error_context.error_message = "The actor died because its node has died. Node Id: 7f"
    table.append(row | {"Address": {"IPAddress": "elsewhere"}})
    watch = Liveness()
    watch._look()
    assert watch.lost.component == "the trainer's rank 0"
    assert watch.lost.how == "The actor died because its node has died. Node Id: 7f"


@pytest.mark.parametrize("reason", [ActorDiedErrorContext.RAY_KILL, ActorDiedErrorContext.OUT_OF_SCOPE, None])
def test_what_was_ended_on_purpose_or_by_an_exception_is_not_lost(table, reason):
    table.append(actor(1, "TransferQueueController", "DEAD", reason=reason))
    watch = Liveness()
    watch._look()
    assert watch.lost is None


def test_a_process_that_ray_ended_for_want_of_memory_is_lost(table):
    table.append(actor(1, "TransferQueueController", "DEAD", oom="the node ran low on memory"))
    watch = Liveness()
    watch._look()
    assert watch.lost.how == "the node ran low on memory"


def test_components_are_named_in_words():
    kind = "create_colocated_worker_cls.<locals>.WorkerDict"
    ranks = [actor(9 - i, kind, name=f"x3WorkerDict_{i // 2}:{i % 2}") for i in range(4)]
    assert [in_words(rank, ranks) for rank in ranks] == [f"the trainer's rank {i}" for i in range(4)]
    servers = [actor(i, "RolloutServer", name=f"vllm_server_{i}_0") for i in (0, 2, 10)]
    assert [in_words(server, servers) for server in servers] == [f"vLLM's server {i}" for i in range(3)]
    runner = actor(1, "MyRunner", name="spin_task_runner")
    assert in_words(runner, [runner]) == "the run's task runner"
    other = actor(1, "Mine")
    assert in_words(other, [other]) == "Mine 0"


def test_ray_itself_is_watched(table, monkeypatch):
    process = types.SimpleNamespace(pid=7, returncode=-9)
    dead = [("log_monitor", process), ("raylet", process)]
    monkeypatch.setattr(liveness.ray_worker, "_global_node", types.SimpleNamespace(dead_processes=lambda: dead))
    watch = Liveness()
    watch._look()
    assert "raylet" in watch.lost.component and "-9" in watch.lost.how


@pytest.fixture
def quick(monkeypatch):
    """No time between looks, and signals handled as in a run; put back afterwards."""
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(liveness, "GRACE_SECONDS", 0.0)
    before = {number: signal.getsignal(number) for number in signals.STOPPING}
    signals.honor()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals.received.clear()


def test_a_run_that_waits_for_a_dead_process_is_ended(table, quick):
    with pytest.raises(CannotGoOn, match=r"vLLM's server 0 \(process 101\) died: Worker exits\."), Liveness():
        table.append(actor(1, "RolloutServer", "DEAD", reason=ActorDiedErrorContext.WORKER_DIED))
        for _ in range(3000):  # as Ray's waiting does, looks for signals now and then; a lock's would not
            time.sleep(0.01)


def test_a_run_that_does_not_get_on_is_ended(table, quick):
    words = iter((None, None, "the run has not got on"))
    with pytest.raises(CannotGoOn, match="the run has not got on"), Liveness(stalled=lambda: next(words)):
        for _ in range(3000):
            time.sleep(0.01)


def test_what_a_run_ends_by_itself_is_the_death_before_it(table, quick, monkeypatch):
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 30)
    with pytest.raises(CannotGoOn) as caught, Liveness():
        table.append(actor(1, "RolloutServer", "DEAD", reason=ActorDiedErrorContext.WORKER_DIED))
        raise ValueError("0 of 4 prompts have responses")
    assert isinstance(caught.value.__cause__, ValueError)


def test_other_errors_and_stops_stay_what_they_are(table):
    for error in (ValueError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)), Liveness():
            raise error


# ---------------------------------------------------------------------- vLLM's engine


def test_a_server_ends_with_its_engine(monkeypatch, capfd):
    """vLLM's own answer to a dead engine is that requests wait for ever."""
    from recipe.spin.rollout import server

    ended = []
    monkeypatch.setattr(server, "ENGINE_POLL_SECONDS", 0.001)
    monkeypatch.setattr(server.os, "_exit", ended.append)
    engine = types.SimpleNamespace(errored=False)
    thread = threading.Thread(
        target=server.RolloutServer._end_with_engine, args=[types.SimpleNamespace(engine=engine)], daemon=True
    )
    thread.start()
    time.sleep(0.02)
    assert not ended
    engine.errored = True
    thread.join(5)
    assert ended == [1] and "vLLM's engine" in capfd.readouterr().err
