"""What run_spin.sh says of the reward: its file is code, which is run."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TELL = """
spin_say() { echo "$1"; }
eval "$(sed -n '/^tell()/,/^}/p' run_spin.sh)"
SPIN_PROFILE=cpu NNODES=1 N_GPUS_PER_NODE=1 MODEL=m DATA=d RUN=/no/such/run REWARD="$1"
tell
"""


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        ("/data/mine/reward.py", "reward:  /data/mine/reward.py (its code is run)"),
        ("", "reward:  as arguments and preference source say, else the one that verl has for the data source"),
    ],
)
def test_a_file_with_a_reward_is_said_to_be_run(reward, line):
    told = subprocess.run(["bash", "-euc", TELL, "tell", reward], cwd=ROOT, capture_output=True, text=True, check=True)
    assert line in told.stdout.splitlines()


def test_the_help_says_so():
    told = subprocess.run(["bash", "run_spin.sh", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "DATA_DIR/reward.py, whose code is run too" in told.stdout
