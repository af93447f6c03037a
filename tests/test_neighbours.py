"""Runs beside each other on one machine or one cluster: their weights, their data and their run folders do not meet."""

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch
from filelock import FileLock
from transfer_queue import interface
from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer as transfer

from recipe.spin import verl_patches
from recipe.spin.common.settings import ConfigError
from recipe.spin.rollout.weights import RUN_NAME, has_own_sockets, own_socket
from recipe.spin.run.lock import hold_run_folder
from recipe.spin.tools.device_probe import free_port

ROOT = Path(__file__).resolve().parent.parent
VERLS = "ipc:///tmp/rl-colocate-zmq-01000000-replica-1-rank-0.sock"


# ---- weights ---------------------------------------------------------------------------------------------------------
def address_of(run: str, monkeypatch, folder: Path) -> str:
    monkeypatch.setenv(RUN_NAME, run)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return own_socket(VERLS)


def test_the_socket_of_weights_is_the_runs_own(monkeypatch, tmp_path):
    first, second = (address_of(run, monkeypatch, tmp_path) for run in ("spin-1", "spin-2"))
    assert first == f"ipc://{tmp_path}/spin-1-weights-1-rank-0.sock" and second != first
    assert own_socket(VERLS) == second  # sender and receiver, in different processes, name the same
    assert own_socket(VERLS.replace("rank-0", "rank-1")) != second
    assert own_socket(VERLS.replace("replica-1", "replica-0")) != second


def test_split_engines_keep_verls_socket():
    """verl builds their vLLM workers, which know of no other."""
    rollout = SimpleNamespace(name="vllm", disaggregation=SimpleNamespace(enabled=False))
    assert has_own_sockets(rollout)
    rollout.disaggregation.enabled = True
    assert not has_own_sockets(rollout)


RENDEZVOUS = """
import sys
import psutil
import torch.distributed as dist
from recipe.spin import verl_patches
if sys.argv[1] == "kept":
    verl_patches.keep_rendezvous_on_loopback()
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=0, world_size=1)
print(*{one.laddr.ip for one in psutil.Process().net_connections() if one.laddr.port == int(sys.argv[2])})
"""


@pytest.mark.parametrize("kept", ["kept", "as torch has it"])
def test_a_rendezvous_at_a_loopback_address_listens_there_alone(kept):
    command = [sys.executable, "-c", RENDEZVOUS, kept, str(free_port())]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout.split()
    assert found and {"::", "0.0.0.0"}.isdisjoint(found) == (kept == "kept")


@pytest.fixture
def limit(monkeypatch):
    """Limits the waiting of verl's two sides, in this test alone."""
    for side, method in (("Sender", "async_send_weights"), ("Receiver", "receive_weights")):
        for name in (method, "_init_socket"):
            side_class = getattr(transfer, f"BucketedWeight{side}")
            monkeypatch.setattr(side_class, name, getattr(side_class, name))
    return verl_patches.limit_weight_transfer


def send(address: str, value: float) -> None:
    weights = [(f"weight {i}", torch.full((1000,), value)) for i in range(3)]
    asyncio.run(transfer.BucketedWeightSender(address, 1, use_shm=True).async_send_weights(iter(weights)))


def receive(address: str) -> set[float]:
    found = set()
    receiver = transfer.BucketedWeightReceiver(address, torch.device("cpu"), use_shm=True)
    receiver.receive_weights(lambda weights, last: found.update(tensor[0].item() for _, tensor in weights))
    return found


def test_two_runs_each_get_their_own_weights(limit, monkeypatch, tmp_path):
    """Both senders are there before the receivers, which with one address meet the second twice."""
    limit(seconds=60)
    addresses = [address_of(run, monkeypatch, tmp_path) for run in ("spin-1", "spin-2")]
    senders = [
        threading.Thread(target=send, args=each, daemon=True) for each in zip(addresses, (1.0, 2.0), strict=True)
    ]
    for sender, address in zip(senders, addresses, strict=True):
        sender.start()
        while not Path(address.removeprefix("ipc://")).exists():
            assert sender.is_alive(), f"nothing is sent at {address}"
            sender.join(0.01)
    assert [receive(address) for address in addresses] == [{1.0}, {2.0}]
    for sender in senders:
        sender.join(10)
        assert not sender.is_alive()


def test_a_receiver_whose_sender_has_died_says_so(limit, tmp_path):
    limit(seconds=0.3)
    with pytest.raises(TimeoutError, match="trainer's rank did not send weights for 0.3 s"):
        receive(f"ipc://{tmp_path}/nobody")


def test_a_sender_whose_receiver_has_died_says_so(limit, tmp_path):
    limit(seconds=0.3)
    with pytest.raises(TimeoutError, match="vLLM's worker did not take weights for 0.3 s"):
        send(f"ipc://{tmp_path}/nobody", 1.0)
    assert not (tmp_path / "nobody").exists()


def test_a_sender_hears_at_once_why_its_receiver_failed(limit, tmp_path):
    limit(seconds=60)
    address, heard = f"ipc://{tmp_path}/failing", []

    def sending() -> None:
        with pytest.raises(RuntimeError) as raised:
            send(address, 1.0)
        heard.append(str(raised.value))

    def refuse(weights, is_last) -> None:
        raise ValueError("no parameter of that name")

    sender = threading.Thread(target=sending, daemon=True)
    sender.start()
    with pytest.raises((ValueError, BufferError)):  # verl's clean-up may fail over the tensors in the traceback
        transfer.BucketedWeightReceiver(address, torch.device("cpu"), use_shm=True).receive_weights(refuse)
    sender.join(10)
    assert heard == ["vLLM's worker could not load the weights: ValueError: no parameter of that name"]


def test_a_transfer_within_the_limit_is_as_before(limit, tmp_path):
    limit(seconds=60)
    address = f"ipc://{tmp_path}/both"
    sender = threading.Thread(target=send, args=(address, 3.0), daemon=True)
    sender.start()
    assert receive(address) == {3.0}
    sender.join(10)


def test_vllms_worker_receives_on_the_runs_socket(monkeypatch, tmp_path):
    from recipe.spin.rollout.server import RolloutServer
    from recipe.spin.rollout.vllm_worker import RolloutWorkerExtension

    name = RolloutServer._get_worker_extension_cls(None)
    assert name == f"{RolloutWorkerExtension.__module__}.{RolloutWorkerExtension.__qualname__}"
    monkeypatch.setenv("VERL_REPLICA_RANK", "1")
    expected = address_of("spin-1", monkeypatch, tmp_path)
    worker = object.__new__(RolloutWorkerExtension)  # verl's own makes it a worker of the machine's platform
    worker.local_rank, worker.model_runner = 0, SimpleNamespace(vllm_config=None)
    assert worker._get_zmq_handle() == expected


async def started(monkeypatch, server_class: type, **variables: str) -> SimpleNamespace:
    """The arguments that vLLM's server has when verl starts it, and the environment at that moment."""
    from recipe.spin.rollout import server

    seen = SimpleNamespace()

    async def run_server(self, args) -> None:
        seen.keys, seen.environment = args.api_key, dict(os.environ)

    monkeypatch.setattr(os, "environ", dict(variables))
    monkeypatch.setattr(server.vLLMHttpServer, "__init__", lambda self: None)
    monkeypatch.setattr(server.vLLMHttpServer, "run_server", run_server)
    monkeypatch.setattr(server.ModelServer, "_end_with_engine", lambda self: None)
    await server_class().run_server(SimpleNamespace(api_key=None))
    assert seen.environment.pop("SPIN_SERVER_PID") == str(os.getpid())
    return seen


def test_vllms_http_server_has_a_key_that_nobody_knows(monkeypatch):
    """Nor does vLLM's engine, which keeps what it compiles under a name made of the variables."""
    from recipe.spin.rollout.server import RolloutServer

    starts = [asyncio.run(started(monkeypatch, RolloutServer)) for _ in range(2)]
    ([first], [second]) = (one.keys for one in starts)
    assert first != second and len(first) == len(second) == 32
    assert starts[0].environment == starts[1].environment == {}
    named = asyncio.run(started(monkeypatch, RolloutServer, VLLM_API_KEY="mine"))
    assert named.keys == ["mine"] and named.environment == {}


@pytest.mark.parametrize(("is_reward_model", "has_key"), [(False, True), (True, False)])
def test_a_reward_models_http_server_answers_its_reward_function(monkeypatch, is_reward_model, has_key):
    """The function asks it over HTTP, and knows no key: vLLM would answer /v1/chat/completions with 401."""
    from recipe.spin.rollout import server

    monkeypatch.setattr(server.vLLMReplica, "__init__", lambda self: setattr(self, "is_reward_model", is_reward_model))
    monkeypatch.setattr(server.ray, "remote", lambda actor: actor)
    keys = asyncio.run(started(monkeypatch, server.RolloutReplica().server_class)).keys
    assert (keys is not None) is has_key


# ---- vLLM's processes ------------------------------------------------------------------------------------------------
MODEL = """
import os, sys, time
from recipe.spin.rollout.orphans import end_engine_with_server
end_engine_with_server(os.environ)
print(os.getpid(), flush=True)
time.sleep(60)
"""
ENGINE = """
import os, subprocess, sys
print(os.getpid(), flush=True)
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
SERVER = """
import os, subprocess, sys
os.environ["SPIN_SERVER_PID"] = str(os.getpid())
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""


def test_vllms_engine_ends_with_a_server_that_is_killed():
    command = [sys.executable, "-c", SERVER, ENGINE, MODEL]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    engine, model = (psutil.Process(int(server.stdout.readline())) for _ in range(2))
    try:
        server.kill()
        server.wait()
        engine.wait(timeout=20)
        assert model.is_running()  # verl ties it to the engine
    finally:
        for process in (engine, model):
            with suppress(psutil.NoSuchProcess):
                process.kill()


# ---- TransferQueue ---------------------------------------------------------------------------------------------------
def test_transfer_queues_actor_is_the_runs_own(monkeypatch):
    """It is looked for and made in the namespace of the run's job, not in one of the whole cluster."""
    asked = []
    monkeypatch.setattr(ray, "get_actor", lambda *args, **options: asked.append((args, options)))
    controller = SimpleNamespace(options=lambda **options: asked.append(options))
    monkeypatch.setattr(interface, "TransferQueueController", controller)
    monkeypatch.setattr(interface, "ray", ray)
    monkeypatch.setattr(interface, "_TQ_CONTROLLER", None)
    verl_patches.own_transfer_queue()
    once = interface.TransferQueueController
    verl_patches.own_transfer_queue()  # in a process that two modules prepare
    assert interface.TransferQueueController is once
    interface.ray.get_actor("TransferQueueController", namespace="transfer_queue")
    interface.TransferQueueController.options(name="TransferQueueController", namespace="transfer_queue")
    assert asked == [(("TransferQueueController",), {}), {"name": "TransferQueueController"}]


@pytest.mark.parametrize("file", ["fsdp_workers.py", "rollout/agent_loop.py", "examples/preference_advantage.py"])
def test_every_process_that_uses_transfer_queue_has_it_so(monkeypatch, file):
    """The modules that their actors come from see to it, each by itself."""
    called = []
    monkeypatch.setattr(verl_patches, "own_transfer_queue", lambda: called.append(file))
    spec = importlib.util.spec_from_file_location("copy_of_a_module", ROOT / file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert called == [file]


# ---- the run folder --------------------------------------------------------------------------------------------------
HOLD = (
    "import sys; from recipe.spin.run.lock import hold_run_folder as hold; hold(sys.argv[1]); print('held', flush=True)"
)


@pytest.fixture
def holder(tmp_path):
    """Another command that has the folder `run`, and lives until it is killed."""
    program = [sys.executable, "-c", f"{HOLD}; sys.stdin.read()", str(tmp_path / "run")]
    process = subprocess.Popen(program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_command_in_a_run_folder_is_refused(holder, tmp_path):
    with pytest.raises(ConfigError, match="another command is training in this folder") as refusal:
        hold_run_folder(tmp_path / "run")
    assert str(tmp_path / "run") in str(refusal.value) and "RUN_DIR" in str(refusal.value)
    hold_run_folder(tmp_path / "run-2")


def test_a_folder_is_free_when_its_command_was_killed(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(10)
    hold_run_folder(tmp_path / "run")


@pytest.mark.parametrize("error", [PermissionError(13, "not yours"), OSError(28, "No space"), NotImplementedError])
def test_a_folder_that_cannot_be_locked_is_refused(tmp_path, monkeypatch, error):
    """As where the file is another user's, or the file system has no locks."""

    def acquire(lock, blocking):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(ConfigError, match="its file .lock cannot be locked.*name another folder") as refusal:
        hold_run_folder(tmp_path / "run")
    assert f"trainer.default_local_dir='{tmp_path}/run'" in str(refusal.value)


@pytest.mark.slow
def test_a_second_run_ends_before_ray_starts(holder, run, tmp_path):
    command = [sys.executable, "-m", "recipe.spin.main_spin", "device=cpu", *run.overrides()]
    command.append(f"trainer.default_local_dir={tmp_path}/run")
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert told.returncode == 1 and "another command is training in this folder" in told.stderr
    assert "starting Ray" not in told.stderr and [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]
