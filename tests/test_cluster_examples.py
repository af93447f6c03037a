"""The files in examples/cluster: they parse, and say what the run they start understands."""

import re
import subprocess
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


def test_every_cluster_asks_for_a_token():
    [task] = documents("skypilot.yaml")
    assert task["envs"]["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" in task["secrets"]
    assert documents("kuberay.yaml")[0]["spec"]["rayClusterSpec"]["authOptions"]["mode"] == "token"
    assert "\nRAY_AUTH_MODE=token\n" in shell("slurm.sbatch")[0]


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


def test_every_example_stands_in_the_readme():
    readme = (FOLDER / "README.md").read_text()
    examples = [file.name for file in FOLDER.iterdir() if file.name != "README.md"]
    assert len(examples) == 3 and all(f"`{name}`" in readme for name in examples)
