"""Files as users have them: pictures, manifests, official files, shards, released weights."""

import functools
import io
import json
import math
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def picture(path, color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)


def write_lines(path, *lines):
    """A file of lines: texts as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


# ---- Pairs ---------------------------------------------------------------------------------------


def pictures(folder, count=6, split="train"):
    """A manifest of single-colored images with two captions each → its folder."""
    lines = []
    for i in range(count):
        picture(folder / f"{i}.png", (40 * i % 256, 15 * i % 256, 100))
        lines.append({"image": f"{i}.png", "captions": [f"picture number {i}", "a color"]})
    write_lines(folder / f"{split}.jsonl", *lines)
    return folder


def records(source):
    """All of a source."""
    return [source[i] for i in range(len(source))]


def karpathy(folder, *images, name="coco"):
    write_lines(folder / f"dataset_{name}.json", {"dataset": name, "images": images})


def entry(name, split, *captions, **more):
    """An image in Karpathy's file."""
    sentences = [{"raw": text, "tokens": text.split(), "sentid": 0} for text in captions]
    return {"filename": name, "split": split, "sentences": sentences} | more


def png(level):
    """The bytes of a gray picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, members, form=tarfile.GNU_FORMAT):
    """members: {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


# ---- Tasks ---------------------------------------------------------------------------------------


def vqa(folder, subset="train2014", ids=(1, 2, 3), annotated=None, **changes):
    """A split of VQA 2.0 in the published schema, with its pictures → its folder. annotated: the
    questions with answers, if not all."""
    annotated = ids if annotated is None else annotated
    given = [{"answer": "two", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
    questions, annotations = [], []
    for id in ids:
        questions.append({"image_id": 10 + id, "question": f"What is {id}?", "question_id": id})
        picture(folder / subset / f"COCO_{subset}_{10 + id:012d}.jpg")
    for id in annotated:
        annotations.append({
            "question_type": "what is", "multiple_choice_answer": "2", "answers": given,
            "image_id": 10 + id, "answer_type": "number", "question_id": id,
        })  # fmt: skip
    content = {"data_subtype": subset, "questions": questions} | changes
    write_lines(folder / f"v2_OpenEnded_mscoco_{subset}_questions.json", content)
    if annotated:
        content = {"data_subtype": subset, "annotations": annotations} | changes
        write_lines(folder / f"v2_mscoco_{subset}_annotations.json", content)
    return folder


def nlvr2(folder, split="dev", name="dev.json", **changes):
    """Two pairs of images with one statement, in the release's schema and layout → its folder.
    changes: of both lines; None: the key is not there."""
    lines = []
    for pair in range(2):
        line = {"identifier": f"{split}-5-{pair}-0", "sentence": "Both are red."}
        line |= {"label": str(pair == 0), "synset": "dog"}
        within = folder / split
        if split == "train":
            line["directory"] = 42
            within = within / "42"
        for side, color in enumerate(("red", "blue")):
            picture(within / f"{split}-5-{pair}-img{side}.png", color)
        line |= changes
        lines.append({key: value for key, value in line.items() if value is not None})
    write_lines(folder / name, *lines)
    return folder


# ---- Released weights ----------------------------------------------------------------------------

CASES = json.loads(Path(__file__).with_name("released.json").read_text())
CASES = {case["name"]: case for case in CASES}


def shapes_of(name, layers=4, vl_layers=1):
    """{key: shape} of a reference file, or of one with more layers."""
    shapes = {}
    for shape, keys in CASES[name]["tensors"].items():
        sizes = tuple(int(size) for size in shape.split("x") if size)
        for key in keys:
            first = 0 if "*" in key else layers - vl_layers  # "blocks.3." has the VL expert
            for i in range(first, layers):
                shapes[re.sub(r"blocks\.[*3]\.", f"blocks.{i}.", key)] = sizes
    return shapes


@functools.cache
def released(name):
    """The state dict of a reference file."""
    state = {}
    for key, shape in shapes_of(name).items():
        tensor = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape) * 0.05
        tensor += 1.0 * (key.endswith("weight") and len(shape) == 1) + 0.5 * ("gamma_" in key)
        tensor += math.log(1 / 0.07) * key.startswith("logit_")
        state[key] = torch.tensor(tensor, dtype=torch.float32)
    return state
