"""The output of `lra data info`, `lra data verify` and `lra data show`."""

import json
import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lra.data.packed import Split, Store, open_store
from lra.data.store import pack, prepared_path, settings_name
from lra.data.verify import changed_sources, verify
from lra.errors import DataError
from lra.runs.console import printable
from lra.tasks.base import Task

CHECKSUMS = Path(__file__).with_name("checksums.json")  # by scripts/record_checksums.py
SHEET_PIXELS = 160  # smaller pictures are enlarged
SHEET_COLUMNS = 5


def verify_lines(task: Task, store: Store) -> Iterator[tuple[str, bool]]:
    """Lines of `lra data verify`, each with whether it is a problem; the last is the verdict."""
    result = verify(store)
    yield f"{task.name}: {store.path}", False
    yield from ((line, False) for line in _split_lines(store))
    for source in store.manifest["source_files"]:
        yield f"  source {source['name']}: sha256 {source['sha256'][:16]}", False
    for note in store.manifest["notes"]:
        yield f"  note: {note}", False
    yield f"  equal examples: {_counts(result.overlaps) or 'none'}", False
    if result.documents:
        shared = _counts(result.documents)
        yield f"  pairs with a document that the other split has too: {shared}", False
    if store.manifest["partial"]:
        yield "  partial: made from too few examples, with data.allow_partial=true", False
    is_comparable = store.manifest["source"] != "tfds" and not store.manifest["partial"]
    is_different = is_comparable and expected_hashes(task) not in (None, content_hashes(store))
    yield f"  {reference_line(task, store)}", is_different
    problems = [
        f"source {source} has changed since the store was made; delete {store.path} and prepare "
        "it again"
        for source in changed_sources(task, store)
    ]
    problems += result.problems
    yield from ((f"  NOT SOUND: {problem}", True) for problem in problems)
    is_sound = not (problems or is_different)
    yield f"{task.name}: {'sound' if is_sound else 'NOT sound'}", not is_sound


def _split_lines(store: Store) -> Iterator[str]:
    for name, entry in store.manifest["splits"].items():
        yield f"  {name:<6}{describe(entry)}"


def _counts(shared: Mapping[str, int]) -> str:
    return ", ".join(f"{pair} {count:,}" for pair, count in shared.items())


def expected_hashes(task: Task) -> dict[str, str] | None:
    """Recorded content hashes of the splits for a task's settings, or None."""
    return json.loads(CHECKSUMS.read_text("utf-8")).get(settings_name(task))


def content_hashes(store: Store) -> dict[str, str]:
    """Content hash of each split."""
    return {name: entry["sha256"] for name, entry in store.manifest["splits"].items()}


def reference_line(task: Task, store: Store) -> str:
    """Compares the content with the recorded hashes for the same settings."""
    known, found = expected_hashes(task), content_hashes(store)
    if known is None:
        return "no reference is known for these settings"
    if found == known:
        return "content equals the reference: the same bytes as recorded"
    others = ", ".join(name for name in found if found[name] != known.get(name))
    return (
        f"content DIFFERS from the reference in {others}: other source files, another order of "
        "them, or a partial copy"
    )


def describe(entry: dict[str, Any]) -> str:
    """One line about a split of a manifest: count, label balance, lengths, hash."""
    if "same_as" in entry:
        return f"is {entry['same_as']}, the protocol has no validation of its own"
    labels, lengths = entry["labels"], entry["lengths"]
    total = max(sum(labels), 1)
    shares = " ".join(f"{100 * count / total:.1f}" for count in labels[:20])
    return (
        f"{entry['count']:>9,} examples; labels {shares}{' ...' * (len(labels) > 20)} %; "
        f"length {lengths['min']} to {lengths['max']}, mean {lengths['mean']:.1f}; "
        f"sha256 {entry['sha256'][:16]}"
    )


def info_lines(task: Task, protocol: str, data_root: Path) -> Iterator[str]:
    """Lines of `lra data info`: the task, its sources and its packed store. Prepares nothing."""
    values = f"{task.num_features} value(s) per position"
    kind = f"{task.num_tokens} tokens" if task.num_tokens else values
    pair = "2 x " if task.dual else ""
    targets = f", {task.num_targets} labels per example" if task.num_targets > 1 else ""
    yield (
        f"{task.name}, protocol {protocol}: length {pair}{task.seq_len:,}, {kind}, "
        f"{task.num_classes} classes{targets}"
    )
    if sizes := task.split_sizes():
        yield f"  should have {_counts(sizes)}"
    if task.same:
        yield "  " + ", ".join(f"{name} is {other}" for name, other in task.same.items())
    try:
        folders = {file.parent for file in task.source_files()}
        where = f" files in {os.path.commonpath(folders)}" if folders else ", no file needed"
        yield f"  source: {task.source}{where}"
    except DataError as error:
        yield f"  source: {error}"
    path = _existing_store(task, data_root)
    if path is None:
        yield f"  not prepared; `lra data prepare {task.name}` does it"
        return
    try:
        store = open_store(path, task.name)
    except DataError as error:
        yield f"  DAMAGED: {error}"
        return
    megabytes = sum(file.stat().st_size for file in store.path.iterdir()) / 1e6
    partial = ", PARTIAL: data.allow_partial=true uses it" if store.manifest["partial"] else ""
    yield f"  prepared: {store.path}, {megabytes:,.1f} MB{partial}"
    yield from _split_lines(store)
    lines = ", ".join(
        f"{name.replace('_', ' ')} {100 * x:.1f} %"
        for name, x in store.manifest["reference"].items()
    )
    yield f"  to beat: {lines}"
    for note in store.manifest["notes"]:
        yield f"  note: {note}"


def _existing_store(task: Task, data_root: Path) -> Path | None:
    with suppress(DataError):  # the sources are missing, and no store was made from them
        path = prepared_path(task, data_root)
        return path if path.exists() else None
    return None


def generated_rows(task: Task, name: str, count: int, data_root: Path) -> Split | None:
    """The first rows of a split, generated without a store; None if there is one, or sources."""
    try:
        has_files = task.source != "generated" or task.source_files()
    except DataError:  # they are missing
        has_files = True
    if has_files or _existing_store(task, data_root) is not None:
        return None
    return pack(task, list(task.first_examples(task.same.get(name, name), count)))


def show_lines(task: Task, name: str, split: Split, count: int) -> Iterator[str]:
    """The first examples of a split as readable text, folded at the width of the terminal."""
    width = shutil.get_terminal_size((100, 24)).columns
    for row in range(min(count, len(split))):
        inputs, lengths = split.inputs[row], np.atleast_1d(split.lengths[row])
        sides = inputs if task.dual else inputs[None]
        text = "\n  | ".join(
            task.to_text(side[:length]) for side, length in zip(sides, lengths, strict=True)
        )
        gap = "\n" if task.picture_shape else " "
        shown = f"{task.name} {name} {row} label {task.label_text(split.labels[row])}:{gap}{text}"
        lines = map(printable, shown.split("\n"))
        yield "\n".join(lines if task.picture_shape else (_folded(line, width) for line in lines))


def _folded(line: str, width: int) -> str:
    wrapper = textwrap.TextWrapper(
        width,
        subsequent_indent="  ",
        expand_tabs=False,
        replace_whitespace=False,
        break_on_hyphens=False,
    )
    return wrapper.fill(line)


def write_sheet(task: Task, split: Split, count: int, file: Path) -> Path:
    """The first pictures of a split with their labels, as one PNG."""
    from PIL import Image, ImageDraw

    height, width = task.picture_shape  # type: ignore[misc]
    scale = max(1, SHEET_PIXELS // max(height, width))
    cell_height, cell_width = height * scale + 16, width * scale + 4
    count = min(count, len(split))
    columns, rows = max(min(count, SHEET_COLUMNS), 1), max(-(-count // SHEET_COLUMNS), 1)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    colours = (3,) if task.num_features == 3 else ()
    for i in range(count):
        pixels = np.asarray(split.inputs[i]).reshape(height, width, *colours)
        picture = Image.fromarray(pixels).convert("RGB")
        x, y = i % SHEET_COLUMNS * cell_width, i // SHEET_COLUMNS * cell_height
        size = (width * scale, height * scale)
        sheet.paste(picture.resize(size, Image.Resampling.NEAREST), (x, y))
        draw.text(
            (x + 2, y + size[1] + 2), f"label {task.label_text(split.labels[i])}", fill="black"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, "PNG")
    return file
