"""Models of saved runs, rebuilt for inputs of another length."""

import jax
import numpy as np
import pytest
from saved_runs import untrained_run, write_record
from tiny import TINY

from lra.errors import ConfigError
from lra.report.perturbations import cut_windows
from lra.report.resize import resized_setup, setup_for_windows, split_settings
from lra.report.saved_run import SavedRun
from models.ops.filters import spectral_filters

ONE_BLOCK = [*TINY, "backbone.depth=1"]


@pytest.fixture(scope="module")
def stu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stu")
    return untrained_run([*ONE_BLOCK, "model=stu", "model.num_filters=8"], folder)


def assert_windows_equal_padded_windows(run, size, expected_length):
    """Logits of windows equal those of windows padded to the length of the run."""
    rng = np.random.default_rng(0)
    rows, lengths = rng.integers(3, 18, (3, 32)), np.array([32, 30, 9])
    setup, padded = setup_for_windows(run, size)
    assert padded == expected_length
    short, long = (cut_windows(rows, lengths, size, width) for width in (padded, 32))
    expected = run.logits(*long[:2])
    assert np.ptp(expected, axis=0).min() > 1e-3
    np.testing.assert_allclose(run.logits(*short[:2], setup), expected, atol=2e-5)


@pytest.mark.slow
def test_model_of_short_windows_has_the_filters_of_the_run(stu):
    assert_windows_equal_padded_windows(stu, 4, 8)  # eight filters need as many positions


@pytest.mark.slow
def test_parameters_that_depend_on_the_length_are_refused(tmp_path):
    run = untrained_run([*ONE_BLOCK, "model=mega", "model.chunk_size=null"], tmp_path)
    assert_windows_equal_padded_windows(run, 8, 32)
    message = r"rel_bias is \(63,\) at 32 positions and \(191,\) at 96;"
    with pytest.raises(ConfigError, match=message) as caught:
        resized_setup(run, ["task.seq_len=96"])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_padding_does_not_change_logits_of_a_recurrent_model(tmp_path):
    run = untrained_run([*ONE_BLOCK, "model=gru"], tmp_path)
    rng = np.random.default_rng(0)
    inputs, lengths = rng.integers(3, 18, (5, 32)), np.array([32, 30, 21, 9, 1])
    inputs[np.arange(32) >= lengths[:, None]] = 0
    setup = resized_setup(run, ["task.seq_len=48"])
    logits = run.logits(np.pad(inputs, ((0, 0), (0, 16))), lengths, setup)
    np.testing.assert_allclose(logits, run.logits(inputs, lengths), atol=1e-5)


def test_filters_are_recomputed_for_another_length(stu):
    setup = resized_setup(stu, ["task.seq_len=48"])
    _, phi = spectral_filters(48, 8)
    (filters, *_) = (leaf for leaf in jax.tree.leaves(setup.constants) if leaf.shape == (48, 8))
    np.testing.assert_allclose(filters, phi, atol=1e-6)


def test_another_vocabulary_is_refused(tmp_path):
    write_record(tmp_path, ["task=associative_recall", "debug=tiny"])
    message = "vocab size is 25 there and 17 in the run; only lengths may change"
    with pytest.raises(ConfigError, match=message):
        resized_setup(SavedRun(tmp_path), ["task.num_keys=20"])


def test_a_value_that_is_no_yaml_is_one_line(tmp_path):
    write_record(tmp_path, ["task=associative_recall", "debug=tiny"])
    with pytest.raises(ConfigError, match="cannot read an override or a YAML file: while parsing"):
        resized_setup(SavedRun(tmp_path), ["task.num_keys={"])


def test_values_of_keys_are_combined_by_position():
    assert split_settings(["task.a=1,2", "task.b=3,4", "task.sizes={train: 1, val: 2}"]) == [
        ["task.a=1", "task.b=3", "task.sizes={train: 1, val: 2}"],
        ["task.a=2", "task.b=4", "task.sizes={train: 1, val: 2}"],
    ]
    with pytest.raises(ConfigError, match=r"task.b=1,2 has 2 values and another key 3"):
        split_settings(["task.a=1,2,3", "task.b=1,2"])
    with pytest.raises(ConfigError, match="expected a task.KEY=VALUE"):
        split_settings([])
