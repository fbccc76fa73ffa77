"""Shared fixtures: a compilation cache, a small data root per session, and the `lra` command."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["WANDB_MODE"] = "offline"
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Tests compile many small programs and run them once; this halves the time of a compilation.
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    )
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Workers and the commands that tests start inherit the folder, so each program compiles once.
    _cache = tempfile.mkdtemp(prefix="lra-xla-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import pytest
from tiny import TINY


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Deselects `soak` tests without `-m soak`; skips `gpu` tests without an accelerator.

    Marks the variants of a test after its first `fast_variants(n)` as slow.
    """
    variants: Counter[str] = Counter()
    for item in items:
        if marker := item.get_closest_marker("fast_variants"):
            test = item.nodeid.partition("[")[0]
            variants[test] += 1
            if variants[test] > marker.args[0]:
                item.add_marker("slow")
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


@pytest.fixture(scope="module", autouse=True)
def drop_compiled_programs():
    """Frees compiled programs after each module; a worker that keeps them all grows to 5.5 GB."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def publishers(tmp_path_factory) -> Path:
    """A data root with a few examples of each published data set, in its original format."""
    import tiny_pictures
    import tiny_texts

    root = tmp_path_factory.mktemp("publishers")
    tiny_texts.imdb(root)
    tiny_texts.aan(root)
    tiny_pictures.cifar(root)
    return root


@pytest.fixture
def tiny(data_root, tmp_path):
    """Overrides for a run of a few seconds in the test's own folder."""
    return [*TINY, f"data.root={data_root}", f"output.root={tmp_path / 'runs'}"]


@pytest.fixture
def lra_command():
    """Runs `lra ARGS` in a new process."""

    def run(*args: str, timeout: float = 120, **kwargs) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "lra.cli", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)

    return run


@pytest.fixture
def lra_main(monkeypatch, capsys):
    """Runs `lra ARGS` in this process and returns its stdout; the exit code must be 0."""

    def run(*args: str) -> str:
        from lra.cli import main

        monkeypatch.setattr(sys, "argv", sys.argv)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run
