"""An optimizer config and parameters that several tests share."""

import jax.numpy as jnp

CONFIG = {
    "lr": 0.01,
    "weight_decay": 0.1,
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-8,
    "warmup": 0.2,
    "lr_start": 1e-4,
    "lr_end": 1e-3,
    "schedule": "cosine",
    "plateau": {"metric": "accuracy", "factor": 0.5, "patience": 1, "threshold": 0.01},
    "clip": None,
    "groups": {"slow": {"match": "m_y$", "lr_factor": 0.1, "weight_decay": 0.0}},
    "no_decay": "bias$",
}
PARAMS = {
    "mixer": {"m_y": jnp.asarray([1.0, -2.0]), "bias": jnp.asarray([0.5])},
    "kernel": jnp.asarray([3.0]),
}
