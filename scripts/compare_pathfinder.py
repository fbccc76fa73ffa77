"""Compares our Pathfinder pictures with those of the original program.

    python scripts/compare_pathfinder.py

Draws docs/pathfinder_grid.png and prints the table of docs/data.md.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.ndimage import label

from lra.tasks.pathfinder import generate

COLUMNS = 8
OURS = {32: 4500, 128: 150}  # pictures in the table; the original's are 500 and 50
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    draw_grid()
    names = ("mean grey level", "spread", "share of pixels at 0", "share above 245 (the dots)")
    names += ("connected contours", "largest contour in pixels")
    columns, heads = [], []
    for size, count in OURS.items():
        with np.load(ROOT / "tests" / "golden" / f"pathfinder_upstream_{size}.npz") as golden:
            for name, images in (
                ("ours", generate(count, size, seed=0)[0]),
                ("original", golden["images"]),
            ):
                rows = statistics(images)
                heads.append(f"{size}: {name}, {len(images):,}")
                error = rows.std(axis=0) / len(rows) ** 0.5
                columns.append(
                    [f"{m:.4g} ± {e:.2g}" for m, e in zip(rows.mean(axis=0), error, strict=True)]
                )
    print(f"| | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for name, *cells in zip(names, *columns, strict=True):
        print(f"| {name} | {' | '.join(cells)} |")


def statistics(images: np.ndarray) -> np.ndarray:
    """Per picture: mean, spread, shares of black and bright pixels, contours, largest contour."""
    rows = []
    for image in images:
        contours, count = label(image > 60, np.ones((3, 3)))
        largest = np.bincount(contours.ravel())[1:].max()
        rows.append(
            (image.mean(), image.std(), (image == 0).mean(), (image > 245).mean(), count, largest)
        )
    return np.array(rows)


def draw_grid() -> None:
    figure = plt.figure(figsize=(COLUMNS, 5.2), dpi=130)
    for part, size in zip(figure.subfigures(2, 1), (32, 128), strict=True):
        with np.load(ROOT / "tests" / "golden" / f"pathfinder_upstream_{size}.npz") as golden:
            upstream = golden["images"][:COLUMNS], golden["labels"][:COLUMNS]
        ours = generate(COLUMNS, size, "hard", seed=0)
        axes = part.subplots(
            2, COLUMNS, gridspec_kw={"wspace": 0.05, "hspace": 0.25, "left": 0.01, "right": 0.99}
        )
        for row, name, (images, labels) in zip(
            axes, ("upstream", "ours"), (upstream, ours), strict=True
        ):
            for axis, image, answer in zip(row, images, labels, strict=True):
                axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                axis.set_title(f"{name} {size}: {answer}", fontsize=7, pad=2)
                axis.set_axis_off()
    figure.savefig(ROOT / "docs" / "pathfinder_grid.png")


if __name__ == "__main__":
    main()
