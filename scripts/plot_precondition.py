"""Draws results/precondition/curves.png from the records of scripts/precondition.sh."""

from pathlib import Path

import numpy as np

import lra
from lra.runs.records import read_metrics
from lra.studies.figures import draw_band, panels, paper_style

RESULTS = Path(__file__).resolve().parents[1] / "results"


def curves(runs, key):
    """Steps (T,) and the values (n, T) of a metric in the runs, which have the same steps."""
    values = []
    for path in runs["path"]:
        lines = read_metrics(Path(path))
        values.append([(line["step"], line[key]) for line in lines if key in line])
    found = np.array(values)
    return found[0, :, 0], found[..., 1]


def main():
    runs = lra.records([RESULTS / "precondition", RESULTS / "runs"])
    power = runs["config.model.precondition"]
    with paper_style():
        titles = ["L = 136: validation accuracy", "L = 2,048: training loss"]
        figure, (short, long) = panels(titles)
        for p in (0, 0.25, 0.5):
            ours = runs[(runs["model"] == "stu") & (power == p)]
            steps, accuracy = curves(ours[ours["task"] == "listops_short"], "val/accuracy")
            draw_band(short, steps, 100 * accuracy, label=f"STU, p = {p:g}")
            if len(at_length := ours[ours["task"] == "listops"]):
                steps, loss = curves(at_length, "train/loss")
                draw_band(long, steps, loss, label=f"STU, p = {p:g}")
        ar_stu = runs[(runs["model"] == "ar_stu") & (runs["task"] == "listops_short")]
        steps, accuracy = curves(ar_stu, "val/accuracy")
        draw_band(short, steps, 100 * accuracy, label="AR-STU, p = 0", color="0.5")
        long.axhline(np.log(10), color="0.6", ls=":", label="log 10, chance")
        short.set(xlabel="steps", ylabel="%")
        long.set(xlabel="steps", ylabel="nats", yscale="log")
        for axis in (short, long):
            axis.legend()
        figure.savefig(RESULTS / "precondition" / "curves.png")


if __name__ == "__main__":
    main()
