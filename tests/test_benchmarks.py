"""Arithmetic, layouts, comparisons and tables of the benchmarks; their runs take up to an hour: not repeated here."""

import dataclasses
import json
import re
import sys

import psutil
import pytest
import torch
from plain_model import load_model, response_logp
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    arithmetic,
    compare,
    growth,
    inputs,
    machine,
    plain_step,
    results,
    scaling,
    step,
    trl_settings,
    update,
)
from benchmarks.arithmetic import Model, Work
from recipe.spin.checks import memory
from recipe.spin.examples.arithmetic.prepare import prepare

ROWS = [plain_step.Row([5, 6, 7], [[8, 9], [10, 11, 12, 13]]), plain_step.Row([20], [[21], [22, 23]])]
SMALL = Model(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_size=4, vocabulary=100)


# ---- Arithmetic ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_operations_are_those_that_torch_counts(tiny_models, architecture):
    model = load_model(tiny_models[architecture])
    shape = Model.of(model.config)
    inputs = torch.arange(2 * 9).view(2, 9)
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=inputs, use_cache=False).logits.sum()
    forward = counter.get_total_flops()
    with counter:
        loss.backward()
    work = Work(tokens=18, attended=2 * 9 * 9, logits=18)
    rotary = 2 * 9 * shape.head_size // 2  # the angles, a product of positions and frequencies
    assert arithmetic.forward_flop(shape, work) == forward - rotary
    assert arithmetic.update_flop(shape, work) == forward - rotary + counter.get_total_flops()


def test_parameters_are_the_models_but_for_norms_and_biases(tiny_models):
    for folder in tiny_models.values():
        model = load_model(folder)
        matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
        assert Model.of(model.config).parameters == matrices


def test_the_prompt_counts_once_for_both_responses():
    # prompt 3: 1+2+3 keys; response 2: 4+5; response 4: 4+5+6+7
    assert arithmetic.necessary([(3, [2, 4])]) == Work(9, 6 + 9 + 22, 6)
    # the last token of a response is drawn, never read
    assert arithmetic.sampling([(3, [2, 4])]) == Work(7, 6 + 4 + 15, 6)


# ---- The plain step --------------------------------------------------------------------------------------------------
@pytest.fixture
def players(tiny_models) -> plain_step.Players:
    return plain_step.Players.load(tiny_models["llama"])


@pytest.mark.parametrize("name", list(plain_step.LAYOUTS))
def test_a_layout_gives_the_log_probs_of_separate_sequences(tiny_models, players, name):
    model = load_model(tiny_models["llama"])
    expected = [response_logp(model, row.prompt, r, [1] * len(r), 1.0) for row in ROWS for r in row.responses]
    found = plain_step.LAYOUTS[name].logps(players.policy, ROWS)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)


def test_layouts_say_what_they_compute():
    assert plain_step.padded_work(ROWS) == Work(4 * 7, 4 * 49, 4 * 7)
    assert plain_step.packed_work(ROWS) == Work(17, 17**2, 9)
    assert plain_step.shared_work(ROWS) == Work(13, 13**2, 9)


def test_layouts_that_differ_are_refused(players, monkeypatch):
    broken = plain_step.Layout(lambda *args: plain_step.shared_logps(*args) + 1e-2, plain_step.shared_work, 1)
    assert plain_step.largest_difference(players.reference, ROWS) < 1e-4
    monkeypatch.setitem(plain_step.LAYOUTS, "shared", broken)
    with pytest.raises(AssertionError, match="must compute the same"):
        plain_step.largest_difference(players.reference, ROWS)


def test_every_layout_takes_the_same_step(tiny_models):
    after = []
    for layout in plain_step.LAYOUTS.values():
        players = plain_step.Players.load(tiny_models["llama"])
        for parameter in players.reference.parameters():  # apart from the policy, so that margins count
            parameter.data.mul_(1.05)
        players.optimizer = torch.optim.SGD(players.policy.parameters(), lr=1.0)
        seconds = plain_step.dpo_step(players, ROWS, layout, size=1)
        assert list(seconds) == list(plain_step.PHASES) and min(seconds.values()) > 0
        after.append(torch.cat([parameter.detach().flatten() for parameter in players.policy.parameters()]))
    before = plain_step.Players.load(tiny_models["llama"]).policy.parameters()
    assert (torch.cat([parameter.detach().flatten() for parameter in before]) - after[0]).abs().max() > 1e-3
    for other in after[1:]:
        torch.testing.assert_close(other, after[0], atol=1e-5, rtol=0)


# ---- The step beside TRL's -------------------------------------------------------------------------------------------
def line(number: int, seconds: float, **more) -> dict:
    """A step as the recipe writes it: 64 responses of 10 tokens to prompts of 40, all paired."""
    timing = {"gen": seconds / 10, "ref": seconds / 5, "update_actor": seconds / 2, "update_weights": 0.5}
    lengths = {f"response_length/{kind}": 10.0 for kind in ("mean", "chosen", "rejected")}
    shape = {"pairs/used": 32, "perf/total_num_tokens": 64 * 50}
    return (
        {"step": number, "timing_s/step": seconds}
        | {f"timing_s/{k}": v for k, v in timing.items()}
        | lengths
        | shape
        | more
    )


def one_run(*seconds: float, memory: float = 8.0) -> dict:
    steps = [step.our_step(line(number, value)) for number, value in enumerate(seconds)]
    refreshed = step.our_step(line(9, 30.0, **{"timing_s/refresh_ref": 0.2}))
    phases = {phase: step.median_of(steps, phase) for phase in ("gen", "ref", "update", "weights")}
    process = {"seconds": 100.0, "peak_memory_gb": memory, "others_cores": 0.1}
    median = step.median_of(steps, "seconds")
    return {"step_seconds": median, "phases": phases, "process": process, "steps": steps} | {
        "first": steps[0],
        "refreshed": refreshed,
    }


def one_round(ours: float, dropped: float, trl: float) -> dict:
    theirs = [{"seconds": trl, "gen": 5.0, "ref": 8.0, "update": 20.0, "optimizer": 0.2, "response_tokens": 640}] * 3
    phases = {name: theirs[0][name] for name in trl_settings.PHASES}
    process = {"seconds": 100.0, "peak_memory_gb": 12.0, "others_cores": 0.4}
    shared = {"step_seconds": 14.0, "seconds": dict.fromkeys(plain_step.PHASES, 4.0), "share_of_rate": {"both": 0.75}}
    return {
        "ours": {"same_pairs": one_run(ours - 1, ours, ours + 1), "ties_dropped": one_run(dropped)},
        "trl": {"step_seconds": trl, "phases": phases, "steps": theirs, "process": process},
        "trl_setting": {"batch": 8, "allocator": "none"},
        "plain": {"layouts": {"shared": shared}, "floor_seconds": 10.0, "gflops": {"model": 200.0}},
        "gflops": {"model": 190.0, "square": 200.0},
    }


@pytest.fixture
def result() -> dict:
    rounds = [one_round(20, 10, 40), one_round(22, 12, 40), one_round(10, 40, 40)]
    origin = {"date": "2026-01-02 03:04", "commit": "abc", "machine": {"kind": "one, 2 cores"}, "overrides": []}
    return origin | step.combine(rounds, SMALL)


def test_ratios_are_taken_within_rounds_and_their_median_counts(result):
    assert result["step_ratios"] == pytest.approx([0.5, 0.55, 0.25])
    assert result["step_ratio_to_trl"] == pytest.approx(0.5)
    assert result["ties_dropped"]["step_ratio_to_trl"] == pytest.approx(0.3)
    assert (result["ours"]["step_seconds"], result["trl"]["step_seconds"]) == (20, 40)
    assert result["ref_update_ratio_to_plain"] == pytest.approx(20 * 0.7 / 14)


def test_a_summary_has_speed_memory_and_the_share_of_the_rate(result):
    ours = result["ours"]
    assert ours["prompts_per_second"] == pytest.approx(32 / 20)
    assert ours["tokens_per_second"] == pytest.approx((32 * 40 + 64 * 10) / 20)
    assert (ours["peak_memory_gb"], result["trl"]["peak_memory_gb"]) == (8.0, 12.0)
    assert (ours["refresh_seconds"], ours["refreshed_step_seconds"]) == (0.2, 30.0)
    forward = arithmetic.forward_flop(SMALL, arithmetic.necessary([(40, [10, 10])] * 32))
    assert ours["floor_phases"]["update"] == pytest.approx(3 * forward / 200e9)
    assert ours["floor_seconds"] == pytest.approx(sum(ours["floor_phases"].values()))
    assert ours["share_of_rate"]["ref"] == pytest.approx(forward / 200e9 / ours["phases"]["ref"])


def test_per_operation_the_ratio_to_plain_counts_what_was_computed(result):
    forward = arithmetic.forward_flop(SMALL, arithmetic.necessary([(40, [10, 10])] * 32))
    per_operation = result["ref_update_ratio_to_plain"] * (10.0 * 200e9) / (4 * forward)
    assert result["ref_update_ratio_to_plain_per_operation"] == pytest.approx(per_operation)


def test_the_report_names_all_three(result):
    text = step.report(result)
    assert "| ours, same pairs | 20.0 | 2.0 | 4.0 | 10.0 | 0.50 | 32 | 1.60 |" in text
    assert "same pairs: 0.50 of TRL's step (by round 0.50, 0.55, 0.25)" in text
    assert "plain PyTorch, the prompt shared: 14.0 s" in text


@pytest.fixture
def sums(tmp_path):
    """The arithmetic example's data, in a folder of its name, by which run_spin.sh finds the reward."""
    prepare(tmp_path / "arithmetic")
    return tmp_path / "arithmetic"


@pytest.mark.slow
def test_a_run_of_the_recipe_has_what_the_benchmark_reads(tiny_models, sums, tmp_path):
    found = step.run_ours(tiny_models["llama"], sums, 2, step.ARMS["same_pairs"], tmp_path)
    assert [one["pairs"] for one in found["steps"]] == [32, 32]  # ties kept
    for one in found["steps"]:
        assert min(one[phase] for phase in ("gen", "ref", "update", "weights")) > 0
        assert 16 <= one["prompt_tokens"] / 32 <= 64 and 64 <= one["response_tokens"] <= 64 * 16
        assert sum(one[phase] for phase in ("gen", "ref", "update", "weights")) < one["seconds"]
    assert found["refreshed"]["refresh"] > 0 and "refresh" not in found["first"]
    assert found["process"]["peak_memory_gb"] > 1


@pytest.mark.slow
def test_a_run_of_trl_has_what_the_benchmark_reads(tiny_models, sums, tmp_path):
    pytest.importorskip("trl", reason="pip install --no-deps trl==1.16.0")
    found = trl_settings.run_trl(tiny_models["llama"], sums, 2, batch=8, allocator="none", folder=tmp_path)
    assert len(found["steps"]) == 2
    for one in found["steps"]:
        assert 64 <= one["response_tokens"] <= 64 * 16
        assert sum(one[phase] for phase in trl_settings.PHASES) == pytest.approx(one["seconds"])


@pytest.mark.slow
def test_the_worker_is_measured_without_ray(tmp_path):
    update.save_small_model(tmp_path / "model")
    case = update.CASES["long"]
    overrides = [*update.overrides_of(case, str(tmp_path / "model")), *update.ARMS["the prompt once"]]
    found = update.run_arm("long", overrides, 1, tmp_path)
    assert len(found["rounds"]) == 1 and min(found["ref"], found["update"]) > 0


@pytest.mark.slow
def test_operations_of_the_worker_are_timed(tiny_models, tmp_path):
    overrides = update.data_of(update.CASES["short"], tiny_models["llama"])
    found, _ = update.run_alone(["short", "--profile"], overrides, tmp_path)
    assert {"aten::mm", "aten::_fused_adamw_", "Python"} < found.keys() and min(found.values()) >= 0


def test_a_profile_shows_what_takes_a_hundredth_of_the_time():
    lines = update.profile_table({"aten::add": 0.5, "aten::mm": 3.0, "aten::neg": 0.03, "Python": 0.47}).splitlines()
    assert lines[2:] == [
        "| aten::mm | 3.00 | 75.0% |",
        "| aten::add | 0.50 | 12.5% |",
        "| Python | 0.47 | 11.8% |",
        "| others | 0.03 | 0.8% |",
    ]


def test_the_fastest_setting_is_the_one_with_the_shortest_step():
    steps = {4: (30.0, 31.0), 8: (28.0, 90.0), 16: (29.0, 29.5)}  # something else ran during one step
    tried = [{"batch": size, "steps": [{"seconds": value} for value in seconds]} for size, seconds in steps.items()]
    assert trl_settings.fastest(tried)["batch"] == 8


def test_a_setting_that_was_tried_is_kept_and_not_tried_again(tmp_path, monkeypatch):
    def run_trl(model, data, steps, batch, allocator, folder):
        tried.append((batch, allocator))
        if allocator == "keep" and len(tried) == 2:
            raise KeyboardInterrupt
        return {"steps": [{"seconds": batch}]}

    tried, settings, file = [], [(8, "none"), (8, "keep"), (4, "none")], tmp_path / "tried.json"
    monkeypatch.setattr(trl_settings, "run_trl", run_trl)
    with pytest.raises(KeyboardInterrupt):
        trl_settings.try_missing("model", tmp_path, 2, settings, file)
    found = trl_settings.try_missing("model", tmp_path, 2, settings, file)
    assert tried == [(8, "none"), (8, "keep"), (8, "keep"), (4, "none")]
    assert [(one["batch"], one["allocator"]) for one in found] == settings
    recorded = json.loads(file.read_text())
    assert recorded["allocators"] == machine.allocator_settings() and recorded["commit"]
    assert list(recorded["tried"].values()) == found and trl_settings.fastest(found)["batch"] == 4


def test_parts_of_a_trl_step_add_up():
    pytest.importorskip("trl", reason="pip install --no-deps trl==1.16.0")
    from collections import Counter
    from types import SimpleNamespace

    from benchmarks.trl_online_dpo import TimedTrainer

    trainer = SimpleNamespace(spent=Counter(gen=3.0, ref=2.0, micro_batches=9.0, response_tokens=7))
    parts = TimedTrainer.parts(trainer, seconds=10.0)
    assert parts == {"gen": 3.0, "ref": 2.0, "update": 4.0, "optimizer": 1.0, "response_tokens": 7}
    assert not trainer.spent


# ---- Records ---------------------------------------------------------------------------------------------------------
def record(folder, name: str, run: dict, **changes):
    (folder / name).write_text(json.dumps(run | changes))


def test_the_table_lists_the_runs_by_date(tmp_path, result):
    record(tmp_path, "b.json", result, date="2026-01-01 00:00", commit="first")
    record(tmp_path, "a.json", result, commit="second")
    record(tmp_path, "other.json", {"cases": {}})
    results.write_table(tmp_path, tmp_path / "RESULTS.md")
    *_, first, second = (tmp_path / "RESULTS.md").read_text().splitlines()
    assert (
        "| first | one, 2 cores | **0.50** | **0.30** | 20.0 / 12.0 | 40.0 |" in first and "(results/b.json)" in first
    )
    assert "second" in second


def test_recorded_results_are_what_the_table_was_made_from(tmp_path):
    """RESULTS.md is never edited by hand."""
    results.write_table(results.FOLDER, tmp_path / "RESULTS.md")
    assert (tmp_path / "RESULTS.md").read_text() == results.TABLE.read_text()


def test_a_run_is_compared_with_the_last_one_of_its_kind(tmp_path, result):
    runs = [
        (tmp_path / f"{name}.json", result | changes)
        for name, changes in (
            ("older", {"date": "2026-01-01 00:00"}),
            ("old", {"date": "2026-01-01 12:00"}),
            ("elsewhere", {"date": "2026-01-01 13:00", "machine": {"kind": "two, 4 cores"}}),
            ("otherwise", {"date": "2026-01-01 14:00", "overrides": ["algorithm.dpo_beta=1"]}),
        )
    ]
    new = (tmp_path / "new.json", result)
    assert compare.last_before(new, [*runs, new])[0].stem == "old"
    assert compare.last_before((tmp_path, runs[0][1]), runs) is None


def test_a_ratio_that_grew_beyond_its_threshold_is_worse(result):
    lines, worse = compare.compare(result, result)
    assert len(lines) == len(compare.FIGURES) and not worse
    slower = result | {"step_ratio_to_trl": result["step_ratio_to_trl"] * 1.09}
    assert not compare.compare(slower, result)[1]
    slower = result | {"step_ratio_to_trl": result["step_ratio_to_trl"] * 1.11}
    assert compare.compare(slower, result)[1] == [
        "step to TRL's, same pairs grew from 0.50 to 0.56, by more than the 10% allowed"
    ]


def test_the_command_fails_when_a_ratio_got_worse(tmp_path, result, monkeypatch, capsys):
    record(tmp_path, "old.json", result)
    record(tmp_path, "new.json", result, date="2026-02-01 00:00", step_ratio_to_trl=0.6)
    monkeypatch.setattr(compare, "recorded", lambda: results.recorded(tmp_path))
    monkeypatch.setattr(sys, "argv", ["compare"])
    with pytest.raises(SystemExit, match="step to TRL's, same pairs grew from 0.50 to 0.60"):
        compare.main()
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "old.json")])
    compare.main()
    assert "no earlier run" in capsys.readouterr().out


def test_the_default_runs_model_and_data_are_made_where_they_are_missing(tmp_path, monkeypatch):
    model, data, made = str(tmp_path / "model"), tmp_path / "data", []
    monkeypatch.setattr(inputs, "MODEL", model)
    monkeypatch.setattr(inputs, "DATA", data)
    monkeypatch.setattr(inputs, "make_model", made.append)  # asks for the package index where it is not there
    inputs.make_missing("a/model", tmp_path / "of the caller")
    assert not made and not data.exists()
    inputs.make_missing(model, data)
    assert made == [tmp_path / "model"] and {file.name for file in data.iterdir()} == {"train.parquet", "test.parquet"}
    (data / "train.parquet").write_bytes(b"as it was")
    inputs.make_missing("a/model", data)
    assert (data / "train.parquet").read_bytes() == b"as it was"


# ---- The machine -----------------------------------------------------------------------------------------------------
def test_results_of_one_day_do_not_overwrite_each_other(tmp_path):
    first, second = (machine.write_result("x", {"value": value}, tmp_path) for value in (1, 2))
    assert [json.loads(path.read_text())["value"] for path in (first, second)] == [1, 2]
    assert machine.write_result("x", {"value": 3}, tmp_path, replaced=first) == first
    assert [json.loads(path.read_text())["value"] for path in (first, second)] == [3, 2]


def test_names_that_differ_give_folders_that_differ():
    names = ["lr=1e-5, seed 1", "lr=1e 5, seed 1", "LR=1e-5, seed 1", "lr=1e-5, seed 11", "x=-1", "x=1", "(DPO)", "dpo"]
    slugs = [machine.slug(name) for name in names]
    assert len(set(slugs)) == len(names) and all(re.fullmatch("[a-z0-9.-]+", one) for one in slugs)
    assert slugs[0].startswith("lr-1e-5-seed-1-") and slugs[0] == machine.slug(names[0])


def test_allocator_settings_are_the_profiles_own():
    settings = machine.allocator_settings()
    assert set(settings["recipe"]) == {"MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    assert settings["none"] == {}


def test_a_process_is_measured_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "MEMORY_SECONDS", 0.1)  # whatever the machine's other processes give back meanwhile
    child = "import time; block = bytearray(300_000_000); block[::4096] = bytes(len(block[::4096])); time.sleep(2)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    finished = machine.run_measured([sys.executable, "-c", parent], machine.plain_environment(), tmp_path / "log")
    assert 0.3 < finished.peak_memory_gb < 0.5
    assert finished.seconds > 2


def test_a_process_that_fails_tells_its_last_words(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with pytest.raises(RuntimeError, match="ended with 1(.|\n)*no such thing"):
        machine.run_measured(command, machine.plain_environment(), tmp_path / "log")


def test_a_measurement_that_is_stopped_ends_its_process(tmp_path, monkeypatch):
    def stop(own_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "OthersCores", stop)
    command = [sys.executable, "-c", "import time; time.sleep(61)"]
    with pytest.raises(KeyboardInterrupt):
        machine.run_measured(command, machine.plain_environment(), tmp_path / "log")
    assert command not in [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]


def test_two_descriptions_of_this_machine_are_of_one_kind():
    first, second = machine.describe(), machine.describe()
    assert first["kind"] == second["kind"] and first["cores"] >= 1


# ---- The update ------------------------------------------------------------------------------------------------------
def test_the_updates_table_gives_ratios_to_the_first_arm():
    process = {"peak_memory_gb": 2.0}
    arms = {"new": {"ref": 1.0, "update": 3.0}, "old": {"ref": 2.0, "update": 6.0}}
    text = update.table({"short": {name: arm | {"process": process} for name, arm in arms.items()}})
    assert "| short | new | 1.00 | 3.00 | 1.00 | 2.0 |" in text
    assert "| short | old | 2.00 | 6.00 | 2.00 | 2.0 |" in text


def test_cases_fit_their_micro_batches():
    for case in update.CASES.values():
        assert case.prompt + 2 * case.response <= case.tokens_per_micro_batch


# ---- Growth ----------------------------------------------------------------------------------------------------------
BUSY = growth.Load(prompts=4096, n=2, prompt=200, response=300)


def test_published_sizes_of_the_models():
    billions = {name: model.parameters / 1e9 for name, model in growth.MODELS.items()}
    assert billions == {
        "Qwen2.5-0.5B": pytest.approx(0.49, abs=0.01),
        "Qwen2.5-3B": pytest.approx(3.09, abs=0.01),
        "Qwen2.5-7B": pytest.approx(7.62, abs=0.01),
    }


def test_twice_the_devices_halve_what_is_sharded():
    few, many = (growth.predict(growth.H100, growth.QWEN_7B, BUSY, devices) for devices in (8, 16))
    for phase in ("reference", "update"):
        assert many.seconds[phase] == pytest.approx(few.seconds[phase] / 2, rel=1e-3)
    for part in ("weights", "AdamW", "reference", "gradients"):
        assert many.memory[part] == few.memory[part] / 2


def test_one_device_receives_nothing():
    found = growth.predict(growth.H100, growth.QWEN_3B, BUSY, 1)
    assert set(found.network.values()) == {0}
    assert found.step_seconds == sum(found.seconds.values())


def test_while_generating_the_inference_engine_takes_its_share():
    found = growth.predict(growth.H100, growth.QWEN_3B, BUSY, 64)
    shards = growth.QWEN_3B.parameters * (4 + 8 + 2) / 64
    assert found.peaks["generation"] == pytest.approx(40e9 + shards + memory.PROCESSES)
    assert found.peak_memory == found.peaks["generation"] > sum(found.memory.values())


def test_deferred_reduction_keeps_gradients_whole_and_sends_them_once():
    deferred = dataclasses.replace(BUSY, deferred_reduction=True)
    each, once = (growth.predict(growth.H100, growth.QWEN_3B, load, 8) for load in (BUSY, deferred))
    assert once.memory["gradients"] == 8 * each.memory["gradients"]
    assert once.network["update"] < each.network["update"]


def test_a_reference_on_the_host_is_fetched_every_micro_batch():
    layout = growth.layout_of(growth.H100, BUSY, 8)
    offloaded = dataclasses.replace(layout, reference_offload=True)
    near, far = (growth.predict(growth.H100, growth.QWEN_3B, BUSY, 8, one).seconds for one in (layout, offloaded))
    micro_batches = -(-512 * 800 // 16384)
    shard = 2 * growth.QWEN_3B.parameters / 8
    assert far["reference"] - near["reference"] == pytest.approx(micro_batches * shard / growth.H100.host_bandwidth)


def test_what_waits_on_the_host_crosses_twice_a_step():
    layout = growth.layout_of(growth.H100, BUSY, 8)
    offloaded = dataclasses.replace(layout, optimizer_offload=True)
    seconds = [
        growth.predict(growth.H100, growth.QWEN_3B, BUSY, 8, one).seconds["update"] for one in (layout, offloaded)
    ]
    crossing = 2 * 8 * growth.QWEN_3B.parameters / 8 / growth.H100.host_bandwidth
    assert seconds[1] - seconds[0] == pytest.approx(crossing)


def test_a_slow_network_is_what_a_step_waits_for():
    slow = dataclasses.replace(growth.H100, node_bandwidth=1e9)
    found = growth.predict(slow, growth.QWEN_3B, BUSY, 8)
    gathered = growth.QWEN_3B.parameters * 2 * 7 / 8
    micro_batches = -(-512 * 800 // 16384)
    assert found.network["reference"] == gathered * micro_batches
    assert found.seconds["reference"] == pytest.approx(gathered * micro_batches / 0.8e9)


def test_recomputation_adds_a_forward_pass_and_saves_activations():
    def update(**changes):
        found = growth.predict(growth.H100, growth.QWEN_3B, dataclasses.replace(BUSY, **changes))
        return found.seconds["update"] - growth.adamw_seconds(growth.H100, growth.QWEN_3B, 1), found.memory

    (without, kept), (with_it, recomputed) = update(checkpointing=False), update(checkpointing=True)
    assert with_it / without == pytest.approx(4 / 3)
    assert recomputed["activations"] < kept["activations"] / 5


def test_sharing_the_prompt_saves_its_second_computation():
    shared, apart = (dataclasses.replace(BUSY, share_prompt=share).trained() for share in (True, False))
    assert (shared.tokens, apart.tokens) == (200 + 2 * 300, 2 * (200 + 300))
    assert shared.logits == apart.logits == 600


def test_a_single_response_is_generated_as_fast_as_weights_can_be_read():
    machine = dataclasses.replace(growth.H100, token_seconds=0.0, flops=1e30)
    load = growth.Load(prompts=1, n=1, prompt=1, response=100)
    reading = growth.QWEN_7B.parameters * 2 / machine.memory_bandwidth / machine.decode_share
    assert growth.generation_seconds(machine, growth.QWEN_7B, load, prompts=1) == pytest.approx(100 * reading, rel=1e-3)


def test_the_longest_response_ends_generation():
    seconds = [
        growth.generation_seconds(growth.H100, growth.QWEN_3B, load, prompts=1)
        for load in (growth.Load(1, 2, 10, 100), growth.Load(1, 2, 10, 100, longest=200))
    ]
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=0.01)


def test_fitting_finds_the_shares_that_made_the_measurements():
    true = dataclasses.replace(scaling.cpu("x", 200e9, 20e9), forward_share=0.8, update_share=0.7)
    measured = []
    for model, pairs in (("135M", 8), ("135M", 32), ("0.5B", 8)):
        size = {
            "model": model,
            "pairs": pairs,
            "prompt_tokens": 45 * pairs,
            "response_tokens": 24 * pairs,
            "rate": 200e9,
        }
        found = growth.predict(true, scaling.SHAPES[model], scaling.plain_load(size)).seconds
        adamw = growth.adamw_seconds(true, scaling.SHAPES[model], 1)
        measured.append(
            size | {"best": {"ref": found["reference"], "update": found["update"] - adamw, "optimizer": adamw}}
        )
    plain = {"machine": {"kind": "x"}, "memory_bandwidth": 20e9, "measured": measured}
    fitted = scaling.plain_machine(plain)
    assert (fitted.name, fitted.forward_share, fitted.update_share) == ("x", pytest.approx(0.8), pytest.approx(0.7))

    true = dataclasses.replace(true, prefill_share=0.3, token_seconds=0.1, forward_share=0.5, update_share=0.6)
    runs = []
    for size in ({"prompts": 8}, {"prompts": 32, "n": 8, "pairing": "all"}, {"prompts": 8, "model": "0.5B"}):
        run = size | {"response_length": 12.0, "tokens": (45 + 12) * size["prompts"] * size.get("n", 2)}
        model, load = scaling.SHAPES[size.get("model", "135M")], scaling.engine_load(run)
        found = growth.predict(dataclasses.replace(true, memory_bandwidth=1e15), model, load).seconds
        update = found["update"] + growth.adamw_seconds(true, model, 1)
        runs.append(run | {"seconds": {"gen": found["generation"], "ref": found["reference"], "update_actor": update}})
    fitted = scaling.engine_machine(runs, plain)
    shares = fitted.prefill_share, fitted.token_seconds, fitted.forward_share, fitted.update_share
    assert shares == pytest.approx((0.3, 0.1, 0.5, 0.6), rel=1e-3)


def test_tables_stand_between_their_marks_and_nowhere_else():
    text = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n"
    assert scaling.fill(text, {"x": "new"}) == "a\n<!-- x -->\nnew\n<!-- end of x -->\nb\n"
    with pytest.raises(ValueError, match="no place for the table 'y'"):
        scaling.fill(text, {"y": ""})


def test_the_documents_predictions_are_the_models_and_its_measurements_those_that_are_recorded():
    text = scaling.DOCUMENT.read_text()
    assert scaling.fill(text, scaling.tables()) == text
