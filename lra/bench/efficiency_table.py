"""The table of `lra bench efficiency`: quantities over lengths, or the cells of a preset."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lra.bench.efficiency_cell import WINDOWS
from lra.report.formats import Table, TableRow


class Quantity(NamedTuple):
    """A number of a cell and how the table shows it."""

    title: str
    path: tuple[str, ...]  # keys in the cell's record
    factor: float = 1.0
    relative: bool = False  # whether multiples of the baseline are shown too


QUANTITIES = (
    Quantity("Training, steps/s", ("train", "steps_per_s"), relative=True),
    Quantity("Inference, steps/s", ("infer", "steps_per_s"), relative=True),
    Quantity("Training, peak memory in GB", ("memory", "train_bytes"), 1e-9, relative=True),
    Quantity("Inference, peak memory in GB", ("memory", "infer_bytes"), 1e-9, relative=True),
    Quantity("Training, examples/s", ("train", "examples_per_s")),
    Quantity("Inference, examples/s", ("infer", "examples_per_s")),
    Quantity("Compilation of the training steps, s", ("train", "compile_s")),
    Quantity("Parameters, million", ("params",), 1e-6),
    Quantity("Forward pass of one example, GFLOP", ("flops",), 1e-9),
)
MEMORY_SOURCES = {
    "device": "the device's own count (`peak_bytes_in_use`)",
    "compiled": "what the compiled program needs (XLA's analysis), as this device does not count",
}


def length_table(result: Mapping[str, Any]) -> Table:
    """A section per quantity, a row per model, a column per length."""
    cells, baseline = result["cells"], result["baseline"]
    table = Table({cell["column"]: f"L={int(cell['column']):,}" for cell in cells})
    base = {cell["column"]: cell for cell in cells if cell["row"] == baseline}
    for quantity in QUANTITIES:
        relative = quantity.relative and bool(base)
        rows: dict[str, TableRow] = {}
        for cell in cells:
            row = rows.setdefault(cell["row"], TableRow(cell["row"]))
            reference = base.get(cell["column"]) if relative else None
            row.cells[cell["column"]] = format_cell(table, cell, quantity, reference)
        title = quantity.title + (f" (times that of {baseline})" if relative else "")
        table.add_section(title, rows.values())
    return table


def preset_table(result: Mapping[str, Any]) -> Table:
    """A row per model and task, a column per quantity, published steps/s beside ours."""
    titles = ["B", "L", "published steps/s", "ours / published", *(q.title for q in QUANTITIES)]
    table = Table({title: title for title in titles})
    rows = []
    for cell in result["cells"]:
        row = TableRow(cell["row"], {q.title: format_cell(table, cell, q) for q in QUANTITIES})
        row.cells |= {"B": str(cell.get("batch_size", "")), "L": f"{cell.get('seq_len', 0):,}"}
        if cell["published"]:
            row.cells["published steps/s"] = f"{cell['published']:g}"
            if cell["status"] == "ok":
                ratio = cell["train"]["steps_per_s"] / cell["published"]
                row.cells["ours / published"] = f"{ratio:.3g} x"
        rows.append(row)
    table.add_section("One model, one task a row", rows)
    return table


def format_cell(
    table: Table,
    cell: Mapping[str, Any],
    quantity: Quantity,
    baseline: Mapping[str, Any] | None = None,
) -> str:
    """Returns the number with its multiple of the baseline's, or OOM or - with a footnote."""
    value = find(cell, quantity.path)
    if value is None:
        if cell["status"] == "ok":
            return "-" + (table.add_footnote(cell["note"]) if cell.get("note") else "")
        mark = table.add_footnote(f"{cell['row']}: {cell['reason']}")
        return ("OOM" if cell["status"] == "oom" else "-") + mark
    scaled = value * quantity.factor
    text = f"{scaled:,.3g}" if scaled < 1000 else f"{scaled:,.0f}"
    reference = find(baseline, quantity.path)
    return f"{text} ({value / reference:.2g} x)" if reference else text


def find(cell: Mapping[str, Any] | None, path: tuple[str, ...]) -> Any:
    for key in path:
        cell = (cell or {}).get(key)
    return cell


def make_table(result: Mapping[str, Any]) -> Table:
    """Returns the table of a record, for `lra.report.formats.render`."""
    table = preset_table(result) if result["preset"] else length_table(result)
    cells, machine = result["cells"], result["machine"]
    table.remarks += result["caption"]
    if sources := sorted({cell["memory"]["source"] for cell in cells if cell["status"] == "ok"}):
        table.remarks.append(
            f"Peak memory: {' or '.join(MEMORY_SOURCES[source] for source in sources)}."
        )
    load = ""
    if loads := [cell["load"] for cell in cells if "load" in cell]:
        load = f", load average {min(loads):g} to {max(loads):g} (1 if nothing else runs)"
    commits = sorted({str(cell["commit"]) for cell in cells})
    table.remarks.append(
        f"Steps/s: the fastest of {WINDOWS} windows. One {machine['kind']} device of "
        f"{machine['count']}; {machine['cpu']}, {machine['cores']} cores{load}; "
        f"commit {' and '.join(commits)}, JAX {result['versions']['jax']}."
    )
    table.remarks.append(f"Command: {result['command']}.")
    return table
