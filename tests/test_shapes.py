"""The built-in world: what is drawn, said, asked and stated."""

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from conftest import refused

import data
import shapes


def scene(layout, *names):
    """A scene of things by their names, such as "small red circle"."""
    things = [dict(zip(("size", "color", "shape"), name.split())) for name in names]
    return {"layout": layout, "things": things}


def test_splits_share_no_scene_and_no_caption_and_are_the_same_on_every_machine():
    captions = {}
    for split in data.SPLITS:
        pictures = [shapes.World(split, 32, count=1000)[i] for i in range(1000)]
        captions[split] = {caption for picture in pictures for caption in picture.captions}
        assert {picture.item for picture in pictures} <= captions[split]
    for a, b in combinations(data.SPLITS, 2):
        assert captions[a].isdisjoint(captions[b])
    things = "a small purple square, a large purple circle and a large green cross"
    assert shapes.World("test", 32)[7].item == f"{things} from left to right"
    refused(shapes.World, "dev", 32, error=data.Absent)


def test_scarce_scenes_have_long_tails_and_the_words_of_the_whole_world():
    scarce = shapes.World.read(["shapes:600"], "train", 32)
    counts = Counter(thing["color"] for i in range(len(scarce)) for thing in scarce.scene(i)["things"])
    wanted = np.array([1 / k for k in range(1, 9)])
    share = np.array([counts[color] for color in shapes.COLORS]) / counts.total()
    np.testing.assert_allclose(share, wanted / wanted.sum(), atol=0.03)
    assert len(scarce) == 600 and scarce.corpus() == shapes.World("train", 32).corpus()
    whole = shapes.World.read(["shapes:600"], "test", 32)
    assert whole[7] == shapes.World("test", 32)[7]  # only training is scarce
    assert shapes.World.read(["shapes"], "train", 32)[7] == shapes.World("train", 32)[7]
    assert shapes.World.read(["shapes:600", "shapes"], "train", 32) is None  # of files
    rare = shapes.World("rare", 32)
    things = [thing for i in range(50) for thing in rare.scene(i)["things"]]
    assert {thing["color"] for thing in things} == set(list(shapes.COLORS)[4:])
    assert {thing["shape"] for thing in things} == set(shapes.SHAPES[3:])
    assert all(data.stable_hash(rare[i].item) % 10 == 9 for i in range(50))  # of split test
    for wrong in ("shapes:", "shapes:0", "shapes:-1", "shapes:many"):
        refused(shapes.asked, [wrong])


def test_things_are_drawn_where_their_places_and_captions_say():
    world = shapes.World("test", 96)
    rows, columns = np.mgrid[:96, :96]
    for i in range(20):
        given, places = world.scene(i), world.places(i)
        pixels = np.asarray(world.image(i)).astype(int)
        for thing, (x, y, radius) in zip(given["things"], places, strict=True):
            near = np.abs(pixels - shapes.COLORS[thing["color"]]).max(-1) <= 16
            close = (rows - y) ** 2 + (columns - x) ** 2 <= (1.2 * radius) ** 2
            assert (near & close).sum() > 0.3 * radius**2
        along = [place[given["layout"] == "column"] for place in places]
        assert np.diff(along).min() > 10  # from left to right, or from top to bottom


def test_captions_by_hand():
    a, b, c = "small red circle", "large blue ring", "small black star"
    assert shapes.describe(scene("column", a, b)) == [f"a {a} above a {b}", f"a {b} below a {a}"]
    assert shapes.describe(scene("row", a, b))[1] == f"a {b} right of a {a}"
    assert shapes.describe(scene("row", a, b, c)) == [
        f"a {a}, a {b} and a {c} from left to right",
        f"a {c}, a {b} and a {a} from right to left",
    ]


def test_questions_by_hand():
    given = scene("row", "small red circle", "large blue ring", "small red star")
    drawn = [shapes.ask(given, random.Random(seed)) for seed in range(3000)]
    asked = {text: (answer, kind) for text, answer, kind in drawn}
    expected = {
        "is there a red shape?": ("yes", "yes/no"),
        "is there an orange shape?": ("no", "yes/no"),
        "how many shapes are there?": ("3", "number"),
        "how many red shapes are there?": ("2", "number"),
        "how many crosses are there?": ("0", "number"),
        "what color is the ring?": ("blue", "other"),
        "what shape is the blue shape?": ("ring", "other"),
        "what size is the star?": ("small", "other"),
        "what shape is the shape on the left?": ("circle", "other"),
        "what shape is the shape on the right?": ("star", "other"),
    }
    assert expected.items() <= asked.items()
    assert "what shape is the red shape?" not in asked  # there are two
    answers = Counter(answer for _, answer, kind in drawn)
    assert answers["yes"] == pytest.approx(500, abs=50) == answers["no"]

    world = shapes.World("test", 32)  # four questions on each scene
    for i in range(300):
        text, answer, kind = world.question(i)
        if kind == "yes/no":
            assert (text.split()[3] in world[i // 4].captions[0]) == (answer == "yes")


def test_statements_by_hand_and_true_of_two_of_four_pairs(monkeypatch):
    left = scene("row", "small red circle", "large blue ring")
    right = scene("row", "small red circle", "large green ring", "small black star")
    stated = {}
    for seed in range(3000):
        text, holds = shapes.state(random.Random(seed))
        stated[text] = holds(left, right)
        assert not ("more" in text and holds(left, left))
    for text, true, false in [
        ("the left image shows a {} shape.", "blue", "green"),
        ("the right image shows a {} shape.", "green", "blue"),
        ("both images show a {} shape.", "red", "blue"),
        ("neither image shows a {} shape.", "pink", "green"),
        ("only one image shows a {} shape.", "green", "red"),
        ("the images show {} shapes in all.", "five", "six"),
        ("the {} image shows more shapes.", "right", "left"),
    ]:
        assert stated[text.format(true)] and not stated[text.format(false)]

    monkeypatch.setattr(shapes, "draw_scene", lambda scene, size, rng: scene)
    for split in ("test", "rare"):  # every statement can be true of the things of its split
        world, labels = shapes.World(split, 32), []
        for i in range(200):
            _, holds, label = world.statement(i)
            assert holds(*world.image_pair(i)) == label
            labels.append(label)
        assert {sum(labels[i : i + 4]) for i in range(0, 200, 4)} == {2}
