"""Out of memory: recognized in XLA's messages, and answered with advice."""

import jax
import pytest

import lra
from lra.errors import LraError
from lra.runs.records import read_record
from lra.training import setup
from lra.training.memory import in_gb, is_out_of_memory, out_of_memory_advice
from lra.training.prefetch import DeviceData


@pytest.mark.parametrize(
    ("message", "out_of_memory"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte", True),
        ("INTERNAL: Failed to create cuFFT batched plan with scratch allocator", True),
        ("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY", True),
        ("INTERNAL: Gloo all-reduce failed", False),
    ],
)
def test_messages_of_an_out_of_memory_error(message, out_of_memory):
    assert is_out_of_memory(jax.errors.JaxRuntimeError(message)) is out_of_memory
    assert not is_out_of_memory(ValueError(message))


@pytest.mark.parametrize(
    "error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), MemoryError("9 GB")]
)
def test_out_of_memory_while_the_model_is_built_is_one_line(tiny, tmp_path, monkeypatch, error):
    def builder(*_):
        def build(**_):
            raise error

        return build

    monkeypatch.setattr(setup, "model_builder", builder)
    with pytest.raises(LraError, match="out of memory while the model was built; lower") as caught:
        lra.train(tiny)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("record.json"))


def test_out_of_memory_ends_in_advice(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    monkeypatch.setattr(DeviceData, "call", full)
    with pytest.raises(LraError) as caught:
        lra.train([*tiny, "trainer.micro_batch=2"])
    message = str(caught.value)
    assert message.startswith(
        "out of memory at trainer.batch_size=4, trainer.micro_batch=2, trainer.remat=none"
    )
    assert (
        "set trainer.micro_batch below 2 (the batch stays 4), or trainer.remat=block, or "
        "trainer.precision=bf16" in message
    )
    assert "\n" not in message
    (record,) = tmp_path.rglob("record.json")
    assert read_record(record.parent)["status"] == "failed"


def test_advice_names_only_keys_that_help(tiny):
    layer_norm = lra.compose([*tiny, "backbone.norm=layer"])
    assert "set trainer.micro_batch=auto or below 2 (the batch stays 4)" in out_of_memory_advice(
        layer_norm, 2
    )
    smallest = lra.compose([*tiny, "trainer.remat=block", "trainer.precision=bf16"])
    advice = out_of_memory_advice(smallest, 1)
    assert advice.endswith("set a trainer.eval_batch_size below 8 if it was in an evaluation")


def test_bytes_in_gb():
    assert (in_gb(2_340_000_000), in_gb(None)) == ("2.34 GB", "?")
