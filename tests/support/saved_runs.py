"""Run folders without training: records of a config, and models with random weights."""

import jax
from omegaconf import OmegaConf

from lra.config.compose import compose
from lra.report.saved_run import SavedRun
from lra.runs.run_folder import RunFolder


def write_record(folder, overrides, **fields):
    """Writes the record of a finished run of a config, with `fields`; returns the config."""
    cfg = compose(overrides)
    config = OmegaConf.to_container(cfg)
    names = config.pop("names")
    record = {key: names[key] for key in ("task", "model", "protocol", "experiment", "command")}
    record |= {"status": "finished", "seed": cfg.seed, "config": config}
    with RunFolder(folder) as run_folder:
        run_folder.write_record(record | fields)
    return cfg


def untrained_run(overrides, folder):
    """A saved run whose weights are random, even if the model starts with zeros."""
    write_record(folder, overrides)
    run = SavedRun(folder)
    leaves, structure = jax.tree.flatten(run.setup.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    run.eval_batch = run.cfg.trainer.eval_batch_size  # without data
    run.weights = jax.tree.unflatten(structure, moved), run.setup.batch_stats
    return run
