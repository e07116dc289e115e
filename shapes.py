"""The built-in world: scenes of two or three colored shapes, drawn with Pillow from (split, index).

A scene is {"layout", "things": [{"size", "color", "shape"}, …]} from left to right or from top to
bottom. It has captions, questions and a class; two scenes have statements. No files, any size, the
same on every machine.
"""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from data import Absent, Picture, stable_hash
from runtime import UserError

COLORS = {
    "red": (220, 40, 40),
    "orange": (245, 150, 30),
    "yellow": (240, 220, 50),
    "green": (50, 160, 70),
    "blue": (40, 90, 220),
    "purple": (140, 60, 170),
    "pink": (250, 160, 200),
    "black": (30, 30, 30),
}
BACKGROUND = (240, 240, 240)  # of all scenes: a shade of its own would tell pictures apart without a word
SIZES = {"small": 0.62, "large": 1.0}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
CORNERS = {  # of a shape, clockwise from the top: distance from its middle, in radii, and angle
    "triangle": [(1.1, 2 * math.pi * k / 3) for k in range(3)],
    "star": [((1.1, 0.45)[k % 2], 2 * math.pi * k / 10) for k in range(10)],
}
LAYOUTS = {  # two things: before, after; three things: forwards, backwards
    "row": ("left of", "right of", "from left to right", "from right to left"),
    "column": ("above", "below", "from top to bottom", "from bottom to top"),
}
ENDS = {"row": ("on the left", "on the right"), "column": ("at the top", "at the bottom")}  # the first, the last thing
SCENES = {"train": 100_000, "val": 500, "test": 500, "rare": 500}
TIMES = 4  # questions per scene, and pairs of images per statement


def asked(paths):
    """Whether --data asks for the built-in world, and names no files."""
    return World.read(paths, "train", 0) is not None


class World:
    """A source of pictures with captions. The item of a scene is its meaning, and a hash of the
    meaning gives the scene to one split: 8 tenths to train, 1 each to val and test. So splits share
    no scene and no caption. Split rare has scenes of test with rare things only, see make_thing."""

    by_text = True  # in retrieval, a caption is right for every picture that has it
    drawn = True
    per_scene = 1  # samples

    def __init__(self, split, image_size, count=None, scarce=False):
        """image_size in pixels. scarce: colors and shapes come as often as in scarce pairs. Absent
        for a split that is not in SCENES."""
        if split not in SCENES:
            raise Absent(f"the built-in world has no split {split}, but {', '.join(SCENES)}")
        self.split, self.image_size, self.count = split, image_size, count or SCENES[split]
        usual = "rare" if split == "rare" else "any"
        self.things = "scarce" if scarce else usual  # a kind of make_thing
        self.name = f"scarce {split}" if scarce else f"0 {split}"  # seeds its random numbers

    @classmethod
    def read(cls, paths, split, image_size):
        """The split of the world that --data asks for; None if it names files. shapes:N: of
        training, N scarce scenes; val and test are those of the whole world."""
        name, colon, count = str(paths[0]).partition(":")
        if len(paths) > 1 or name != "shapes":
            return None
        if colon and (not count.isdecimal() or int(count) == 0):
            raise UserError(f"{paths[0]}: shapes:N has N scenes to train on, 1 or more")
        scarce = split == "train" and bool(colon)
        return cls(split, image_size, int(count) if scarce else None, scarce)

    def __len__(self):
        return self.per_scene * self.count

    def __getitem__(self, i):
        captions = describe(self.scene(i))
        return Picture(f"{self.split} scene {i}", captions, captions[0])

    def image(self, i, view=None):
        return draw_scene(self.scene(i), self.image_size, self.rng("drawing", i))

    def places(self, i):
        """Where the things of picture i are: [(x, y, radius), …] in its pixels."""
        things = arrange(self.scene(i), self.image_size, self.rng("drawing", i))
        return [(x, y, radius) for _, x, y, radius, _ in things]

    def caption_ends(self):
        """Where the captions of each picture end, among all captions: (n,) int64."""
        return np.arange(2, 2 * self.count + 2, 2)

    def corpus(self):
        """Captions, questions and statements of the whole world, in which every word comes often."""
        world = World("train", self.image_size)
        texts = [caption for i in range(2000) for caption in describe(world.scene(i))]
        for i in range(0, 2000, 10):
            texts += [world.question(i)[0], world.statement(i)[0]]
        return texts

    def rng(self, purpose, i):
        return random.Random(f"{purpose} {self.name} {i}")

    def scene(self, i):
        return make_scene(self.split, random.Random(f"{self.name} {i}"), self.things)

    def question(self, i):
        """Question i, on scene i // TIMES → (text, answer, type of the answer as in VQA 2.0)."""
        return ask(self.scene(i // TIMES), self.rng("question", i))

    def statement(self, i):
        """Statement i // TIMES → (text, holds(left scene, right scene), does it hold of the pair of
        images i?). Every statement comes with TIMES pairs of images, and is true of half of
        them."""
        rng = self.rng("statement", i // TIMES)
        text, holds = state(rng, self.things)
        labels = rng.sample([True, False] * (TIMES // 2), TIMES)
        return text, holds, labels[i % TIMES]

    def image_pair(self, i):
        """The left and the right image of statement i."""
        _, holds, label = self.statement(i)
        rng = self.rng("pair", i)
        scenes = [make_scene(self.split, rng, self.things) for _ in range(2)]
        while holds(*scenes) != label:
            scenes[rng.randrange(2)] = make_scene(self.split, rng, self.things)
        return tuple(draw_scene(scene, self.image_size, rng) for scene in scenes)


# ---- Scenes and captions -------------------------------------------------------------------------


def make_scene(split, rng, kind="any"):
    """A scene whose meaning belongs to a split, of things of this kind."""
    meaning = "test" if split == "rare" else split  # the split that its meaning belongs to
    while True:
        things = [make_thing(rng, kind) for _ in range(rng.choice((2, 3)))]
        scene = {"layout": rng.choice(list(LAYOUTS)), "things": things}
        tenth = stable_hash(describe(scene)[0]) % 10
        home = {9: "test", 8: "val"}.get(tenth, "train")
        if home == meaning:
            return scene


def make_thing(rng, kind="any"):
    """A thing. kind: "any"; "scarce", the k-th color or shape comes 1/k times as often as the first
    (Zipf's law); "rare", both are of the second half of their list, as in one scarce thing of 17."""
    thing = {"size": rng.choice(list(SIZES))}
    for name, values in {"color": list(COLORS), "shape": SHAPES}.items():
        if kind == "scarce":
            thing[name] = rng.choices(values, [1 / k for k in range(1, len(values) + 1)])[0]
        else:
            thing[name] = rng.choice(values[len(values) // 2 :] if kind == "rare" else values)
    return thing


def describe(scene):
    """All the captions that are right for a scene."""
    names = [f"a {thing['size']} {thing['color']} {thing['shape']}" for thing in scene["things"]]
    before, after, forwards, backwards = LAYOUTS[scene["layout"]]
    if len(names) == 2:
        first, last = names
        return [f"{first} {before} {last}", f"{last} {after} {first}"]
    first, middle, last = names
    return [f"{first}, {middle} and {last} {forwards}", f"{last}, {middle} and {first} {backwards}"]


# ---- Drawing -------------------------------------------------------------------------------------


def draw_scene(scene, size, rng):
    """The scene as an RGB image (size, size); places, sizes and colors vary a little at random."""
    canvas = 2 * size  # drawn twice as large, then averaged: smooth edges
    image = Image.new("RGB", (canvas, canvas), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for shape, x, y, r, color in arrange(scene, canvas, rng):
        if shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
        elif shape == "ring":
            draw.ellipse((x - r, y - r, x + r, y + r), outline=color, width=max(1, round(0.35 * r)))
        elif shape == "square":
            draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=color)
        elif shape == "cross":
            draw.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), fill=color)
            draw.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), fill=color)
        else:
            corners = CORNERS[shape]
            draw.polygon([(x + far * r * math.sin(a), y - far * r * math.cos(a)) for far, a in corners], fill=color)
    return image.reduce(2)


def arrange(scene, size, rng):
    """How a scene is drawn on (size, size) pixels: for each thing (shape, x, y, radius, color)."""
    things, n = [], len(scene["things"])
    for place, thing in enumerate(scene["things"]):
        along = (place + 0.5 + rng.uniform(-0.06, 0.06)) / n
        across = rng.uniform(0.35, 0.65)
        x, y = (along, across) if scene["layout"] == "row" else (across, along)
        radius = 0.155 * SIZES[thing["size"]] * rng.uniform(0.92, 1.08)
        color = tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in COLORS[thing["color"]])
        things.append((thing["shape"], x * size, y * size, radius * size, color))
    return things


# ---- Questions and statements --------------------------------------------------------------------


def colors_of(scene):
    return {thing["color"] for thing in scene["things"]}


def with_article(noun):
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def ask(scene, rng):
    """A question about a scene: (text, answer, type of the answer as in VQA 2.0)."""
    things, kind = scene["things"], rng.choice(("yes/no", "number", "other"))

    # Whether a color is there; as often yes as no
    if kind == "yes/no":
        present, answer = colors_of(scene), rng.choice(("yes", "no"))
        color = rng.choice([color for color in COLORS if (color in present) == (answer == "yes")])
        return f"is there {with_article(f'{color} shape')}?", answer, kind

    # How many things there are, or how many of a color or a shape
    if kind == "number":
        like = rng.choice(things) if rng.random() < 0.6 else make_thing(rng)
        color, shape = like["color"], like["shape"]
        wanted, noun = rng.choice((({}, "shape"), ({"color": color}, f"{color} shape"), ({"shape": shape}, shape)))
        plural = f"{noun}es" if noun[-1] == "s" else f"{noun}s"
        number = sum(wanted.items() <= thing.items() for thing in things)
        return f"how many {plural} are there?", str(number), kind

    # The color, shape or size of a thing, which is named by another property or by its place
    about, thing = rng.choice(("color", "shape", "size")), rng.choice(things)
    by = rng.choice([name for name in ("color", "shape") if name != about])
    noun = thing["shape"] if by == "shape" else f"{thing['color']} shape"
    alike = sum(other[by] == thing[by] for other in things)
    if rng.random() < 0.5 or alike > 1:
        end = rng.choice((0, -1))
        thing, noun = things[end], f"shape {ENDS[scene['layout']][end]}"
    return f"what {about} is the {noun}?", thing[about], kind


def state(rng, kind="any"):
    """A statement about two scenes of things of a kind: (text, holds), holds(left, right) → bool."""
    color = make_thing(rng, kind)["color"]
    side, total = rng.choice((0, 1)), rng.choice((4, 5, 6))
    name, number = ("left", "right")[side], {4: "four", 5: "five", 6: "six"}[total]
    what = with_article(f"{color} shape")
    kinds = [  # how often it comes, the statement, what it means
        (3, f"the {name} image shows {what}.", lambda *scenes: color in colors_of(scenes[side])),
        (2, f"both images show {what}.", lambda left, right: color in colors_of(left) & colors_of(right)),
        (2, f"neither image shows {what}.", lambda left, right: color not in colors_of(left) | colors_of(right)),
        (1, f"only one image shows {what}.", lambda left, right: color in colors_of(left) ^ colors_of(right)),
        (1, f"the images show {number} shapes in all.", lambda *scenes: sum(map(size, scenes)) == total),
        (1, f"the {name} image shows more shapes.", lambda *scenes: size(scenes[side]) > size(scenes[1 - side])),
    ]
    [(_, text, holds)] = rng.choices(kinds, [often for often, _, _ in kinds])
    return text, holds


def size(scene):
    return len(scene["things"])
