"""Finished runs as records for tables, and the parts of a table."""

import csv
import io

from lra.report.formats import render
from lra.report.tables import make_table


def a_record(accuracy, seed=0, **changes):
    """A finished run; `changes` replace fields of the record, `config` adds to its config."""
    config = {"seed": seed, **changes.pop("config", {})}
    val = changes.pop("val", accuracy)
    return {
        "schema": 1,
        "status": "finished",
        "task": "listops_short",
        "model": "stu",
        "protocol": "strict",
        "seed": seed,
        "config": config,
        "experiment": None,
        "step": 2000,
        "tuning_runs": 1,
        "commit": "abc1234",
        "metrics": {
            "val": {"accuracy": val, "count": 2000},
            "test": {"accuracy": accuracy, "count": 2000},
        },
        "reference": {"majority": 0.17, "root_operator": 0.363},
        "data": {"source": "generated", "key": "aabbccddeeff"},
        "params": {"total": 12345},
        **changes,
    }


def cells(table, title):
    """{row: {task: text}} of the section whose title starts with `title`."""
    return {
        row.name: row.cells
        for name, rows in table.sections
        if name.startswith(title)
        for row in rows
    }


def ours(records, **options):
    return cells(make_table(records, published="none", **options), "Ours")


def long_form(table):
    return list(csv.DictReader(io.StringIO(render(table, "csv"))))
