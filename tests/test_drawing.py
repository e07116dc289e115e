"""Sheets, heat maps and charts."""

import json

import numpy as np
from PIL import Image

import drawing


def test_only_right_tiles_have_a_green_frame_and_a_label_makes_them_higher():
    image = Image.new("RGB", (30, 20), "red")
    plain, right = drawing.tile(image), drawing.tile(image, right=True)
    assert plain.size == right.size and drawing.tile(image, "a label").height > plain.height
    colors = [{color for _, color in one.getcolors()} for one in (plain, right)]
    assert drawing.GREEN not in colors[0] and drawing.GREEN in colors[1]
    rows = drawing.sheet([("title", [plain, right]), ("", [plain])])
    assert rows.width == 2 * plain.width + 10 + 20


def test_long_texts_are_wrapped():
    assert drawing.written("word " * 100, 20).height == 25 * drawing.LINE
    assert drawing.written("a\n\nb").height == 3 * drawing.LINE


def test_the_hottest_patch_is_the_reddest():
    weights = [0.0] * 15 + [2.0]
    pixels = np.asarray(drawing.heat(Image.new("RGB", (64, 64), "blue"), weights)).astype(int)
    redness = pixels[..., 0] - pixels[..., 2]
    y, x = np.unravel_index(redness.argmax(), redness.shape)
    assert y >= 48 and x >= 48 and redness[8, 8] < 0


def test_round_numbers_by_hand():
    assert drawing.steps(0, 750, 4) == [0, 200, 400, 600]
    assert drawing.steps(-0.3, 0.31, 5) == [-0.2, 0.0, 0.2]
    assert drawing.powers(0.15, 4.2) == [0.2, 0.5, 1, 2]
    assert drawing.powers(1e-10, 1) == [1e-9, 1e-6, 1e-3, 1] and len(drawing.powers(1e-5, 1)) == 6


def test_curves_are_of_what_changed_in_several_runs(tmp_path, monkeypatch):
    lines = []
    for step in (10, 20, 30):
        lines.append({"step": step, "itc": 40 / step, "lr": 0.1, "pairs_per_s": 9.5 * step, "unreadable": 0})
        lines.append({"step": step, "split": "val", "accuracy": step, "constant": 5})
    lines.append({"step": 30, "split": "test", "accuracy": 7})
    (tmp_path / "one").mkdir()
    path = tmp_path / "one/metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')
    drawn = []
    monkeypatch.setattr(drawing, "chart", lambda panels, names: drawn.append((panels, names)))
    other = tmp_path / "other.jsonl"
    other.write_text('{"step": 10, "itc": 2}\n{"step": 13, "itc": 5}\n{"step": 20, "itc": 1}\n')
    drawing.curves({"one": [tmp_path / "one"], "two": [path, other]})
    [(panels, names)] = drawn
    assert list(panels) == ["itc", "accuracy, split val"] and names == ["one", "two"]
    assert panels["itc"]["one"] == [(10, 4), (20, 2), (30, 40 / 30)]
    assert panels["itc"]["two"] == [(10, 3), (13, 5), (20, 1.5), (30, 40 / 30)]  # means, in order
    drawing.curves({"one": [path]}, only=["lr"])
    assert len(drawn) == 1  # it never changes


def test_all_numbers_of_a_chart_have_room():
    for curve in ([(0, 0.066851), (200_000, 0.066859)], [(k, 10.0 ** (-k)) for k in range(11)]):
        picture = np.asarray(drawing.plot("", {"a": curve}, {"a": drawing.COLORS[0]}))
        assert (picture[:, [0, -1]] == 255).all()  # nothing is cut at the sides


def test_a_curve_is_drawn_where_it_belongs():
    """A straight line on a linear scale, and an exponential one on a log scale, go from corner to corner."""
    colors = {"run": (255, 0, 0)}
    for curve in ([(x, x) for x in range(101)], [(x, 1.1**x) for x in range(101)]):
        picture = np.asarray(drawing.plot("title", {"run": curve}, colors)).astype(int)
        y, x = ((picture[..., 0] - picture[..., 1]) > 200).nonzero()
        straight = np.polyfit(x, y, 1)
        assert np.abs(np.polyval(straight, x) - y).max() < 3
        assert x.min() < 60 and x.max() > 300 and y.min() < 40 and y.max() > 160
