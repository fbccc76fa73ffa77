"""Writes tiny files in the publishers' formats of Text and Retrieval."""

from pathlib import Path

REVIEWS = {"train": 24, "test": 10}  # of each class
PAIRS = {"train": 24, "eval": 8, "test": 8}
WORDS = {0: "dull tedious plodding awful", 1: "wonderful moving splendid joy"}


def review(label: int, number: int) -> str:
    """A unique review; the words of the two classes consist of different letters."""
    words = " ".join([WORDS[label]] * (2 + number % 5))
    return f"Film {number}<br /><br />caf\u00e9 \x85 \u4e2d {words}!"


def imdb(root: Path) -> Path:
    """Write `aclImdb` below `root`; the numbers of the files have one or two digits."""
    folder = Path(root) / "aclImdb"
    for part, count in REVIEWS.items():
        for label, name in enumerate(("neg", "pos")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                rating = (1 if label == 0 else 7) + number % 4
                path = folder / part / name / f"{number}_{rating}.txt"
                path.write_bytes(review(label, number + (100 if part == "test" else 0)).encode())
    return folder


def document(number: int) -> str:
    """A document whose letters depend on its number, with quotes that a CSV reader changes."""
    return f'"Paper {number}" says "{chr(97 + number % 26) * 20} and so on'


def aan(root: Path) -> Path:
    """Write the release's `tsv_data` below `root`; documents of label 1 have the same letter."""
    folder = Path(root) / "lra_release" / "lra_release" / "tsv_data"
    folder.mkdir(parents=True)
    first = 0
    for part, count in PAIRS.items():
        with open(folder / f"new_aan_pairs.{part}.tsv", "w", encoding="utf-8", newline="") as file:
            for row in range(first, first + count):
                label = row % 2
                one, other = 3 * row, 3 * row + (26 if label else 13)
                file.write(f"{label:.1f}\tP{one}\tP{other}\t{document(one)}\t{document(other)}\n")
        first += count
    return folder
