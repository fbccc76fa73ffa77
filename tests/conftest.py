"""What every test shares: strict shapes, one small task on disk for the whole session, and a way to run the command."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["WANDB_MODE"] = "offline"
# the same small programs are compiled by many tests and by the commands they start: once is enough
_cache = tempfile.TemporaryDirectory(prefix="lra-xla-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import pytest
from tiny import TINY


def pytest_collection_modifyitems(config, items):
    """Soak tests take minutes, only `pytest -m soak` runs them; those marked gpu, `JAX_PLATFORMS=cuda,cpu pytest -m gpu`."""
    if "soak" not in config.option.markexpr:
        soak = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import jax

        if jax.default_backend() == "cpu":
            for item in marked:
                item.add_marker(
                    pytest.mark.skip(
                        reason="needs an accelerator; JAX_PLATFORMS=cuda,cpu pytest -m gpu"
                    )
                )


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def publishers(tmp_path_factory) -> Path:
    """A data root with a few examples of every publisher, in its own format."""
    import tiny_pictures
    import tiny_texts

    root = tmp_path_factory.mktemp("publishers")
    tiny_texts.imdb(root)
    tiny_texts.aan(root)
    tiny_pictures.cifar(root)
    return root


@pytest.fixture
def tiny(data_root, tmp_path):
    """Overrides of a run of seconds, in a folder of the test's own; extend them with the test's."""
    return [*TINY, f"data.root={data_root}", f"output.root={tmp_path / 'runs'}"]


@pytest.fixture
def lra_command():
    """Runs `lra ARGS` in a new process, as a user does."""

    def run(*args: str, timeout: float = 120, **kwargs) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "lra.cli", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)

    return run
