"""The files in examples/cluster: they parse, and say what the run they start understands."""

import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "cluster"
USAGE = (FOLDER.parent.parent / "run_spin.sh").read_text()


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def shell(name: str) -> list[str]:
    """The shell scripts of an example."""
    if name == "slurm.sbatch":
        return [(FOLDER / name).read_text()]
    if name == "skypilot.yaml":
        [task] = documents(name)
        return [task["setup"], task["run"]]
    return [documents(name)[0]["spec"]["entrypoint"]]


@pytest.mark.parametrize("name", ["slurm.sbatch", "kuberay.yaml", "skypilot.yaml"])
def test_scripts_parse_and_start_the_run(name):
    scripts = shell(name)
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "run_spin.sh" in scripts[-1]


@pytest.mark.parametrize("name", ["slurm.sbatch", "kuberay.yaml", "skypilot.yaml"])
def test_variables_are_those_that_run_spin_reads(name):
    text = (FOLDER / name).read_text()
    for variable in ("NNODES", "N_GPUS_PER_NODE"):
        assert variable in text and f"  {variable} " in USAGE
    assert re.search(r"run_spin\.sh\"? --install", text)


def test_compilers_caches_are_not_shared_by_slurms_nodes():
    """vLLM's is in the home folder otherwise, where a node could read what another has half written."""
    [script] = shell("slurm.sbatch")
    for variable in ("TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"):
        assert re.search(rf'^export {variable}="\$\{{TMPDIR:-/tmp\}}/', script, re.MULTILINE)


def test_every_cluster_asks_for_a_token():
    [task] = documents("skypilot.yaml")
    assert task["envs"]["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" in task["secrets"]
    assert documents("kuberay.yaml")[0]["spec"]["rayClusterSpec"]["authOptions"]["mode"] == "token"
    assert "\nRAY_AUTH_MODE=token\n" in shell("slurm.sbatch")[0]


def test_kuberays_policy_is_for_this_runs_pods_alone():
    """Those of another Ray cluster in the namespace carry Ray's labels too."""
    job, policy = documents("kuberay.yaml")
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    of_the_run = {"matchLabels": groups[0]["template"]["metadata"]["labels"]}
    assert all(group["template"]["metadata"]["labels"] == of_the_run["matchLabels"] for group in groups)
    assert policy["spec"]["podSelector"] == of_the_run
    assert policy["spec"]["ingress"][0]["from"] == [{"podSelector": of_the_run}]


def test_both_of_kuberays_nodes_are_alike_and_as_many_as_the_run_takes():
    job, _ = documents("kuberay.yaml")
    cluster = job["spec"]["rayClusterSpec"]
    head, [workers] = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["template"]["spec"] == workers["template"]["spec"]
    [container] = head["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(variables["NNODES"]) == 1 + workers["replicas"]
    assert variables["N_GPUS_PER_NODE"] == head["rayStartParams"]["num-gpus"] == workers["rayStartParams"]["num-gpus"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in head["template"]["spec"]["volumes"]}
    constraints = (FOLDER.parent.parent / "constraints" / "gpu.txt").read_text()
    assert re.search(rf"^ray=={re.escape(cluster['rayVersion'])}$", constraints, re.MULTILINE)


# ---- The scripts, with stand-ins for Ray, Slurm and the run ---------------------------------------------------------
RAY = """
case "$*" in
*BROKEN*) ;;
"start --head"*) touch up; trap 'rm up; exit 1' TERM; while true; do sleep 1; done ;;
"start --address"*) touch joined; while [[ -e up ]]; do sleep 1; done; exit 1 ;;
status*) [[ -e up ]] || exit 1; echo " 1 node_a"; if [[ -e joined ]]; then echo " 1 node_b"; fi; exit 0 ;;
esac
exit 1
"""
RAY_OF_PYTHON = "env 1/bin/ray"  # of an active Python that has verl
STANDINS = {
    RAY_OF_PYTHON: RAY,
    "run_spin.sh": """
if [[ "$*" == --install ]]; then
    echo "[spin] ready: $PWD/env 1/bin/python; start Ray with it on each node: $PWD/env 1/bin/ray start ..."
else
    echo "$NNODES $N_GPUS_PER_NODE $RAY_ADDRESS $*" >run
fi""",
    "bin/sleep": "exec /bin/sleep 0.01",
    "bin/scontrol": "echo first; echo second",
    "bin/hostname": "echo 10.0.0.1",
    "bin/srun": 'echo "$SRUN_CPUS_PER_TASK" >>cpus; while [[ "$1" == --* ]]; do shift; done; exec "$@"',
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_CPUS_PER_TASK": "64",
    "SLURM_GPUS_PER_NODE": "8",
}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}


@pytest.fixture
def job(tmp_path):
    """Starts a script of an example in a checkout of stand-ins; ends what it leaves, as Slurm and SkyPilot do."""
    for name, script in STANDINS.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)
    started = []

    def start(script: str, variables: dict[str, str], stderr=subprocess.PIPE) -> subprocess.Popen:
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        options = {"text": True, "stderr": stderr, "start_new_session": True}
        environment = {"PATH": path, "SLURM_SUBMIT_DIR": str(tmp_path), **variables}
        started.append(subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment, **options))
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def replace(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))


def ended(process: subprocess.Popen, status: int) -> str:
    """What a script said that has ended so."""
    assert process.wait(timeout=60) == status
    with suppress(ProcessLookupError):  # what it left would keep its stderr open
        os.killpg(process.pid, signal.SIGKILL)
    return process.stderr.read()


def start_skypilots_nodes(job) -> list[subprocess.Popen]:
    script = shell("skypilot.yaml")[1]
    return [job(script, SKYPILOT | {"SKYPILOT_NODE_RANK": str(rank)}) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["slurm.sbatch", "skypilot.yaml"])
def test_a_job_ends_that_is_not_told_where_ray_is(job, tmp_path, name):
    replace(tmp_path, "run_spin.sh", "ready: ", "done: ")
    variables = SLURM if name == "slurm.sbatch" else SKYPILOT | {"SKYPILOT_NODE_RANK": "1"}
    assert "did not say where Ray is" in ended(job(shell(name)[-1], variables), 1)


def test_what_slurms_job_had_written_stays(job, tmp_path):
    """Slurm gives a job one file for both streams."""
    log = tmp_path / "slurm-7.out"
    log.write_text("before\n")
    with log.open("a") as file:
        process = job(shell("slurm.sbatch")[0], SLURM, stderr=file)
        assert process.wait(timeout=60) == 0
    assert log.read_text().startswith("before\n") and "[spin] ready: " in log.read_text()


def test_both_of_skypilots_nodes_end_well_after_the_run(job, tmp_path):
    """SkyPilot's job waits for all nodes, and has failed if one has."""
    for process in start_skypilots_nodes(job):
        ended(process, 0)
    assert (tmp_path / "run").read_text().split() == ["2", "8", "10.0.0.1:6379"]
    assert not (tmp_path / "up").exists()  # the head's Ray has ended


def test_skypilots_job_fails_as_the_run_does(job, tmp_path):
    replace(tmp_path, "run_spin.sh", ">run", ">run; exit 3")
    head, worker = start_skypilots_nodes(job)
    ended(head, 3)
    ended(worker, 0)


@pytest.mark.parametrize("node", ["--head", "--address"])
def test_skypilots_job_ends_when_ray_does_not_start(job, tmp_path, node):
    replace(tmp_path, RAY_OF_PYTHON, '"start ' + node, '"start BROKEN' + node)
    head, worker = start_skypilots_nodes(job)
    message = ended(head, 1)
    assert ("ray start has ended" if node == "--head" else "all_joined still fails") in message
    ended(worker, 1 if node == "--head" else 0)
    assert not (tmp_path / "run").exists()


def test_slurms_job_runs_with_all_cpus_in_every_step(job, tmp_path):
    ended(job(shell("slurm.sbatch")[0], SLURM), 0)
    assert (tmp_path / "run").read_text().split() == ["2", "8", "10.0.0.1:6379"]
    assert set((tmp_path / "cpus").read_text().split()) == {"64"}


@pytest.mark.parametrize("node", ["--head", "--address"])
def test_slurms_job_ends_when_ray_does_not_start(job, tmp_path, node):
    replace(tmp_path, RAY_OF_PYTHON, '"start ' + node, '"start BROKEN' + node)
    assert "ray start has ended" in ended(job(shell("slurm.sbatch")[0], SLURM), 1)
    assert not (tmp_path / "run").exists()


def test_slurms_job_ends_when_the_others_do_not_join(job, tmp_path):
    replace(tmp_path, RAY_OF_PYTHON, "touch joined;", "")
    assert "all_joined still fails" in ended(job(shell("slurm.sbatch")[0], SLURM), 1)


def test_slurms_head_needs_an_address_that_others_reach(job, tmp_path):
    replace(tmp_path, "bin/hostname", "10.0.0.1", "127.0.1.1")
    message = ended(job(shell("slurm.sbatch")[0], SLURM), 1)
    assert "first knows itself as 127.0.1.1" in message and "set ip" in message


def test_every_example_stands_in_the_readme():
    readme = (FOLDER / "README.md").read_text()
    examples = [file.name for file in FOLDER.iterdir() if file.name != "README.md"]
    assert len(examples) == 3 and all(f"`{name}`" in readme for name in examples)
