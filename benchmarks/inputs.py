"""The model and the data that benchmarks take unless told otherwise: those of the default run."""

import os
from pathlib import Path

from benchmarks.machine import ROOT
from recipe.spin.examples.arithmetic.prepare import prepare
from recipe.spin.examples.embedded_model import make_model

# Where run_spin.sh keeps them
MODEL = str(Path(os.environ.get("SPIN_MODEL_CACHE", ROOT / ".cache" / "models")) / "SmolLM2-135M-Instruct")
DATA = ROOT / "data" / "arithmetic"


def make_missing(model: str = MODEL, data: Path = DATA) -> None:
    """Makes those of the default run that are asked for and not there, as run_spin.sh would."""
    if model == MODEL:
        make_model(Path(model))
    if data == DATA and not all((data / f"{split}.parquet").exists() for split in ("train", "test")):
        prepare(data)
