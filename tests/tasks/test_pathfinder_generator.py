"""Pathfinder pictures against a loop over whole pictures and the original program's pictures."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.ndimage import grey_dilation, label

from lra.tasks import pathfinder_generator
from lra.tasks.pathfinder_generator import (
    CONTOUR_TRIALS,
    SEGMENT_TRIALS,
    draw,
    settings,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def upstream(size):
    with np.load(GOLDEN / f"pathfinder_upstream_{size}.npz") as file:
        return file["images"]


# --- The stream ---


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_pictures_do_not_depend_on_batches_or_lanes(monkeypatch):
    whole = draw(0, 12, 32, "hard", 7)
    assert same(draw(5, 9, 32, "hard", 7), [part[5:9] for part in whole])
    monkeypatch.setattr(pathfinder_generator, "LANE_BYTES", 2**17)
    monkeypatch.setattr(pathfinder_generator, "BATCH", 5)
    assert same(draw(0, 12, 32, "hard", 7), whole)


def test_seeds_and_pictures_differ():
    pictures = [
        image.tobytes() for seed in (0, 1, 2**64 - 1) for image in draw(0, 10, 32, "hard", seed)[0]
    ]
    assert len(set(pictures)) == 30


def test_pictures_are_the_same_on_every_machine():
    """Golden: if it changes, increase the task's `reader_version`; Pillow may change it too."""
    digest = hashlib.sha256(
        b"".join(draw(0, 8, size, "easy", 0)[0].tobytes() for size in (32, 128))
    ).hexdigest()
    assert digest[:16] == "5e257aafd295b0ad"


# --- Growth, by a loop over whole pictures ---


class Loop:
    """The same rules, slowly: each segment is drawn anew, each mask is a whole float picture."""

    def __init__(self, setting, margin):
        self.setting, self.margin = setting, margin
        self.half = setting.paddle_length + margin + int(np.ceil(setting.paddle_thickness))
        self.mask = np.ones((setting.size, setting.size))
        self.mask[setting.padding : -setting.padding, setting.padding : -setting.padding] = 0

    def disc(self, radius):
        return np.array(
            [
                [y * y + x * x <= radius**2 for x in range(-radius, radius + 1)]
                for y in range(-radius, radius + 1)
            ]
        )

    def moved(self, pixel, angle, distance):
        return tuple(
            int(np.ceil(at + distance * go))
            for at, go in zip(pixel, (np.sin(angle), np.cos(angle)), strict=True)
        )

    def segment(self, angle):
        large = Image.new("L", (4 * self.half + 1,) * 2)
        middle = (2 * self.half, 2 * self.half)
        end = self.moved(middle, angle, 2 * self.setting.paddle_length)
        ImageDraw.Draw(large).line(
            [middle, end[::-1]], fill=255, width=int(2 * self.setting.paddle_thickness)
        )
        body = grey_dilation(
            np.asarray(large), footprint=self.disc(2 * self.margin), mode="constant"
        )
        small = Image.fromarray(body).resize((2 * self.half + 1,) * 2, Image.Resampling.LANCZOS)
        return np.asarray(small) / 255

    def placed(self, pixel, angle):
        body, picture = self.segment(angle), np.zeros_like(self.mask)
        for (i, j), grey in np.ndenumerate(body):
            y, x = pixel[0] + i - self.half, pixel[1] + j - self.half
            if 0 <= y < len(picture) and 0 <= x < len(picture):
                picture[y, x] = grey
        return picture

    def flipped(self, angle):
        return angle + np.pi if angle < 0 else angle - np.pi

    def tail(self, pixel, degrees):
        angle = degrees * np.pi / 180
        head = self.moved(pixel, angle, self.setting.paddle_length)
        pivot = self.moved(head, self.flipped(angle), self.setting.paddle_length + self.margin)
        return head, (angle, pivot, self.placed(pixel, angle))

    def extend(self, end, words):
        """The head and the new end; None if the contour is stuck."""
        angle, pivot, body = end
        length, margin = self.setting.paddle_length, self.margin
        pivot = self.moved(pivot, angle, length + 2 * margin)
        wide = grey_dilation(self.mask, footprint=self.disc(margin), mode="constant")
        weights = {}
        for k in range(int(np.ceil(2 * np.pi * (length + margin)))):
            y, x = (
                int(np.floor(p + (length + margin) * f(k / (length + margin))))
                for p, f in zip(pivot, (np.sin, np.cos), strict=True)
            )
            if 0 <= y < len(wide) and 0 <= x < len(wide):
                turn = abs(np.arctan2(y - pivot[0], x - pivot[1]) - angle)
                turn = min(min(turn, 2 * np.pi - turn) * self.setting.continuity, np.pi / 2)
                weights[y, x] = (1 - wide[y, x]) * np.cos(turn) ** 2
        if sum(weights.values()) < 1e-4:
            return None
        reached = np.cumsum([weights[head] for head in sorted(weights)])
        for word in words:
            head = sorted(weights)[int(np.argmax(reached > word / 2**32 * reached[-1]))]
            angle = np.arctan2(head[0] - pivot[0], head[1] - pivot[1])
            new = self.placed(head, self.flipped(angle))
            if (self.mask + new).max() < 1.8 - 1e-9:
                self.mask = np.maximum(self.mask, body)
                return head, (angle, pivot, new)
        return None

    def free_tails(self, degrees):
        """Free places for a tail; none at all if the stencil crosses the border at some place."""
        reach, size = self.setting.paddle_length + self.margin, self.setting.size
        full = np.argwhere(self.segment(degrees * np.pi / 180) == 1) - self.half + 1
        full = [(y, x) for y, x in full.tolist() if max(abs(y), abs(x)) <= reach]
        free = []
        for row in range(size):
            for column in range(size):
                seen = [
                    self.mask[row + y, column + x]
                    for y, x in full
                    if 0 <= row + y < size and 0 <= column + x < size
                ]
                if not seen:
                    return []
                if max(seen) <= 0.3:
                    free.append((row, column))
        return free


def pixels(tables, places):
    return [tuple(pixel) for pixel in tables.pixels(places).tolist()]


@pytest.mark.parametrize(
    ("size", "margin", "lanes"), [(32, 1, 40), (64, 1, 6), (128, 2, 3), (128, 3, 3), (256, 3, 2)]
)
def test_targets_grow_as_in_the_loop(size, margin, lanes):
    """The same random words give the same heads and masks, until a contour is stuck."""
    tables = pathfinder_generator._tables(settings(size, "hard"), margin)
    words = np.random.default_rng(size).integers(
        2**32, size=(lanes, 6 + 13 * 2 * SEGMENT_TRIALS), dtype=np.uint32
    )
    pictures, tails = (
        np.tile(tables.blank, (lanes, 1, 1)),
        pathfinder_generator._target_tails(tables, words[:, :6]),
    )
    for lane in range(lanes):
        loop = Loop(tables.setting, margin)
        ends = [tail.take([lane]) for tail in tails]
        slow = [
            loop.tail(pixels(tables, end.anchor)[0], int(end.heading[0]) - 180)[1] for end in ends
        ]
        for step, part in enumerate(words[lane, 6:].reshape(-1, SEGMENT_TRIALS)):
            grown, end = pathfinder_generator._extend(
                tables, pictures, np.array([lane]), ends[step % 2], part[None]
            )
            expected = loop.extend(slow[step % 2], part)
            assert grown.tolist() == [expected is not None]
            if expected is None:
                break
            ends[step % 2], (head, slow[step % 2]) = end, expected
            assert pixels(tables, end.anchor) == [head]
        inner = pictures[lane, 0].reshape(tables.stride, -1)[
            tables.rim : -tables.rim, tables.rim : -tables.rim
        ]
        np.testing.assert_array_equal(inner, np.rint(loop.mask * 255))


def test_last_segment_of_the_first_target_is_not_occupied():
    """As in the original; all other segments are."""
    tables = pathfinder_generator._tables(settings(32, "easy"), 1)
    words = np.random.default_rng(0).integers(
        2**32, size=(60, 6 + 5 * 2 * SEGMENT_TRIALS), dtype=np.uint32
    )
    pictures, tails = (
        np.tile(tables.blank, (60, 1, 1)),
        pathfinder_generator._target_tails(tables, words[:, :6]),
    )
    lanes, targets = pathfinder_generator._grow(
        tables, pictures, tails, words[:, 6:].reshape(60, 5, 2, SEGMENT_TRIALS)
    )
    assert len(lanes) > 5
    for lane, contours in zip(lanes, targets, strict=True):
        mask, segments = tables.blank[0].copy(), contours.reshape(-1, 2)
        for heading, anchor in np.delete(segments, tables.setting.contour_length - 1, axis=0):
            at = anchor + tables.body.at[heading]
            mask[at] = np.maximum(mask[at], tables.body.grey[heading])
        np.testing.assert_array_equal(pictures[lane, 0], mask)


@pytest.mark.parametrize(("size", "level", "count"), [(32, "hard", 8), (64, "easy", 1)])
def test_distractors_grow_as_in_the_loop(size, level, count):
    setting = settings(size, level)
    tables = pathfinder_generator._tables(setting, setting.margins[0])
    shape = (
        count,
        setting.distractors,
        CONTOUR_TRIALS,
        6 + (setting.distractor_length - 1) * SEGMENT_TRIALS,
    )
    words = np.random.default_rng(0).integers(2**32, size=shape, dtype=np.uint32)
    words[:, :, ::2, 0] = 131 * 2**32 // 360 + 1  # a heading that size 32 does not refuse
    pictures = np.tile(tables.blank, (count, 1, 1))
    found = pathfinder_generator._distractors(tables, pictures, words)
    for picture in range(count):
        loop = Loop(setting, setting.margins[0])
        for contour in range(setting.distractors):
            expected = next(
                (track for part in words[picture, contour] if (track := distractor(loop, part))), []
            )
            drawn = found[picture, contour, :, 1]
            assert pixels(tables, drawn[drawn > 0]) == expected
    assert (found[..., 1] > 0).any()


def distractor(loop, words):
    """Tail and heads of one trial, or an empty list, which leaves the mask unchanged."""
    for place, spot in words[:6].reshape(3, 2).tolist():
        degrees = (place * 360 >> 32) - 180
        free = loop.free_tails(degrees)
        if not free:
            return []
        tail = free[spot * len(free) >> 32]
        head, end = loop.tail(tail, degrees)
        if all(0 <= at < loop.setting.size for at in (*head, *end[1])):
            break
    else:
        return []
    track, before = [tail], loop.mask
    for part in words[6:].reshape(-1, SEGMENT_TRIALS):
        extended = loop.extend(end, part)
        if extended is None:
            loop.mask = before
            return []
        head, end = extended
        track.append(head)
    loop.mask = np.maximum(loop.mask, end[2])
    return track


# --- Pictures ---


@pytest.mark.parametrize(
    ("size", "level", "n"),
    [(32, "hard", 30), (64, "easy", 12), (128, "intermediate", 8), (256, "easy", 6)],
)
def test_label_is_one_if_both_dots_are_on_one_contour(size, level, n, monkeypatch):
    seen, paint = {}, pathfinder_generator._paint

    def spy(tables, targets, distractors, i, dots):
        image = paint(tables, targets, distractors, i, dots)
        seen[image.tobytes()] = tables, targets[i, ..., 1], dots
        return image

    monkeypatch.setattr(pathfinder_generator, "_paint", spy)
    images, labels = draw(0, n, size, level, 1)
    for image, truth in zip(images, labels, strict=True):
        tables, targets, dots = seen[image.tobytes()]
        assert targets.shape == (2, pathfinder_generator.SEGMENTS[level])
        steps = np.linalg.norm(
            np.diff(tables.pixels(targets), axis=1), axis=-1
        )  # a chain: each head near the one before
        longest = tables.setting.paddle_length + 2 * tables.margin + 3
        assert (
            steps[:, 0].max() <= longest + tables.setting.paddle_length
        )  # the tail is the far end of its segment
        assert steps[:, 1:].max() <= longest
        (start,) = np.flatnonzero(targets[:, 0] == dots[0])
        ends = np.flatnonzero(
            targets[:, -1] == dots[1]
        )  # now and then both targets end in the same pixel
        assert (start if truth else 1 - start) in ends
        for row, column in pixels(tables, np.array(dots)):
            assert image[row, column] > 200
    assert 0 < labels.mean() < 1


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_dot_near_a_border_is_that_of_the_whole_picture(size):
    setting = settings(size, "easy")
    tables = pathfinder_generator._tables(setting, setting.margins[0])
    nothing = np.zeros((1, 1, 1, 2), int)
    y, x = np.ogrid[: 2 * size, : 2 * size]
    for pixel in [
        (2, 5),
        (size - 3, 3),
        (7, size - 2),
        (size // 2, size // 3),
        (size - 7, size - 8),
    ]:
        disc = (y - 2 * pixel[0]) ** 2 + (x - 2 * pixel[1]) ** 2 <= (2 * setting.marker_radius) ** 2
        whole = np.asarray(
            Image.fromarray(disc.astype(np.uint8) * 255).resize(
                (size, size), Image.Resampling.LANCZOS
            )
        )
        found = pathfinder_generator._paint(
            tables, nothing, nothing, 0, [int(tables.place(np.array(pixel)))]
        )
        np.testing.assert_array_equal(found, np.floor(whole / whole.max() * 255 + 0.4999))


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("level", pathfinder_generator.SEGMENTS)
def test_every_size_and_level(size, level):
    images, labels = draw(0, 3, size, level, 0)
    assert images.shape == (3, size, size)
    assert (images.max(axis=(1, 2)) == 255).all()
    assert (images.min(axis=(1, 2)) == 0).all()
    assert set(labels.tolist()) <= {0, 1}


def statistics(images):
    """Per picture: mean, spread, shares of zeros and bright pixels, contours, largest contour."""
    rows = []
    for image in images:
        contours, count = label(image > 60, np.ones((3, 3)))
        areas = np.bincount(contours.ravel())[1:]
        rows.append(
            (
                image.mean(),
                image.std(),
                (image == 0).mean(),
                (image > 245).mean(),
                count,
                areas.max(),
            )
        )
    return np.array(rows)


@pytest.mark.parametrize(("size", "n"), [(32, 600), (128, 40)])
def test_statistics_are_those_of_the_original(size, n):
    """Within four standard errors of the two samples."""
    golden = upstream(size)
    images, labels = draw(0, n, size, "hard", 2)
    ours, theirs = statistics(images), statistics(golden)
    error = np.sqrt(ours.var(axis=0) / len(ours) + theirs.var(axis=0) / len(theirs))
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 4 * error).all()
    assert abs(labels.mean() - 0.5) < 2 / np.sqrt(n)
    bins = [
        np.stack([np.bincount(x.ravel() // 16, minlength=16) for x in some])
        for some in (images, golden)
    ]
    error = np.sqrt(sum(some.var(axis=0) / len(some) for some in bins))
    assert (np.abs(bins[0].mean(axis=0) - bins[1].mean(axis=0)) <= 4.5 * error).all()
    # no grey level is common in one and absent in the other
    ours, theirs = (
        np.bincount(some.ravel(), minlength=256) / some.size for some in (images, golden)
    )
    assert ours[theirs == 0].max() < 2e-4
    assert theirs[ours == 0].max() < 2e-4


def simple_features(images):
    grey = images.reshape(len(images), -1) / 255
    levels = np.stack([np.bincount(image.ravel() // 8, minlength=32) for image in images])
    return np.column_stack(
        [
            levels,
            *(
                grey.mean(axis=1),
                grey.std(axis=1),
                (grey**4).mean(axis=1),
                (grey == 0).mean(axis=1),
            ),
        ]
    )


def patch_features(images, filters=96, width=7):
    """Means, maxima and powers of random filters: an untrained convolution with pooling."""
    weights = np.random.default_rng(0).normal(size=(width * width, filters))
    weights -= weights.mean(axis=0)
    rows = []
    for image in images / 255:
        patches = np.lib.stride_tricks.sliding_window_view(image, (width, width)).reshape(
            -1, width * width
        )
        found = patches @ weights
        rows.append(
            [*np.maximum(found - 1, 0).mean(axis=0), *found.max(axis=0), *(found**2).mean(axis=0)]
        )
    return np.sqrt(np.array(rows))


def area_under_curve(features, truth, folds=5):
    """Of a ridge classifier, over held-out folds."""
    features = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)
    fold = np.random.default_rng(0).permutation(len(features)) % folds
    areas = []
    for k in range(folds):
        known, held = features[fold != k], fold == k
        ridge = len(features) / 10 * np.eye(features.shape[1])
        scores = features[held] @ np.linalg.solve(
            known.T @ known + ridge, known.T @ (2 * truth[fold != k] - 1.0)
        )
        areas.append((scores[truth[held] == 1][:, None] > scores[truth[held] == 0]).mean())
    return np.mean(areas)


CLASSIFIERS = {"simple": simple_features, "patches": patch_features}


def told_apart(images, features):
    golden = upstream(32)
    truth = np.repeat([0, 1], [len(golden), len(images)])
    return area_under_curve(np.concatenate([features(golden), features(images)]), truth)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_cannot_tell_ours_from_the_original(name):
    """Chance is 0.5 with a standard error of 0.018."""
    assert told_apart(draw(0, 500, 32, "hard", 3)[0], CLASSIFIERS[name]) < 0.57


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("simple", {"marker_radius": 1.75}),
        ("simple", {"paddle_contrast": 0.8}),
        ("patches", {"marker_radius": 1.75}),
        ("patches", {"continuity": 1.2}),
    ],
)
def test_classifier_tells_a_wrong_generator(name, wrong, monkeypatch):
    monkeypatch.setitem(
        pathfinder_generator._SETTINGS, 32, pathfinder_generator._SETTINGS[32]._replace(**wrong)
    )
    assert told_apart(draw(0, 500, 32, "hard", 3)[0], CLASSIFIERS[name]) > 0.63
