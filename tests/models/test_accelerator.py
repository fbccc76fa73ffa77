"""Values, gradients and memory of the implementations that accelerators use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.benchmarks import attention_case, feedback_case, path_x_case, recurrence_case, stu_case

pytestmark = pytest.mark.gpu

CASES = {
    "stu": lambda: stu_case(4, 1024, 64, k_y=2),
    "stu with 32 matrices": lambda: stu_case(4, 1024, 64, k_y=32),
    "stu of one wide sequence": lambda: stu_case(1, 512, 256, k_y=2),
    "recurrence": lambda: recurrence_case(4, 2048, 64),
    "feedback": lambda: feedback_case(4, 1024, 32, k_y=32),
    "attention": lambda: attention_case(2, 4096, 2, 32),
}


@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 2e-4), ("tensorfloat32", 1e-2)])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_a_cpu(name, precision, tolerance):
    case = CASES[name]()

    def with_gradients(learned, fixed):
        y, pull = jax.vjp(lambda *x: case.ours(*x, *fixed), *learned)
        return y, pull(jnp.ones_like(y))

    results = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        arguments = jax.device_put((case.learned, case.constants), device)
        with jax.default_matmul_precision(precision):
            results.append(jax.device_get(jax.jit(with_gradients)(*arguments)))
    for found, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def test_path_x_fits_without_rematerialisation():
    """Six layers at B = 32, L = 16,384, D = 128, forward and backward, in 40 GB."""
    case = path_x_case()

    def gradients(params):
        logits, pull = jax.vjp(lambda p: case.ours(p, *case.constants), params)
        return pull(logits)

    compiled = jax.jit(gradients).lower(*case.learned).compile()
    memory = compiled.memory_analysis()
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert used < 40e9
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(compiled(*case.learned)))
