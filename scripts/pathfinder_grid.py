"""Draw docs/pathfinder_grid.png: pictures of the original program above ours. Run it from the repository root."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lra.tasks.snakes import generate

COLUMNS = 8
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    figure = plt.figure(figsize=(COLUMNS, 5.2), dpi=130)
    for part, size in zip(figure.subfigures(2, 1), (32, 128), strict=True):
        with np.load(ROOT / "tests" / "golden" / f"pathfinder_upstream_{size}.npz") as golden:
            upstream = golden["images"][:COLUMNS], golden["labels"][:COLUMNS]
        ours = generate(COLUMNS, size, "hard", seed=0, workers=1)
        axes = part.subplots(2, COLUMNS, gridspec_kw={"wspace": 0.05, "hspace": 0.25, "left": 0.01, "right": 0.99})
        for row, name, (images, labels) in zip(axes, ("upstream", "ours"), (upstream, ours), strict=True):
            for axis, image, label in zip(row, images, labels, strict=True):
                axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                axis.set_title(f"{name} {size}: {label}", fontsize=7, pad=2)
                axis.set_axis_off()
    figure.savefig(ROOT / "docs" / "pathfinder_grid.png")


if __name__ == "__main__":
    main()
