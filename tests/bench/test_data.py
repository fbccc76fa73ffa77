"""The data suite measures what is there and gives a reason for the rest."""

import pytest

from lra.bench import data

LISTOPS = ("task=listops", "task.sizes={train: 80, val: 8, test: 8}")


@pytest.mark.slow
def test_data_suite_measures_all_but_incomplete_data(publishers, monkeypatch):
    """The publishers' files of the tests hold too few examples of Text and Image."""
    monkeypatch.setattr(data, "WINDOWS", 1)
    monkeypatch.setattr(data, "LISTOPS", LISTOPS)
    monkeypatch.setattr(data, "NUM_PICTURES", {32: 4, 128: 1})
    found = {m.what: m for m in data.measure(publishers)}
    assert len(found) == 7
    missing = {what for what, m in found.items() if m.value is None}
    assert missing == {what for what in found if what.startswith(("Text", "Image"))}
    assert all("examples in" in found[what].note for what in missing)
    assert found["ListOps, 100,000 rows generated and packed"].note.startswith("96 rows")
    assert all(m.value > 0 for what, m in found.items() if what not in missing)
