"""Pictures for people, drawn with Pillow only: sheets of labelled images, heat maps, charts of curves."""

import collections
import contextlib
import functools
import math
import statistics
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from log import read_metrics

FONT = ImageFont.load_default(14)  # it has the letters of English only
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")  # of systems
LINE = 18  # pixels from one line of text to the next
PAPER, INK, PALE, GREEN = "white", (40, 40, 40), (215, 215, 215), (0, 150, 60)
COLORS = ((31, 110, 200), (220, 90, 20), (30, 150, 80), (150, 60, 170), (200, 40, 60), (110, 110, 110))

# ---- Pictures made of pictures -------------------------------------------------------------------


@functools.cache
def font(english):
    """The font of a text; of one that is not English the system's, if it has one of FONTS."""
    for name in () if english else FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, 14)
    return FONT


def written(text, characters=80, color=INK):
    """A text as a picture, in lines of at most so many characters."""
    lines, letters = [], font(text.isascii())
    for line in text.split("\n"):
        lines += textwrap.wrap(line, characters) or [""]
    width = math.ceil(max(letters.getlength(line) for line in lines))
    picture = Image.new("RGB", (max(1, width), LINE * len(lines)), PAPER)
    for number, line in enumerate(lines):
        ImageDraw.Draw(picture).text((0, LINE * number), line, color, letters)
    return picture


def beside(pictures, gap=10):
    """Pictures next to each other, their tops in a line."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    out, x = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER), 0
    for picture in pictures:
        out.paste(picture, (x, 0))
        x += picture.width + gap
    return out


def below(pictures, gap=6):
    """Pictures one below the other, their left sides in a line."""
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    out, y = Image.new("RGB", (max(picture.width for picture in pictures), height), PAPER), 0
    for picture in pictures:
        out.paste(picture, (0, y))
        y += picture.height + gap
    return out


def tile(image, label="", right=False, side=144):
    """An image within a square, and a text below it. right: in a green frame."""
    scaled = ImageOps.pad(image, (side, side), Image.Resampling.BICUBIC, color=PAPER)
    framed = ImageOps.expand(ImageOps.expand(scaled, 1, PALE), 4, GREEN if right else PAPER)
    return below([framed, written(label, side // 7)], gap=2) if label else framed


def sheet(rows):
    """Rows of tiles, [(title or "", tiles)], as one picture."""
    parts = []
    for title, tiles in rows:
        parts += [written(title), beside(tiles)] if title else [beside(tiles)]
    return ImageOps.expand(below(parts), 10, PAPER)


def heat(image, weights):
    """An image (S, S) with its patches' weights over it: the higher, the redder. weights (N,) ≥ 0."""
    side = math.isqrt(len(weights))
    share = np.asarray(weights, dtype=np.float32).reshape(side, side) / max(*weights, 1e-9)
    mask = Image.fromarray(np.uint8(255 * share)).resize(image.size, Image.Resampling.BICUBIC)
    pale = Image.blend(image, Image.new("RGB", image.size, PAPER), 0.5)
    return Image.composite(Image.new("RGB", image.size, (230, 0, 0)), pale, mask.point(lambda value: 0.8 * value))


def from_tensor(image):
    """uint8, or float in −1 … 1, (3, S, S) → an RGB image."""
    if image.is_floating_point():
        image = (127.5 * (image + 1)).round().clamp(0, 255).byte()
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


# ---- Charts --------------------------------------------------------------------------------------


NOT_SHOWN = ("step", "split", "lr", "unreadable", "waited_s")


def curves(runs, only=None):
    """Draws the losses and measures of runs as one picture, except those that never change; None if
    none is left. runs: {name: folders of runs, or their metrics.jsonl}; of several, the mean is
    drawn. only: names of the losses and measures to draw (default: all)."""
    found = collections.defaultdict(list)  # {(title, run, step): values}
    for run, paths in runs.items():
        for path in paths:
            for entry in entries(path):
                split = f", split {entry['split']}" if "split" in entry else ""
                for name, value in entry.items():
                    shown = name in only if only else name not in NOT_SHOWN and not name.endswith("_per_s")
                    if shown and value is not None:
                        found[name + split, run, entry["step"]].append(value)
    panels = {}
    for title, run, step in sorted(found, key=lambda key: key[2]):  # a run that was stopped has a line more
        point = step, statistics.mean(found[title, run, step])
        panels.setdefault(title, {}).setdefault(run, []).append(point)
    for title, curves in list(panels.items()):
        if all(len({y for _, y in curve}) < 2 for curve in curves.values()):
            del panels[title]
    return chart(panels, list(runs)) if panels else None


def entries(path):
    """The lines of a run's metrics.jsonl. path: its folder, or the file."""
    path = Path(path)
    return [entry for _, entry in read_metrics(path / "metrics.jsonl" if path.is_dir() else path)]


def chart(panels, names):
    """Curves of several runs as one picture. panels: {title: {name: [(x, y), …]}}; names: of the
    runs, in the order of their colors, at most as many as there are COLORS."""
    colors = dict(zip(names, COLORS))
    plots = [plot(title, curves, colors) for title, curves in panels.items()]
    rows = [beside(plots[k : k + 3], gap=20) for k in range(0, len(plots), 3)]
    legend = below([written(name, color=colors[name]) for name in names], gap=0)
    return ImageOps.expand(below([legend, *rows], gap=14), 10, PAPER)


def plot(title, curves, colors, width=330, height=200):
    """Curves {name: [(x, y), …]} in a frame with ticks; y on a log scale if it spans a factor of ten."""
    xs = [x for curve in curves.values() for x, _ in curve]
    ys = [y for curve in curves.values() for _, y in curve]
    log = min(ys) > 0 and max(ys) >= 10 * min(ys)
    scale = math.log if log else float
    low, high = scale(min(ys)), scale(max(ys))
    span = high - low or 1.0  # 1: a constant curve
    ticks = {y: f"{y:g}" for y in (powers(min(ys), max(ys)) if log else steps(min(ys), max(ys), 5))}
    marks = {x: f"{x:g}" for x in steps(0, max(xs), 4)}

    # The frame, with room for the numbers at its left, and for half of the last one below it
    left = 10 + max([42, *map(FONT.getlength, ticks.values())])
    right = width - max(20, 4 + FONT.getlength(marks[max(marks)]) / 2)
    top, bottom = LINE + 6, height - LINE - 4

    def place(x, y):
        """Pixels of a point: x from 0; y with a margin of a twentieth."""
        up = 0.05 + 0.9 * (scale(y) - low) / span
        return left + (right - left) * x / max(*xs, 1), bottom - (bottom - top) * up

    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((left, 2), title + (" (log scale)" if log else ""), INK, FONT)
    for y, number in ticks.items():
        _, at = place(0, y)
        draw.line([(left, at), (right, at)], PALE)
        draw.text((left - 6, at), number, INK, FONT, anchor="rm")
    for x, number in marks.items():
        draw.text((place(x, ys[0])[0], bottom + 4), number, INK, FONT, anchor="mt")
    for name, curve in curves.items():
        places = [place(x, y) for x, y in curve]
        draw.line(places, colors[name], 2)
        for x, y in places if len(places) < 10 else []:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colors[name])
    draw.rectangle((left, top, right, bottom), outline=INK)
    return picture


def steps(low, high, count):
    """About `count` round numbers from low to high."""
    rough = max(high - low, 1e-9) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def powers(low, high):
    """1, 2, 5 times powers of ten from low to high, the powers alone, or every third of them: ten at most."""
    for factors, exponents in (((1, 2, 5), range(-12, 13)), ((1,), range(-12, 13)), ((1,), range(-12, 13, 3))):
        found = [f * 10.0**n for n in exponents for f in factors if low <= f * 10.0**n <= high]
        if len(found) <= 10:
            break
    return found
