"""The built-in world: what is drawn, said, asked and stated."""

from collections import Counter

import numpy as np
import pytest

import data
import shapes


def test_splits_share_no_scene_and_no_caption():
    captions = {}
    for split in data.SPLITS:
        pictures = [shapes.World(split, 32)[i % shapes.SCENES[split]] for i in range(2000)]
        captions[split] = {caption for picture in pictures for caption in picture.captions}
        assert {picture.item for picture in pictures} <= captions[split]
    for a, b in [("train", "val"), ("train", "test"), ("val", "test")]:
        assert captions[a].isdisjoint(captions[b])
    with pytest.raises(data.Absent):
        shapes.World("dev", 32)


def test_a_scene_is_drawn_where_its_caption_says():
    world = shapes.World("train", 64)
    for i in range(200):
        scene, pixels = world.scene(i), np.asarray(world.image(i)).astype(int)
        colors, centers = [thing["color"] for thing in scene["things"]], []
        if len(set(colors)) == len(colors):
            for color in colors:
                near = np.abs(pixels - shapes.COLORS[color]).max(-1) <= 16
                assert near.sum() >= 8, (i, scene)
                y, x = near.nonzero()
                centers.append(y.mean() if scene["layout"] == "column" else x.mean())
            assert np.diff(centers).min() > 10, (i, scene)


def test_captions_are_all_the_ways_to_say_it():
    a, b, c = names = "a small red circle", "a large blue ring", "a small black star"
    things = [dict(zip(("size", "color", "shape"), name.split()[1:])) for name in names]
    two, three = {"layout": "column", "things": things[:2]}, {"layout": "row", "things": things}
    assert shapes.describe(two) == [f"{a} above {b}", f"{b} below {a}"]
    assert shapes.describe(three) == [
        f"{a}, {b} and {c} from left to right",
        f"{c}, {b} and {a} from right to left",
    ]


def test_the_world_depends_on_its_seed_and_on_nothing_else():
    first, other = shapes.World("train", 32), shapes.World("train", 32, seed=1)
    drawn, said = first.image(7).tobytes(), first[7]
    shapes.scene_from.cache_clear()
    again = shapes.World("train", 32)
    assert again.image(7).tobytes() == drawn and again[7] == said
    assert [first[i].captions for i in range(5)] != [other[i].captions for i in range(5)]
    thing = first.scene(3)["things"][0]
    assert first.kind(3) == f"{thing['color']} {thing['shape']}"
    assert len({first.kind(i) for i in range(2000)}) == 48


def things_of(scene, text):
    """The things of a scene that have all the properties that a text names, by their words."""
    words = text.strip("?.").replace("crosses", "cross").split()
    named = {word.removesuffix("s") if word != "cross" else word for word in words}
    named &= {*shapes.SIZES, *shapes.COLORS, *shapes.SHAPES}
    return [thing for thing in scene["things"] if named <= set(thing.values())]


def answer(scene, text):
    """The answer to a question, found another way: by matching its words to the scene."""
    found = things_of(scene, text)
    if text.startswith("how many"):
        return str(len(found))
    if text.startswith("is there"):
        return "yes" if found else "no"
    if " on the " in text or " at the " in text:
        found = [scene["things"][0 if text.endswith(("left?", "top?")) else -1]]
    [thing] = found
    return thing[text.split()[1]]


def test_questions_have_the_right_answers_and_every_type():
    world, kinds = shapes.World("test", 32), Counter()
    for i in range(1500):
        text, given, kind = world.question(i)
        assert answer(world.scene(i // shapes.TIMES), text) == given, text
        kinds[kind, given in ("yes", "no"), given.isdigit()] += 1
    known = {("yes/no", True, False), ("number", False, True), ("other", False, False)}
    assert set(kinds) == known and min(kinds.values()) > 400


def holds(text, scenes):
    """Whether a statement is true of two scenes, found by its words."""
    words, has = text.split(), [bool(things_of(scene, text)) for scene in scenes]
    size, side = [len(scene["things"]) for scene in scenes], words[1] == "right"
    if "more" in words:
        return size[side] > size[1 - side]
    if "all." in words:
        return sum(size) == {"four": 4, "five": 5, "six": 6}[words[3]]
    meanings = {"both": all(has), "only": sum(has) == 1, "neither": not any(has), "the": has[side]}
    return meanings[words[0]]


def test_statements_are_true_of_two_of_four_pairs(monkeypatch):
    monkeypatch.setattr(shapes, "draw_scene", lambda scene, size, rng: scene)
    world, labels, seen = shapes.World("test", 32), [], set()
    for i in range(800):
        text, _, label = world.statement(i)
        assert holds(text, world.image_pair(i)) == label, text
        labels.append(label)
        seen.add((text.split()[0], "more" in text, "in all." in text))
    assert len(seen) == 6 and {sum(labels[i : i + 4]) for i in range(0, 800, 4)} == {2}
