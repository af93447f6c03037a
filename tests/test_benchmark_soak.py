"""What the soak benchmark makes of processes; its run takes five minutes."""

import os

import psutil
import pytest

from benchmarks.soak import held, last_step, look, soak, table, title


def test_a_process_is_looked_at_by_its_title():
    own = psutil.Process()
    found = held(own)
    assert found["processes"] == 1 and found["memory_mb"] > 10 and found["files"] >= 3 and found["threads"] >= 1
    with open(os.devnull):
        assert held(own)["files"] == found["files"] + 1
    assert title(own) in look(own)


def test_the_last_whole_line_of_the_metrics_counts(tmp_path):
    assert last_step(tmp_path) == -1
    (tmp_path / "from_step_00000000.jsonl").write_text('{"step": 1, "data": {}}\n{"step": 2, "data": {}}\n')
    assert last_step(tmp_path) == 2
    (tmp_path / "from_step_00000002.jsonl").write_text('{"step": 3, "da')
    assert last_step(tmp_path) == -1


def test_the_table_shows_what_grew():
    early = {"ray::WorkerDict": {"memory_mb": 700, "files": 40, "sockets": 9, "threads": 30}}
    late = early | {"VLLM::EngineCore": {"memory_mb": 500, "files": 30, "sockets": 5, "threads": 20}}
    *_, engine, worker = table({"early": {"held": early}, "late": {"held": late}}).splitlines()
    assert engine == "| VLLM::EngineCore | 0 -> 500 | 0 -> 30 | 0 -> 5 | 0 -> 20 |"
    assert worker == "| ray::WorkerDict | 700 -> 700 | 40 -> 40 | 9 -> 9 | 30 -> 30 |"


@pytest.mark.long
def test_nothing_grows_with_steps_but_rays_control_service(tmp_path):
    found = soak(steps=300, early=50, folder=tmp_path)
    early, late = (found[when]["held"] for when in ("early", "late"))
    for name in early.keys() & late.keys() - {"gcs_server"}:
        assert late[name]["memory_mb"] < 1.05 * early[name]["memory_mb"] + 10, (name, found)
        assert late[name]["files"] < early[name]["files"] + 10 and late[name]["sockets"] < early[name]["sockets"] + 10
