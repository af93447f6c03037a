"""The GPU profile without a GPU: its own settings, but for what a CPU cannot do and for sizes."""

import asyncio
import json
import math
import types
from unittest.mock import create_autospec

import pytest
import torch
from tensordict import TensorDict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from whole_runs import metrics, succeed
from worker_harness import compose

from recipe.spin.engine.row_engine import RowEngine

ROLLOUT = "actor_rollout_ref.rollout"
CPU = [
    "trainer.device=cpu",
    "trainer.n_gpus_per_node=2",
    "++ray_kwargs.ray_init.num_gpus=2",  # logical ones
    "++ray_kwargs.ray_init.num_cpus=24",
    "++ray_kwargs.ray_init.object_store_memory=500000000",
    # no CUDA graphs, and no allocator of vLLM's that hands device memory back
    f"{ROLLOUT}.enforce_eager=True",
    f"++{ROLLOUT}.enable_sleep_mode=False",
]
SIZES = [
    # That a step's rows, of 50 tokens or so, make micro-batches
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=100",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=100",
    "trainer.total_epochs=2",
    "data.max_prompt_length=64",
    f"{ROLLOUT}.max_model_len=128",
    f"{ROLLOUT}.agent.num_workers=1",
    "reward.num_workers=1",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
]
SETTINGS = [
    "actor_rollout_ref.actor.optim.lr=1e-3",
    # A loss that sorts the batch asks the reference for log-probs even where it equals the policy
    "algorithm.dpo_loss_type=aot",
]


class Copies(TorchDispatchMode):
    """Records the dtypes of what is copied into tensors, and of those."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.seen.append((args[1].dtype, args[0].dtype))
        return function(*args, **(kwargs or {}))


def test_a_refreshed_shard_is_rounded_on_the_device_that_it_leaves():
    """Of a copy that rounds on its way to the host, the host would get the fp32 shard first."""
    from recipe.spin.fsdp_workers import mix_parameters

    actor, reference = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).bfloat16()
    with Copies() as copies:
        mix_parameters(actor, reference)
    assert copies.seen == [(torch.bfloat16, torch.bfloat16)] * 2
    assert torch.equal(reference.weight, actor.weight.bfloat16())


def test_shards_that_are_still_on_their_way_to_the_host_are_waited_for(monkeypatch):
    """verl offloads an actor by copies that it does not wait for; a refresh may come right after them."""
    from recipe.spin import fsdp_workers

    actor, reference = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    arrived = torch.nn.Linear(3, 2)
    device = types.SimpleNamespace(synchronize=lambda: actor.load_state_dict(arrived.state_dict()))
    monkeypatch.setattr(fsdp_workers, "get_torch_device", lambda: device)
    fsdp_workers.mix_parameters(actor, reference)
    assert torch.equal(reference.weight, arrived.weight)


@pytest.mark.parametrize(
    ("precision", "adapter", "base_sync_done", "expected"),
    [
        ("bf16", None, True, torch.bfloat16),
        ("fp32", None, True, torch.float32),  # the CPU profile
        ("bf16", "LoRA", False, torch.bfloat16),  # the base model
        ("bf16", "LoRA", True, torch.float32),  # adapters
    ],
)
def test_weights_go_to_vllm_as_the_actor_computes_with_them(monkeypatch, precision, adapter, base_sync_done, expected):
    """Rounded from fp32 masters as FSDP rounds them; not the buffers, which it leaves in fp32."""
    module = torch.nn.BatchNorm1d(3)
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.running_mean)
    verls = create_autospec(
        FSDPEngineWithLMHead.get_per_tensor_param, return_value=(module.state_dict().items(), adapter)
    )
    monkeypatch.setattr(FSDPEngineWithLMHead, "get_per_tensor_param", verls)
    engine = RowEngine.__new__(RowEngine)
    engine.module, engine._qat_enabled = module, False
    engine.engine_config = types.SimpleNamespace(mixed_precision={"param_dtype": precision})
    weights, peft_config = engine.get_per_tensor_param(layered_summon=False, base_sync_done=base_sync_done)
    sent = dict(weights)
    assert peft_config == adapter and sent.keys() == module.state_dict().keys()
    assert sent["weight"].dtype == expected and torch.equal(sent["weight"], module.weight.to(expected))
    assert torch.equal(sent["running_mean"], module.running_mean)
    assert sent["num_batches_tracked"].dtype == torch.int64


@pytest.fixture
def two_ranks():
    """This process is the first of two, of which the other answers nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def test_a_refresh_before_fsdp1_computed_anything(two_ranks):
    """What resharding goes back to FSDP1 sets with the first forward alone."""
    from recipe.spin.fsdp_workers import mix_parameters

    torch.manual_seed(0)
    actor, reference = (FullyShardedDataParallel(torch.nn.Linear(3, 2), device_id=torch.device("cpu")) for _ in "ab")
    mix_parameters(actor, reference)
    pairs = zip(actor.parameters(), reference.parameters(), strict=True)
    assert all(one.numel() == 4 and torch.equal(one, other) for one, other in pairs)  # half of 8


def test_the_root_is_gathered_once_for_forward_and_backward(two_ranks, monkeypatch):
    """verl's reshard_after_forward=True takes tied embeddings apart in between; after the step they are sharded."""
    mesh = init_device_mesh("cpu", (2,))
    monkeypatch.setattr(
        FSDPEngineWithLMHead,
        "_build_fsdp_module",
        lambda self, module: fully_shard(module, mesh=mesh, reshard_after_forward=True),
    )
    engine = RowEngine.__new__(RowEngine)
    engine.engine_config = FSDPEngineConfig(mixed_precision={"param_dtype": "bf16"})
    module = engine._build_fsdp_module(torch.nn.Linear(3, 2))
    output = module(torch.ones(2, 3))
    assert not any(isinstance(parameter, DTensor) for parameter in module.parameters())
    output.sum().backward()
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())


def test_ranks_wait_for_each_other_as_long_as_the_settings_say(monkeypatch):
    from recipe.spin import fsdp_workers

    given = []
    monkeypatch.setattr(fsdp_workers, "meet_in_a_file", lambda environment: None)
    monkeypatch.setattr(fsdp_workers, "initialize_global_process_group_ray", given.append)
    monkeypatch.setattr(fsdp_workers.ActorRolloutRefWorker, "init_model", lambda self: None)
    worker = fsdp_workers.SpinWorker.__new__(fsdp_workers.SpinWorker)
    worker.config, worker.role = compose("actor_rollout_ref.nccl_timeout=1234").actor_rollout_ref, "actor"
    worker.init_model()
    assert given == [1234]


@pytest.mark.parametrize(("size", "cleared"), [(1, []), (2, ["cache", "barrier"])])
def test_no_rank_holds_what_vllms_weights_need_when_they_wake(monkeypatch, size, cleared):
    """Of several ranks with one vLLM the first wakes it on the devices of all."""
    from recipe.spin import fsdp_workers

    seen = []

    async def push(self, **options):
        seen.append("push")

    monkeypatch.setattr(fsdp_workers.ActorRolloutRefWorker, "update_weights", push)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: seen.append("barrier"))
    device = types.SimpleNamespace(empty_cache=lambda: seen.append("cache"))
    monkeypatch.setattr(fsdp_workers, "get_torch_device", lambda: device)
    worker = fsdp_workers.SpinWorker.__new__(fsdp_workers.SpinWorker)
    worker.config, worker.actor = compose(f"{ROLLOUT}.tensor_model_parallel_size={size}").actor_rollout_ref, None
    asyncio.run(worker.update_weights())
    assert seen == [*cleared, "push"]


@pytest.mark.parametrize("ask", ["compute_actor_logps", "compute_ref_logps"])
def test_nothing_stays_gathered_after_log_probs(two_ranks, ask):
    """No backward pass follows that would take it apart; vLLM gets the device next."""
    from recipe.spin.fsdp_workers import SpinWorker

    module = fully_shard(torch.nn.Linear(3, 2), mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    worker = SpinWorker.__new__(SpinWorker)
    model = types.SimpleNamespace(engine=types.SimpleNamespace(module=module))
    model.response_logps = lambda data: module(torch.ones(2, 3))
    worker.actor = worker.ref = model
    assert getattr(worker, ask)(TensorDict({}, batch_size=2)).shape == (2, 2)
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())


@pytest.mark.slow
def test_a_run_with_the_profiles_own_settings(task, tiny_llama, tmp_path):
    """Two ranks with a vLLM each, whose model has a process of its own; bf16 arithmetic over fp32 masters, a bf16
    reference, n=8, the best against the worst, dynamic micro-batches, recomputed activations, greedy validation: two
    steps with a refresh, a checkpoint, and two more after a resume."""
    run = tmp_path / "run"
    for steps in (2, 4):
        overrides = [*CPU, *SIZES, *SETTINGS, f"trainer.total_training_steps={steps}"]
        succeed(task, tiny_llama, run, *overrides, device="gpu")
    history = metrics(run)
    for step in (1, 2, 4):  # as loaded; refreshed; refreshed
        assert history[step]["actor/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[3]["actor/loss"] != pytest.approx(math.log(2), abs=1e-4)  # the refreshed reference came back
    for step in (1, 2, 3, 4):
        assert history[step]["pairs/used"] >= 3
        # A logit of 8 to 16 is rounded by up to 1/32, in vLLM and in FSDP
        assert 0 < history[step]["rollout/logp_gap_max"] < 0.25
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["before"].keys() == summary["after"].keys() == {"greedy"}


@pytest.mark.slow
@pytest.mark.long
def test_a_run_with_adapters_and_the_profiles_own_settings(task, tiny_llama, tmp_path):
    """Every step asks the base model for log-probs before it trains an adapter on two ranks; resumed after two."""
    run = tmp_path / "run"
    adapters = ["actor_rollout_ref.model.lora_rank=4", "trainer.ref_update_freq=0"]
    for steps in (2, 4):
        overrides = [*CPU, *SIZES, *SETTINGS, *adapters, f"trainer.total_training_steps={steps}"]
        succeed(task, tiny_llama, run, *overrides, device="gpu")
    history = metrics(run)
    assert history[1]["actor/loss"] == pytest.approx(math.log(2), abs=1e-6)  # an adapter begins as nothing
    for step in (2, 3, 4):
        assert history[step]["actor/loss"] != pytest.approx(math.log(2), abs=1e-6)
        assert 0 < history[step]["rollout/logp_gap_max"] < 0.25
