import pytest
from checkable_run import Run
from tiny_models import ARCHITECTURES, save_tiny_model
from worker_harness import Ranks


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, str]:
    """Folders of the tiny models by architecture."""
    folder = tmp_path_factory.mktemp("tiny_models")
    return {name: str(save_tiny_model(folder / name, name)) for name in ARCHITECTURES}


@pytest.fixture
def run(tmp_path, tiny_models) -> Run:
    """A run that could start."""
    return Run(tmp_path, tiny_models["llama"])


@pytest.fixture(scope="session")
def ranks():
    """Processes for the real worker by their number, started at the first use."""
    worlds = {size: Ranks(size) for size in (1, 2)}
    yield worlds
    for world in worlds.values():
        world.stop(patience=5)
