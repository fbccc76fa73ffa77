"""Which two dots lie on the same dashed line? Pathfinder pictures, drawn from a seed.

Source of the algorithm and of all numbers: drewlinsley/pathfinder (`snakes2.py`; Linsley et al. 2018, arXiv 1805.08315),
whose pictures the Long Range Arena took. Two target snakes grow, segment by segment, from tails near the middle; shorter
distractors fill what is left; a dot marks a tail and a far end, of one target (label 1) or of both (label 0).

What is ours is the order of the work. The original redraws whole pictures for each segment. But a heading is one of few
(360 whole degrees at a tail, about 40 pixels of a circle afterwards), so all stencils are drawn once (`_kit`), and a
segment is a handful of table rows. And most attempts at two targets die young (1 in 27 lives at size 32, 1 in 290 at
128), so hundreds, of many pictures, grow in step in NumPy: each is a `lane` of two small pictures. A picture keeps its
first attempt that lives, so the number of lanes changes nothing but the speed.

Habits of the original that shape its pictures, and that we keep: a tail's orientation counts only where its stencil has
a pixel in all four quadrants (OpenCV's dilation would otherwise see beyond the border, and the search is given up; at
size 32 that refuses 330 of 360 degrees, and thereby most distractors); the room that a tail needs is looked for one
pixel down and to the right of it; the last segment of the first target is never occupied; and coordinates are rounded
up after the sum, so that near 0 the rounding errors of floats move segments. With the same random numbers, targets grow
as they do there, pixel by pixel. One habit is left out: it stops adding distractors when less than 1 % of the picture is
free, which no setting here can reach.

The random stream: picture i of a seed draws from Philox with the 128-bit key (seed, i), whose raw stream NumPy
guarantees; each 64-bit word is two 32-bit words, the low half first. The picture's own words come first (label, margin,
marked snake), then those of all distractors, tried or not, then attempt after attempt at the targets, each of a fixed
number of words. What is drawn from them is integer arithmetic.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import joblib
import numpy as np
from jaxtyping import Bool, Float64, Int, UInt8, UInt32
from PIL import Image, ImageDraw
from scipy.ndimage import grey_dilation

from lra.errors import ConfigError

LEVELS = {"easy": 6, "intermediate": 9, "hard": 14}  # segments of a target snake
SCALE = 2  # strokes and dots are drawn so much larger, then reduced with Lanczos
SEGMENT_TRIALS, SNAKE_TRIALS = 3, 5
OVERLAP = 459  # two stencils collide where their grey levels (0..255) add up to 1.8 x 255
OCCUPIED = 77  # a tail's stencil may cover grey levels below 0.3 x 255
WEIGHT_ONE = 2**16  # probabilities in integers: 255 x 2^16 x 50 candidates is below 2^31
DEAD_END = int(1e-4 * 255 * WEIGHT_ONE)  # a snake with less than this to choose from is stuck
DEGREES = 360  # headings 0..359 are those of tails, in degrees; the rest are candidates

PICTURE_WORDS = 4
TAIL_WORDS = 6  # heading, row, column, direction, heading of two targets (one unused); 3 x heading, place of others
BATCH = 256  # pictures that share lanes
LANE_BYTES = 2**23  # of all lanes


class Setting(NamedTuple):
    """What a size and a level mean; lengths in pixels, `contour_length` and `distractor_length` in segments."""

    size: int
    margins: tuple[int, ...]  # free pixels between segments; each picture draws one
    padding: int
    paddle_length: int
    marker_radius: float
    paddle_thickness: float
    seed_distance: int
    continuity: float
    distractor_segments: int  # of all distractors together
    snake_contrast: float
    paddle_contrast: float
    contour_length: int = 0
    contrasts: int = 1  # the number of different paddle contrasts

    @property
    def distractor_length(self) -> int:
        return self.contour_length // 3

    @property
    def distractors(self) -> int:
        return self.distractor_segments // self.distractor_length


_SETTINGS = {
    row.size: row
    for row in (
        Setting(32, (1,), 1, 2, 1.5, 0.5, 7, 1.0, 20, 2.0, 0.75),
        Setting(64, (1,), 1, 5, 2.5, 1.0, 12, 1.8, 22, 0.8, 1.0),
        Setting(128, (2, 3), 1, 5, 3.0, 1.5, 20, 1.8, 35, 0.9, 1.0),
        Setting(256, (3,), 22, 5, 5.0, 2.0, 27, 1.8, 30, 1.0, 1.0),
    )
}


def settings(size: int, level: str) -> Setting:
    """Raises ConfigError on a size or a level that is not in the table."""
    if size not in _SETTINGS:
        raise ConfigError(f"size={size}; expected one of {', '.join(map(str, _SETTINGS))}")
    if level not in LEVELS:
        raise ConfigError(f"level={level}; expected one of {', '.join(LEVELS)}")
    return _SETTINGS[size]._replace(contour_length=LEVELS[level])


# --- Stencils ------------------------------------------------------------------------------------------------------


class Stencils(NamedTuple):
    """One small picture a heading, as its pixels that count: row h of each has the same length, the last repeated."""

    at: Int[np.ndarray, "H F"]  # places relative to the anchor
    grey: UInt8[np.ndarray, "H F"]


class Kit(NamedTuple):
    """All that depends on setting and margin alone.

    Places are indices into a flattened picture with a rim, wide enough that no stencil leaves it. A heading is an index:
    tails have `DEGREES`, and `DEGREES + k` goes to candidate k. A tail's stencils are anchored at the tail, those of a
    candidate at the new head, from where the stroke goes backwards.
    """

    setting: Setting
    margin: int
    rim: int
    stride: int
    candidates: Int[np.ndarray, " K"]  # where the next head may be, relative to the pivot
    weights: Int[np.ndarray, "H K"]  # chance of each candidate after each heading, in 1/WEIGHT_ONE
    angles: Float64[np.ndarray, " H"]
    backwards: Float64[np.ndarray, " H"]
    tail_room: list[
        Int[np.ndarray, " F"] | None
    ]  # pixels that have to be free around a tail; None: never a tail
    first: Int[
        np.ndarray, "T 5"
    ]  # tails of the first target: heading, top row, rows, left column, columns
    stroke: UInt8[np.ndarray, "H S S"]  # ink of a segment
    body: Stencils  # what a segment occupies
    core: Stencils  # the part of it that can collide; its grey is the least that it collides with
    halo: Stencils  # body, dilated by the margin: where no head may be
    mask: UInt8[np.ndarray, " P"]  # a picture without segments: what is occupied,
    wide: UInt8[np.ndarray, " P"]  # and where no head may be
    outside: Bool[np.ndarray, " P"]  # the rim

    def place(self, pixels):
        """Rows and columns (..., 2) -> places."""
        return (pixels[..., 0] + self.rim) * self.stride + pixels[..., 1] + self.rim

    def pixels(self, places):
        return np.stack(np.divmod(places, self.stride), axis=-1) - self.rim


@functools.cache
def _kit(setting: Setting, margin: int) -> Kit:
    size, reach = setting.size, setting.paddle_length + margin
    half = reach + int(np.ceil(setting.paddle_thickness))  # stencils are 2 half + 1 wide
    rim = half + 2 * margin + 2  # a pivot leaves the picture by less than margin + 2
    stride = size + 2 * rim

    arc = np.arange(0, 360, 360 / (2 * np.pi * reach)) * np.pi / 180  # a pixel apart
    circle = np.unique(np.floor(_offset(arc, reach)).astype(int), axis=0)
    angles = np.concatenate(
        [np.arange(-180, 180) * np.pi / 180, np.arctan2(circle[:, 0], circle[:, 1])]
    )
    turns = np.abs(angles[:, None] - angles[DEGREES:])
    turns = np.minimum(np.minimum(turns, 2 * np.pi - turns) * setting.continuity, np.pi / 2)

    backwards = np.where(angles < 0, angles + np.pi, angles - np.pi)
    drawn = [
        _stencil(angle, setting, margin) for angle in (*angles[:DEGREES], *backwards[DEGREES:])
    ]
    strokes, bodies = (np.stack(part) for part in zip(*drawn, strict=True))
    grown = np.pad(bodies, ((0, 0), (margin, margin), (margin, margin)))
    halos = grey_dilation(grown, footprint=_disc(margin)[None], mode="constant")
    body = _stencils(bodies, 1, stride)
    at, grey = _stencils(bodies[DEGREES:], OVERLAP - 255, stride)
    core = Stencils(at, (OVERLAP - grey.astype(int)).astype(np.uint8))

    mask = np.full((size, size), 255, np.uint8)
    wide = mask.copy()
    mask[setting.padding : -setting.padding, setting.padding : -setting.padding] = 0
    edge = setting.padding + margin
    wide[edge:-edge, edge:-edge] = 0

    rooms = [_room(window, half, reach) for window in bodies[:DEGREES]]
    return Kit(
        setting,
        margin,
        rim,
        stride,
        candidates=circle @ [stride, 1],
        weights=np.rint(np.cos(turns) ** 2 * WEIGHT_ONE).astype(np.int32),
        angles=angles,
        backwards=backwards,
        tail_room=[None if room is None else room @ [stride, 1] for room in rooms],
        first=_first_tails(rooms, size, 2 * setting.seed_distance),
        stroke=strokes,
        body=body,
        core=core,
        halo=_stencils(halos, 1, stride),
        mask=np.pad(mask, rim).ravel(),
        wide=np.pad(wide, rim, constant_values=255).ravel(),
        outside=np.pad(np.zeros((size, size), bool), rim, constant_values=True).ravel(),
    )


def _offset(angles, distance):
    return np.stack([distance * np.sin(angles), distance * np.cos(angles)], axis=-1)


def _moved(origin, angles, distance):
    """Rows and columns after a move."""
    # the sum is rounded up, as in the original: sin(pi), not quite 0, moves a pixel that is near 0, but no other
    return np.ceil(origin + _offset(angles, distance)).astype(int)


def _disc(radius):
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return y**2 + x**2 <= radius**2


def _stencil(angle, setting, margin):
    """Ink and body of one segment from the middle of a small picture in the direction of `angle`."""
    half = setting.paddle_length + int(np.ceil(setting.paddle_thickness)) + margin
    large = Image.new("L", (2 * half * SCALE + 1,) * 2)
    middle = half * SCALE
    row, column = _moved(middle, angle, setting.paddle_length * SCALE)
    line = [(middle, middle), (int(column), int(row))]
    ImageDraw.Draw(large).line(line, fill=255, width=round(setting.paddle_thickness * SCALE))
    body = grey_dilation(np.asarray(large), footprint=_disc(margin * SCALE), mode="constant")
    return _reduce(large, 2 * half + 1), _reduce(Image.fromarray(body), 2 * half + 1)


def _reduce(large, size):
    return np.asarray(large.resize((size, size), Image.Resampling.LANCZOS))


def _stencils(windows, least, stride):
    """The pixels of at least that grey level, as places relative to the middle."""
    half = windows.shape[-1] // 2
    found = [np.nonzero(window >= least) for window in windows]
    longest = max(len(rows) for rows, _ in found)
    at, grey = [], []
    for window, (rows, columns) in zip(windows, found, strict=True):
        fill = (0, longest - len(rows))
        at.append(np.pad((rows - half) * stride + columns - half, fill, mode="edge"))
        grey.append(np.pad(window[rows, columns], fill, mode="edge"))
    return Stencils(np.stack(at), np.stack(grey))


def _room(body, half, reach):
    """Offsets of the pixels that have to be free around a tail, or None for a heading that the original gives up."""
    offsets = np.argwhere(body == 255) - half + 1
    offsets = offsets[(np.abs(offsets) <= reach).all(axis=1)]
    quadrants = [
        (offsets * signs >= 0).all(axis=1).any() for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1))
    ]
    return offsets if all(quadrants) else None


def _first_tails(rooms, size, border):
    """Where the first tail may be for each heading: rows and columns whose stencil keeps `border` from the edge."""
    tails = []
    for heading, room in enumerate(rooms):
        if room is not None:
            corner = border - room.min(axis=0)
            extent = size - border - room.max(axis=0) - corner
            if (extent > 0).all():
                tails.append((heading, corner[0], extent[0], corner[1], extent[1]))
    return np.array(tails)


@functools.cache
def _dot(radius: float, row: int, column: int, size: int) -> UInt8[np.ndarray, "S S"]:
    """A marker of `radius` in the middle of pixel (row, column) of a picture of `size`."""
    y, x = np.ogrid[: size * SCALE, : size * SCALE]
    disc = (y - row * SCALE) ** 2 + (x - column * SCALE) ** 2 <= (radius * SCALE) ** 2
    return _reduce(Image.fromarray(disc.astype(np.uint8) * np.uint8(255)), size)


# --- Growth --------------------------------------------------------------------------------------------------------


class Lanes(NamedTuple):
    """Pictures in the making: what is occupied, and where no head may be."""

    mask: UInt8[np.ndarray, "N P"]
    wide: UInt8[np.ndarray, "N P"]


class Ends(NamedTuple):
    """The newest segment of a snake in each lane, which occupies nothing yet."""

    heading: Int[np.ndarray, " N"]
    anchor: Int[np.ndarray, " N"]  # of its stencils: the tail, later the head
    pivot: Int[np.ndarray, "N 2"]  # row and column of the middle of the circle that the head is on

    def take(self, which) -> "Ends":
        return Ends(*(part[which] for part in self))


def _start(kit: Kit, heading, tail) -> Ends:
    return Ends(heading, kit.place(tail), _tail_pivot(kit, heading, tail)[1])


def _tail_pivot(kit: Kit, heading, tail):
    """End of the stroke that starts at the pixels `tail`, and the pivot that would have led to it."""
    head = _moved(tail, kit.angles[heading], kit.setting.paddle_length)
    return head, _moved(head, kit.backwards[heading], kit.setting.paddle_length + kit.margin)


def _occupy(kit: Kit, pictures: Lanes, lanes, ends: Ends) -> None:
    """Add a segment to what is occupied."""
    for picture, stencils in ((pictures.mask, kit.body), (pictures.wide, kit.halo)):
        flat = picture.reshape(-1)
        at = (lanes * picture.shape[1] + ends.anchor)[:, None] + stencils.at.take(
            ends.heading, axis=0
        )
        flat[at] = np.maximum(flat.take(at), stencils.grey.take(ends.heading, axis=0))


def _extend(
    kit: Kit, pictures: Lanes, lanes, ends: Ends, words
) -> tuple[Bool[np.ndarray, " N"], Ends]:
    """Grow a snake by a segment in each of `lanes`; where that succeeds, its last segment is occupied from now on.

    The next head is drawn among the candidates on a circle around the new pivot: the freer and the straighter, the
    likelier. Up to `SEGMENT_TRIALS` are drawn until one does not collide.

    Args:
        words: 32-bit random numbers (N, SEGMENT_TRIALS).
    Returns:
        which lanes succeeded, and the new ends of these.
    """
    area = pictures.mask.shape[1]
    first = lanes * area
    pivot = _moved(ends.pivot, kit.angles[ends.heading], kit.setting.paddle_length + 2 * kit.margin)
    heads = kit.place(pivot)[:, None] + kit.candidates
    closed = pictures.wide.reshape(-1).take(first[:, None] + heads)
    reached = np.cumsum(
        (255 - closed) * kit.weights.take(ends.heading, axis=0), axis=1, dtype=np.int32
    )
    total = reached[:, -1].astype(np.int64)

    chosen = np.full(len(lanes), -1)
    trying = np.flatnonzero(total >= DEAD_END)
    for trial in range(SEGMENT_TRIALS):
        drawn = _scale(words[trying, trial], total[trying])
        choice = (reached[trying] <= drawn[:, None]).sum(axis=1)
        at = (first[trying] + heads[trying, choice])[:, None] + kit.core.at.take(choice, axis=0)
        collides = (pictures.mask.reshape(-1).take(at) >= kit.core.grey.take(choice, axis=0)).any(
            axis=1
        )
        chosen[trying[~collides]] = choice[~collides]
        trying = trying[collides]

    grown = chosen >= 0
    _occupy(kit, pictures, lanes[grown], ends.take(grown))
    choice = chosen[grown]
    return grown, Ends(DEGREES + choice, heads[grown, choice], pivot[grown])


def _scale(words: np.ndarray | np.uint32, span: np.ndarray | int):
    """32-bit words -> 0..span-1, span < 2^31."""
    return (words.astype(np.int64) * span) >> 32


def _words(bits: np.random.Philox, count: int) -> UInt32[np.ndarray, " M"]:
    raw = bits.random_raw((count + 1) // 2)
    return raw.astype("<u8", copy=False).view("<u4")[:count].astype(np.uint32, copy=False)


# --- Pictures ------------------------------------------------------------------------------------------------------


class Snakes(NamedTuple):
    """Segments of S whole snakes in each of N pictures, by the heading and the anchor of their stencils."""

    heading: Int[np.ndarray, "N S L"]
    anchor: Int[np.ndarray, "N S L"]  # 0 where there is no snake


def _no_snakes(pictures: int, snakes: int, length: int) -> Snakes:
    return Snakes(
        np.zeros((pictures, snakes, length), int), np.zeros((pictures, snakes, length), int)
    )


def _grow(
    kit: Kit, pictures: Lanes, ends: list[Ends], words
) -> tuple[Int[np.ndarray, " M"], Snakes]:
    """Grow one or two snakes in each lane to their full length, in turn.

    The last segment is occupied only of the last snake: so does the original.

    Args:
        words: 32-bit random numbers (N, L - 1, snakes, SEGMENT_TRIALS).
    Returns:
        the lanes that succeeded, in order, and their snakes.
    """
    count, steps, turns, _ = words.shape
    snakes = _no_snakes(count, turns, steps + 1)
    lanes = np.arange(count)
    for turn, end in enumerate(ends):
        snakes.heading[:, turn, 0], snakes.anchor[:, turn, 0], _ = end
    for step in range(steps):
        for turn in range(turns):
            grown, end = _extend(kit, pictures, lanes, ends[turn], words[lanes, step, turn])
            lanes = lanes[grown]
            ends = [end if i == turn else other.take(grown) for i, other in enumerate(ends)]
            snakes.heading[lanes, turn, step + 1], snakes.anchor[lanes, turn, step + 1], _ = end
    _occupy(kit, pictures, lanes, ends[-1])
    return lanes, Snakes(snakes.heading[lanes], snakes.anchor[lanes])


def _targets(kit: Kit, streams: list[np.random.Philox]) -> tuple[Snakes, Lanes]:
    """Two targets for each picture and what they occupy: the first attempt of its stream that succeeds."""
    length, area = kit.setting.contour_length, len(kit.mask)
    words_per_attempt = TAIL_WORDS + (length - 1) * 2 * SEGMENT_TRIALS
    snakes = _no_snakes(len(streams), 2, length)
    pictures = _blank(kit, len(streams))
    todo = np.arange(len(streams))
    while len(todo):
        attempts = max(1, LANE_BYTES // (2 * area * len(todo)))
        words = np.concatenate([_words(streams[i], attempts * words_per_attempt) for i in todo])
        words = words.reshape(len(todo) * attempts, words_per_attempt)
        occupied = _blank(kit, len(words))
        growth = words[:, TAIL_WORDS:].reshape(len(words), length - 1, 2, SEGMENT_TRIALS)
        lanes, grown = _grow(kit, occupied, _target_tails(kit, words[:, :TAIL_WORDS]), growth)
        done, first = np.unique(lanes // attempts, return_index=True)
        _put(snakes, todo[done], grown, first)
        _put(pictures, todo[done], occupied, lanes[first])
        todo = np.delete(todo, done)
    return snakes, pictures


def _blank(kit: Kit, count: int) -> Lanes:
    shape = count, len(kit.mask)
    return Lanes(np.broadcast_to(kit.mask, shape).copy(), np.broadcast_to(kit.wide, shape).copy())


def _put(to: tuple, where, other: tuple, which) -> None:
    for target, source in zip(to, other, strict=True):
        target[where] = source[which]


def _target_tails(kit: Kit, words: UInt32[np.ndarray, "N W"]) -> list[Ends]:
    """The first tail near the middle, the second at the seed distance from it: never near the border."""
    heading, row, rows, column, columns = kit.first[_scale(words[:, 0], len(kit.first))].T
    first = np.stack(
        [row + _scale(words[:, 1], rows), column + _scale(words[:, 2], columns)], axis=-1
    )
    direction = _scale(words[:, 3], DEGREES) * np.pi / 180
    second = np.rint(first + _offset(direction, kit.setting.seed_distance)).astype(int)
    return [_start(kit, heading, first), _start(kit, _scale(words[:, 4], DEGREES), second)]


def _distractors(kit: Kit, pictures: Lanes, words: UInt32[np.ndarray, "N S trials W"]) -> Snakes:
    """Add shorter snakes wherever they fit; each has `SNAKE_TRIALS` trials, then it is left out."""
    count, number, trials, _ = words.shape
    length = kit.setting.distractor_length
    snakes = _no_snakes(count, number, length)
    for snake in range(number):
        todo = np.arange(count)
        for trial in range(trials):
            tails = [_tail(kit, pictures.mask[i], words[i, snake, trial]) for i in todo]
            started = np.array([tail is not None for tail in tails], bool)
            which = todo[started]
            if not len(which):
                continue
            heading, place = np.array([tail for tail in tails if tail is not None]).T
            tried = Lanes(pictures.mask[which], pictures.wide[which])
            growth = words[which, snake, trial, TAIL_WORDS:].reshape(
                len(which), length - 1, 1, SEGMENT_TRIALS
            )
            lanes, grown = _grow(kit, tried, [_start(kit, heading, kit.pixels(place))], growth)
            snakes.heading[which[lanes], snake] = grown.heading[:, 0]
            snakes.anchor[which[lanes], snake] = grown.anchor[:, 0]
            _put(pictures, which[lanes], tried, lanes)
            todo = np.setdiff1d(todo, which[lanes])
    return snakes


def _tail(
    kit: Kit, mask: UInt8[np.ndarray, " P"], words: UInt32[np.ndarray, " W"]
) -> tuple[int, int] | None:
    """Heading and place of a distractor's tail, uniform over the free places, or None where there is none."""
    inner = slice(kit.rim * (kit.stride + 1), -kit.rim * (kit.stride + 1))  # first to last pixel
    occupied = (mask >= OCCUPIED) & ~kit.outside
    for trial in range(SEGMENT_TRIALS):
        heading = int(_scale(words[2 * trial], DEGREES))
        room = kit.tail_room[heading]
        if room is None:
            return None
        closed = kit.outside[inner].copy()
        for offset in room:
            closed |= occupied[inner.start + offset : len(occupied) + inner.stop + offset]
        free = np.flatnonzero(~closed)
        if not len(free):
            return None
        place = int(free[_scale(words[2 * trial + 1], len(free))]) + inner.start
        ends = np.stack(_tail_pivot(kit, heading, kit.pixels(place)))
        if (ends >= 0).all() and (ends < kit.setting.size).all():
            return heading, place
    return None


def _paint(
    kit: Kit, targets: Snakes, distractors: Snakes, i: int, dots: list[int]
) -> UInt8[np.ndarray, "S S"]:
    """Picture i of a batch: all by maximum, the brightest 255."""
    setting = kit.setting
    picture = np.zeros((setting.size, setting.size))
    contrasts = setting.paddle_contrast * setting.snake_contrast, setting.snake_contrast
    for snakes, contrast in zip((targets, distractors), contrasts, strict=True):
        grey = (np.arange(256) / 255 * contrast).astype(
            np.float32
        )  # float32 as in the original: it decides ties
        picture = np.maximum(picture, grey[_ink(kit, snakes.heading[i], snakes.anchor[i])])
    reach = int(np.ceil(setting.marker_radius)) + 4  # with the three pixels of Lanczos
    width = 2 * reach + 1
    for place in dots:
        # only a near border bears on the dot: a small picture with the same one will do
        centre = kit.pixels(place)
        near = np.maximum(np.minimum(centre, reach), centre - (setting.size - width))
        row, column = centre - near
        window = picture[row : row + width, column : column + width]
        np.maximum(
            window, _dot(setting.marker_radius, int(near[0]), int(near[1]), width) / 255, out=window
        )
    return (picture * (255 / picture.max()) + 0.4999).astype(
        np.uint8
    )  # 0.4999: rounding of the original


def _ink(kit: Kit, heading, anchor) -> UInt8[np.ndarray, "S S"]:
    half = kit.stroke.shape[1] // 2
    ink = np.zeros((kit.stride, kit.stride), np.uint8)
    drawn = anchor > 0
    for stroke, place in zip(heading[drawn].tolist(), anchor[drawn].tolist(), strict=True):
        row, column = divmod(place, kit.stride)
        window = ink[row - half : row + half + 1, column - half : column + half + 1]
        np.maximum(window, kit.stroke[stroke], out=window)
    return ink[kit.rim : -kit.rim, kit.rim : -kit.rim]


# --- What others call ----------------------------------------------------------------------------------------------


def draw(
    first: int, last: int, size: int, level: str, seed: int
) -> tuple[UInt8[np.ndarray, "n S S"], UInt8[np.ndarray, " n"]]:
    """Pictures first..last-1 and their labels, in this process. Raises ConfigError on a bad size, level or seed."""
    setting = settings(size, level)
    _check(seed, last - first)
    images, labels = (
        np.zeros((last - first, size, size), np.uint8),
        np.zeros(last - first, np.uint8),
    )
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        streams = [
            np.random.Philox(key=np.array([seed, first + i], np.uint64))
            for i in range(len(labels))[part]
        ]
        images[part], labels[part] = _draw_batch(setting, streams)
    return images, labels


def _draw_batch(setting: Setting, streams: list[np.random.Philox]):
    per_trial = TAIL_WORDS + (setting.distractor_length - 1) * SEGMENT_TRIALS
    shape = (setting.distractors, SNAKE_TRIALS, per_trial)
    words = np.stack([_words(bits, PICTURE_WORDS + int(np.prod(shape))) for bits in streams])
    labels, margins, origins = (
        _scale(words[:, i], span) for i, span in enumerate((2, len(setting.margins), 2))
    )
    images = np.zeros((len(streams), setting.size, setting.size), np.uint8)
    for choice, margin in enumerate(setting.margins):
        which = np.flatnonzero(margins == choice)
        kit = _kit(setting, margin)
        targets, pictures = _targets(kit, [streams[i] for i in which])
        distractors = _distractors(kit, pictures, words[which, PICTURE_WORDS:].reshape(-1, *shape))
        for i, picture in enumerate(which):
            origin, end = origins[picture], origins[picture] ^ 1 ^ labels[picture]
            dots = [int(targets.anchor[i, origin, 0]), int(targets.anchor[i, end, -1])]
            images[picture] = _paint(kit, targets, distractors, i, dots)
    return images, labels.astype(np.uint8)


def generate_chunks(
    n: int,
    size: int = 32,
    level: str = "hard",
    seed: int = 0,
    *,
    chunk: int | None = None,
    workers: int | None = None,
) -> Iterator[tuple[UInt8[np.ndarray, "n S S"], UInt8[np.ndarray, " n"]]]:
    """Pictures 0..n-1 and their labels, `chunk` at a time and in order, drawn by several processes.

    Args:
        chunk: pictures of one job; a few seconds of work by default.
        workers: processes; None for one a core, 1 for none but this one.
    """
    settings(size, level)
    _check(seed, n)
    chunk = chunk or 2**21 // size**2
    jobs = [(first, min(first + chunk, n), size, level, seed) for first in range(0, n, chunk)]
    workers = min(workers or joblib.cpu_count(), len(jobs))
    if workers <= 1:
        return itertools.starmap(draw, jobs)
    return _draw_in_parallel(jobs, workers)


def _draw_in_parallel(jobs: list[tuple], workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    parts = joblib.Parallel(n_jobs=workers, return_as="generator")(
        joblib.delayed(draw)(*job) for job in jobs
    )
    try:
        for part in parts:  # noqa: UP028 -- `yield from` would close `parts` outside of what follows
            yield part
    finally:
        with warnings.catch_warnings():
            # joblib warns a consumer that stops early, which is its good right
            warnings.filterwarnings(
                "ignore", message=r"\d+ tasks .* have been cancelled", category=UserWarning
            )
            parts.close()


def generate(
    n: int,
    size: int = 32,
    level: str = "hard",
    seed: int = 0,
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[UInt8[np.ndarray, "n S S"], UInt8[np.ndarray, " n"]]:
    """Pictures 0..n-1 and their labels (1: both dots on one snake); picture i depends on size, level, seed and i alone.

    Args:
        size: 32, 64, 128 or 256 pixels.
        level: a name in `LEVELS`.
        on_progress: called with the pictures done and n.
    Raises:
        ConfigError: a size or a level that is not offered, a seed that is no 64-bit key, or n < 0.
    """
    chunks = generate_chunks(n, size, level, seed, workers=workers)
    images, labels = np.zeros((n, size, size), np.uint8), np.zeros(n, np.uint8)
    done = 0
    for some_images, some_labels in chunks:
        part = slice(done, done + len(some_labels))
        images[part], labels[part] = some_images, some_labels
        done = part.stop
        if on_progress:
            on_progress(done, n)
    return images, labels


def _check(seed: int, n: int) -> None:
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed={seed} is outside 0..2^64-1")
    if n < 0:
        raise ConfigError(f"n={n}; expected a number of pictures, 0 or more")
