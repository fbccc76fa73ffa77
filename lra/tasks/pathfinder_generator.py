"""Draws Pathfinder pictures from a seed.

Source of the algorithm and of all constants: drewlinsley/pathfinder (`snakes2.py`; Linsley et al.
2018, arXiv 1805.08315), which made the pictures of the Long Range Arena. Two target contours
("snakes" there) grow segment by segment from tails near the middle; shorter distractors fill the
rest. Dots mark a tail and a far end, of the same target (label 1) or of both targets (label 0).

The original redraws whole pictures for each segment. But there are few headings (360 whole degrees
at a tail, about 40 pixels of a circle afterwards), so `_tables` draws all stencils once. Most
attempts at two targets fail early (1 of 27 succeeds at size 32, 1 of 290 at 128), so NumPy grows
hundreds of attempts of many pictures in parallel, each in a `lane` of two small pictures. A picture
takes its first successful attempt, so the number of lanes affects speed only.

The properties of the original that shape its pictures are kept: a tail's orientation is valid only
if its stencil has a pixel in all four quadrants (otherwise OpenCV's dilation sees beyond the border
and the search fails; at size 32 that excludes 330 of 360 degrees, and so most distractors); the
free room for a tail is searched one pixel down and to the right of it; the last segment of the
first target is never marked as occupied; and coordinates are rounded up after the sum, so that near
0 rounding errors of floats move segments. With the same random numbers, targets grow as in the
original, pixel by pixel. The original also stops adding distractors if less than 1 % of the picture
is free, which no setting here can reach.

Random stream: picture i of a seed draws 32-bit words from `random_stream(seed, i)`. The picture's
own words come first (label, margin, marked contour), then those of all distractors, tried or not,
then one attempt at the targets after the other, each with a fixed number of words. Everything drawn
from them is integer arithmetic.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, UInt8, UInt32
from PIL import Image, ImageDraw
from scipy.ndimage import grey_dilation

from lra.errors import ConfigError
from lra.tasks.random_words import random_stream, words32

SEGMENTS = {"easy": 6, "intermediate": 9, "hard": 14}  # of a target contour, by level
SCALE = 2  # strokes and dots are drawn at this scale, then reduced with Lanczos
SEGMENT_TRIALS, CONTOUR_TRIALS = 3, 5
OVERLAP = 459  # stencils collide if their grey levels (0..255) add up to 1.8 x 255
OCCUPIED = 77  # a tail's stencil may cover grey levels below 0.3 x 255
WEIGHT_ONE = 2**16  # probabilities in integers: 255 x 2^16 x 50 candidates is below 2^31
DEAD_END = int(1e-4 * 255 * WEIGHT_ONE)  # a contour with less total weight is stuck
DEGREES = 360  # headings 0..359 are tails', in degrees; higher ones are candidates'

PICTURE_WORDS = 4
# two targets: heading, row, column, direction, heading, unused; a distractor: 3 x (heading, place)
TAIL_WORDS = 6
BATCH = 256  # pictures that share lanes
LANE_BYTES = 2**23  # of all lanes


class Setting(NamedTuple):
    """Constants of a size and a level, in pixels; `contour_length` is in segments."""

    size: int
    margins: tuple[int, ...]  # free pixels between segments; one is drawn per picture
    padding: int
    paddle_length: int
    marker_radius: float
    paddle_thickness: float
    seed_distance: int
    continuity: float
    distractor_segments: int  # total of all distractors
    contour_contrast: float
    paddle_contrast: float
    contour_length: int = 0
    contrasts: int = 1  # number of different paddle contrasts

    @property
    def distractor_length(self) -> int:
        return self.contour_length // 3

    @property
    def distractors(self) -> int:
        return self.distractor_segments // self.distractor_length


_SETTINGS = {
    32: Setting(32, (1,), 1, 2, 1.5, 0.5, 7, 1.0, 20, 2.0, 0.75),
    64: Setting(64, (1,), 1, 5, 2.5, 1.0, 12, 1.8, 22, 0.8, 1.0),
    128: Setting(128, (2, 3), 1, 5, 3.0, 1.5, 20, 1.8, 35, 0.9, 1.0),
    256: Setting(256, (3,), 22, 5, 5.0, 2.0, 27, 1.8, 30, 1.0, 1.0),
}


def settings(size: int, level: str) -> Setting:
    """The constants of a size and a level. Raises ConfigError if either is unknown."""
    if size not in _SETTINGS:
        raise ConfigError(f"size={size}; expected one of {', '.join(map(str, _SETTINGS))}")
    if level not in SEGMENTS:
        raise ConfigError(f"level={level}; expected one of {', '.join(SEGMENTS)}")
    return _SETTINGS[size]._replace(contour_length=SEGMENTS[level])


class Stencils(NamedTuple):
    """One small picture per heading as a list of its pixels, padded by repeating the last one."""

    at: Int[np.ndarray, "H F"]  # places relative to the anchor
    grey: UInt8[np.ndarray, "H F"]


class Tables(NamedTuple):
    """Everything that depends on setting and margin alone.

    A place is an index into a flattened picture with a rim wide enough that no stencil leaves it. A
    heading is an index: the first `DEGREES` are those of tails, and `DEGREES + k` points to
    candidate k. A tail's stencils are anchored at the tail, those of a candidate at the new head,
    from where the stroke goes backwards.
    """

    setting: Setting
    margin: int
    rim: int
    stride: int
    candidates: Int[np.ndarray, " K"]  # possible next heads, relative to the pivot
    weights: Int[np.ndarray, "H K"]  # of each candidate after each heading, in 1/WEIGHT_ONE
    angles: Float64[np.ndarray, " H"]
    backwards: Float64[np.ndarray, " H"]
    # pixels that have to be free around a tail; None if the heading is never a tail's
    tail_room: list[Int[np.ndarray, " F"] | None]
    # tails of the first target: heading, top row, rows, left column, columns
    first: Int[np.ndarray, "T 5"]
    stroke: UInt8[np.ndarray, "H S S"]  # ink of a segment
    body: Stencils  # pixels that a segment occupies
    core: Stencils  # pixels of `body` that can collide, with the least grey they collide with
    halo: Stencils  # `body` dilated by the margin: pixels forbidden for heads
    blank: UInt8[np.ndarray, "2 P"]  # of `Lanes`, without segments
    outside: Bool[np.ndarray, " P"]  # the rim

    def place(self, pixels):
        """Map rows and columns (..., 2) to places."""
        return (pixels[..., 0] + self.rim) * self.stride + pixels[..., 1] + self.rim

    def pixels(self, places):
        return np.stack(np.divmod(places, self.stride), axis=-1) - self.rim


@functools.cache
def _tables(setting: Setting, margin: int) -> Tables:
    size, reach = setting.size, setting.paddle_length + margin
    half = reach + int(np.ceil(setting.paddle_thickness))  # stencils are 2 half + 1 wide
    rim = half + 2 * margin + 2  # pivots are less than margin + 2 outside the picture
    stride = size + 2 * rim

    arc = np.arange(0, 360, 360 / (2 * np.pi * reach)) * np.pi / 180  # one pixel apart
    circle = np.unique(np.floor(_offset(arc, reach)).astype(int), axis=0)
    degrees = np.arange(-180, 180) * np.pi / 180
    angles = np.concatenate([degrees, np.arctan2(circle[:, 0], circle[:, 1])])
    turns = np.abs(angles[:, None] - angles[DEGREES:])
    turns = np.minimum(np.minimum(turns, 2 * np.pi - turns) * setting.continuity, np.pi / 2)

    backwards = np.where(angles < 0, angles + np.pi, angles - np.pi)
    directions = (*angles[:DEGREES], *backwards[DEGREES:])
    drawn = [_stencil(angle, setting, margin) for angle in directions]
    strokes, bodies = (np.stack(part) for part in zip(*drawn, strict=True))
    grown = np.pad(bodies, ((0, 0), (margin, margin), (margin, margin)))
    halos = grey_dilation(grown, footprint=_disc(margin)[None], mode="constant")
    body = _stencils(bodies, 1, stride)
    at, grey = _stencils(bodies[DEGREES:], OVERLAP - 255, stride)
    core = Stencils(at, (OVERLAP - grey.astype(int)).astype(np.uint8))

    inner, edge = setting.padding, setting.padding + margin
    mask = np.pad(np.zeros((size - 2 * inner,) * 2, np.uint8), inner, constant_values=255)
    wide = np.pad(np.zeros((size - 2 * edge,) * 2, np.uint8), edge + rim, constant_values=255)

    rooms = [_room(window, half, reach) for window in bodies[:DEGREES]]
    return Tables(
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
        blank=np.stack([np.pad(mask, rim), wide]).reshape(2, -1),
        outside=np.pad(np.zeros((size, size), bool), rim, constant_values=True).ravel(),
    )


def _offset(angles, distance):
    return np.stack([distance * np.sin(angles), distance * np.cos(angles)], axis=-1)


def _moved(origin, angles, distance):
    # rounded up after the sum, as in the original: sin(pi) > 0 moves a pixel only near 0
    return np.ceil(origin + _offset(angles, distance)).astype(int)


def _disc(radius):
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return y**2 + x**2 <= radius**2


def _stencil(angle, setting, margin):
    """Ink and body of a segment from the middle of a small picture in the direction `angle`."""
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
    """The pixels with a grey level of at least `least`, as places relative to the middle."""
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
    """Offsets of pixels that have to be free around a tail; None if the original rejects it."""
    offsets = np.argwhere(body == 255) - half + 1
    offsets = offsets[(np.abs(offsets) <= reach).all(axis=1)]
    signs = ((1, 1), (1, -1), (-1, 1), (-1, -1))  # of the quadrants
    is_valid = all((offsets * sign >= 0).all(axis=1).any() for sign in signs)
    return offsets if is_valid else None


def _first_tails(rooms, size, border):
    """Places of the first tail per heading: its stencil is at least `border` from the edge."""
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
    """A dot of `radius` centred on pixel (row, column) of a picture of `size`."""
    y, x = np.ogrid[: size * SCALE, : size * SCALE]
    disc = (y - row * SCALE) ** 2 + (x - column * SCALE) ** 2 <= (radius * SCALE) ** 2
    return _reduce(Image.fromarray(disc.astype(np.uint8) * np.uint8(255)), size)


# (lane, 2, P): the occupied pixels of each unfinished picture, and those forbidden for heads
Lanes = UInt8[np.ndarray, "_ 2 _"]
# (picture, contour, segment, 2): heading and anchor; anchor 0 if there is no contour
Contours = Int[np.ndarray, "_ _ _ 2"]


class Ends(NamedTuple):
    """The newest segment of a contour in each lane, not yet marked as occupied."""

    heading: Int[np.ndarray, " N"]
    anchor: Int[np.ndarray, " N"]  # of its stencils: the tail, later the head
    pivot: Int[np.ndarray, "N 2"]  # row and column of the centre of the circle of heads

    def take(self, which) -> "Ends":
        return Ends(*(part[which] for part in self))


def _start(tables: Tables, heading, tail) -> Ends:
    return Ends(heading, tables.place(tail), _tail_pivot(tables, heading, tail)[1])


def _tail_pivot(tables: Tables, heading, tail):
    """The end of the stroke from `tail`, and the pivot whose circle it is on."""
    length = tables.setting.paddle_length
    head = _moved(tail, tables.angles[heading], length)
    return head, _moved(head, tables.backwards[heading], length + tables.margin)


def _occupy(tables: Tables, pictures: Lanes, lanes, ends: Ends) -> None:
    flat, area = pictures.reshape(-1), pictures.shape[2]
    for i, stencils in enumerate((tables.body, tables.halo)):
        anchors = ((2 * lanes + i) * area + ends.anchor)[:, None]
        at = anchors + stencils.at.take(ends.heading, axis=0)
        flat[at] = np.maximum(flat.take(at), stencils.grey.take(ends.heading, axis=0))


def _extend(
    tables: Tables, pictures: Lanes, lanes, ends: Ends, words
) -> tuple[Bool[np.ndarray, " N"], Ends]:
    """Grow a contour by one segment in each of `lanes`.

    The next head is drawn from the candidates on a circle around the new pivot; free and straight
    ones are more likely. Up to `SEGMENT_TRIALS` are drawn (one word each) until one does not
    collide. In lanes that succeed, the previous segment is marked as occupied. Returns a mask of
    these lanes, and their new ends.
    """
    flat, area = pictures.reshape(-1), pictures.shape[2]
    first = 2 * lanes * area
    step = tables.setting.paddle_length + 2 * tables.margin
    pivot = _moved(ends.pivot, tables.angles[ends.heading], step)
    heads = tables.place(pivot)[:, None] + tables.candidates
    closed = flat.take((first + area)[:, None] + heads)
    weights = (255 - closed) * tables.weights.take(ends.heading, axis=0)
    reached = np.cumsum(weights, axis=1, dtype=np.int32)
    total = reached[:, -1].astype(np.int64)

    chosen = np.full(len(lanes), -1)
    trying = np.flatnonzero(total >= DEAD_END)
    for trial in range(SEGMENT_TRIALS):
        drawn = _scale(words[trying, trial], total[trying])
        choice = (reached[trying] <= drawn[:, None]).sum(axis=1)
        at = (first[trying] + heads[trying, choice])[:, None] + tables.core.at.take(choice, axis=0)
        collides = (flat.take(at) >= tables.core.grey.take(choice, axis=0)).any(axis=1)
        chosen[trying[~collides]] = choice[~collides]
        trying = trying[collides]

    grown = chosen >= 0
    _occupy(tables, pictures, lanes[grown], ends.take(grown))
    choice = chosen[grown]
    return grown, Ends(DEGREES + choice, heads[grown, choice], pivot[grown])


def _scale(words: np.ndarray | np.uint32, span: np.ndarray | int):
    """Scale 32-bit words to 0..span-1; span < 2^31."""
    return (words.astype(np.int64) * span) >> 32


def _grow(
    tables: Tables, pictures: Lanes, ends: list[Ends], words
) -> tuple[Int[np.ndarray, " M"], Contours]:
    """Grow one or two contours in each lane to their full length, in turns.

    Returns the ascending indices of the lanes that succeeded, and their contours. As in the
    original, the last segment is marked as occupied for the last contour only.
    """
    count, steps, turns, _ = words.shape  # the last axis has SEGMENT_TRIALS words
    contours = np.zeros((count, turns, steps + 1, 2), int)
    lanes = np.arange(count)
    for turn, end in enumerate(ends):
        contours[:, turn, 0] = np.stack([end.heading, end.anchor], axis=-1)
    for step in range(steps):
        for turn in range(turns):
            grown, end = _extend(tables, pictures, lanes, ends[turn], words[lanes, step, turn])
            lanes = lanes[grown]
            ends = [end if i == turn else other.take(grown) for i, other in enumerate(ends)]
            contours[lanes, turn, step + 1] = np.stack([end.heading, end.anchor], axis=-1)
    _occupy(tables, pictures, lanes, ends[-1])
    return lanes, contours[lanes]


def _targets(tables: Tables, streams: list[np.random.Philox]) -> tuple[Contours, Lanes]:
    """Two targets for each picture (its stream's first success) and the pixels they occupy."""
    length = tables.setting.contour_length
    words_per_attempt = TAIL_WORDS + (length - 1) * 2 * SEGMENT_TRIALS
    contours = np.zeros((len(streams), 2, length, 2), int)
    pictures = np.tile(tables.blank, (len(streams), 1, 1))
    todo = np.arange(len(streams))
    while len(todo):
        attempts = max(1, LANE_BYTES // (tables.blank.size * len(todo)))
        words = np.concatenate([words32(streams[i], attempts * words_per_attempt) for i in todo])
        words = words.reshape(len(todo) * attempts, words_per_attempt)
        occupied = np.tile(tables.blank, (len(words), 1, 1))
        growth = words[:, TAIL_WORDS:].reshape(len(words), length - 1, 2, SEGMENT_TRIALS)
        lanes, grown = _grow(tables, occupied, _target_tails(tables, words[:, :TAIL_WORDS]), growth)
        done, first = np.unique(lanes // attempts, return_index=True)
        contours[todo[done]], pictures[todo[done]] = grown[first], occupied[lanes[first]]
        todo = np.delete(todo, done)
    return contours, pictures


def _target_tails(tables: Tables, words: UInt32[np.ndarray, "N W"]) -> list[Ends]:
    """The first tail near the middle, the second at the seed distance from it."""
    heading, row, rows, column, columns = tables.first[_scale(words[:, 0], len(tables.first))].T
    tail = row + _scale(words[:, 1], rows), column + _scale(words[:, 2], columns)
    first = np.stack(tail, axis=-1)
    direction = _scale(words[:, 3], DEGREES) * np.pi / 180
    second = np.rint(first + _offset(direction, tables.setting.seed_distance)).astype(int)
    return [_start(tables, heading, first), _start(tables, _scale(words[:, 4], DEGREES), second)]


def _distractors(
    tables: Tables, pictures: Lanes, words: UInt32[np.ndarray, "N S trials W"]
) -> Contours:
    """Add shorter contours where they fit; each is left out after `CONTOUR_TRIALS` trials."""
    count, number, trials, _ = words.shape
    length = tables.setting.distractor_length
    contours = np.zeros((count, number, length, 2), int)
    for contour in range(number):
        todo = np.arange(count)
        for trial in range(trials):
            tails = {i: _tail(tables, pictures[i, 0], words[i, contour, trial]) for i in todo}
            which = np.array([i for i in todo if tails[i]], int)
            if not len(which):
                continue
            heading, place = np.array([tails[i] for i in which]).T
            tried = pictures[which]
            growth = words[which, contour, trial, TAIL_WORDS:]
            growth = growth.reshape(len(which), length - 1, 1, SEGMENT_TRIALS)
            tail = _start(tables, heading, tables.pixels(place))
            lanes, grown = _grow(tables, tried, [tail], growth)
            contours[which[lanes], contour], pictures[which[lanes]] = grown[:, 0], tried[lanes]
            todo = np.setdiff1d(todo, which[lanes])
    return contours


def _tail(
    tables: Tables, mask: UInt8[np.ndarray, " P"], words: UInt32[np.ndarray, " W"]
) -> tuple[int, int] | None:
    """Heading and place of a distractor's tail, uniform over the free places; None without any."""
    corner = tables.rim * (tables.stride + 1)
    inner = slice(corner, -corner)  # first to last pixel
    occupied = (mask >= OCCUPIED) & ~tables.outside
    for trial in range(SEGMENT_TRIALS):
        heading = int(_scale(words[2 * trial], DEGREES))
        room = tables.tail_room[heading]
        if room is None:
            return None
        closed = tables.outside[inner].copy()
        for offset in room:
            closed |= occupied[inner.start + offset : len(occupied) + inner.stop + offset]
        free = np.flatnonzero(~closed)
        if not len(free):
            return None
        place = int(free[_scale(words[2 * trial + 1], len(free))]) + inner.start
        ends = np.stack(_tail_pivot(tables, heading, tables.pixels(place)))
        if (ends >= 0).all() and (ends < tables.setting.size).all():
            return heading, place
    return None


def _paint(
    tables: Tables, targets: Contours, distractors: Contours, i: int, dots: list[int]
) -> UInt8[np.ndarray, "S S"]:
    """Picture i of a batch: the maximum of all strokes and dots, scaled to 255."""
    setting = tables.setting
    picture = np.zeros((setting.size, setting.size))
    contrasts = setting.paddle_contrast * setting.contour_contrast, setting.contour_contrast
    for contours, contrast in zip((targets, distractors), contrasts, strict=True):
        # float32 as in the original, because it decides ties
        grey = (np.arange(256) / 255 * contrast).astype(np.float32)
        picture = np.maximum(picture, grey[_ink(tables, contours[i])])
    reach = int(np.ceil(setting.marker_radius)) + 4  # includes the three pixels of Lanczos
    width = 2 * reach + 1
    for place in dots:
        # a small picture with the same distance to the border gives the same dot
        centre = tables.pixels(place)
        near = np.maximum(np.minimum(centre, reach), centre - (setting.size - width))
        row, column = centre - near
        window = picture[row : row + width, column : column + width]
        dot = _dot(setting.marker_radius, int(near[0]), int(near[1]), width)
        np.maximum(window, dot / 255, out=window)
    # 0.4999 is the rounding of the original
    return (picture * (255 / picture.max()) + 0.4999).astype(np.uint8)


def _ink(tables: Tables, segments: Int[np.ndarray, "contours L 2"]) -> UInt8[np.ndarray, "S S"]:
    half = tables.stroke.shape[1] // 2
    ink = np.zeros((tables.stride, tables.stride), np.uint8)
    for stroke, place in segments[segments[..., 1] > 0].tolist():
        row, column = divmod(place, tables.stride)
        window = ink[row - half : row + half + 1, column - half : column + half + 1]
        np.maximum(window, tables.stroke[stroke], out=window)
    return ink[tables.rim : -tables.rim, tables.rim : -tables.rim]


def draw(
    first: int, last: int, size: int, level: str, seed: int
) -> tuple[UInt8[np.ndarray, "n S S"], UInt8[np.ndarray, " n"]]:
    """Pictures first..last-1 and their labels (1: both dots are on the same contour).

    Picture i depends on size, level, seed and i alone.
    """
    setting = settings(size, level)
    images = np.zeros((last - first, size, size), np.uint8)
    labels = np.zeros(last - first, np.uint8)
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        streams = [random_stream(seed, first + i) for i in range(len(labels))[part]]
        images[part], labels[part] = _draw_batch(setting, streams)
    return images, labels


def _draw_batch(setting: Setting, streams: list[np.random.Philox]):
    per_trial = TAIL_WORDS + (setting.distractor_length - 1) * SEGMENT_TRIALS
    shape = (setting.distractors, CONTOUR_TRIALS, per_trial)
    words = np.stack([words32(bits, PICTURE_WORDS + int(np.prod(shape))) for bits in streams])
    labels, margins, origins = (
        _scale(words[:, i], span) for i, span in enumerate((2, len(setting.margins), 2))
    )
    images = np.zeros((len(streams), setting.size, setting.size), np.uint8)
    for choice, margin in enumerate(setting.margins):
        which = np.flatnonzero(margins == choice)
        tables = _tables(setting, margin)
        targets, pictures = _targets(tables, [streams[i] for i in which])
        own_words = words[which, PICTURE_WORDS:].reshape(-1, *shape)
        distractors = _distractors(tables, pictures, own_words)
        for i, picture in enumerate(which):
            origin, end = origins[picture], origins[picture] ^ 1 ^ labels[picture]
            dots = [int(targets[i, origin, 0, 1]), int(targets[i, end, -1, 1])]
            images[picture] = _paint(tables, targets, distractors, i, dots)
    return images, labels.astype(np.uint8)
