"""Damaged files for every reader: it succeeds, or refuses the file with one line.

    python stress/fuzz.py --cases 10000

A case takes a good file, damages it (flips, cuts, repeats or replaces bytes; or changes a JSON value into
one of another kind), and reads it. The same seed gives the same cases.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import random
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent.parent / "tests"), str(Path(__file__).parent.parent)]

import files
from files import entry, karpathy, picture, png, records, write_lines, write_shard

import checkpoint
import glue
import images
import log
import nlvr2
import runtime
import sources
import texts
import vqa
import weights
from mome import Config, VLMo
from runtime import UserError
from sides import bare
from stages import VL

SMALL = Config(dim=8, layers=1, heads=1, vl_layers=1, image_size=8, patch_size=4, vocab_size=9, max_text_len=4)

# ---- Good files ----------------------------------------------------------------------------------


READERS = {}  # kind: (the damaged file, what writes the good files into a folder, what reads them)


def reader(kind, file):
    """Registers a function that writes good files and returns a function that reads them."""

    def register(function):
        READERS[kind] = file, function
        return function

    return register


def pairs(path):
    return records(sources.pictures([path.parent], "train", 8))


def sentences(path):
    return records(glue.read(glue.TASKS["sst-2"], [path.parents[1]], "train"))


def encoded(path):
    return texts.Words(texts.load_tokenizer(path), 8).encode("a dog")


PAIRS = [{"image": f"{name}.png", "captions": ["a dog", "dogs"], "item": name} for name in "ab"]
TABLE = ["filepath,title", "a.png,a dog", 'a.png,"""dogs"""', "b.png,a cat"]
QUESTION = {"image": "a.png", "question": "What?", "answers": ["a", "b"]}
STATEMENT = {"images": ["a.png"] * 2, "sentence": "Red.", "label": True}
FILMS = ["sentence\tlabel", "good film\t1", "bad film\t0"]
WORDS = texts.wordpiece({piece: i for i, piece in enumerate([*texts.SPECIAL, "a", "dog"])})
LINES = {  # kind: the file that is damaged, its lines, what reads it; a.png and b.png are there, too
    "manifest of pairs": ("train.jsonl", PAIRS, pairs),
    "csv": ("train.csv", TABLE, pairs),
    "tsv": ("train.tsv", [line.replace(",", "\t") for line in TABLE], pairs),
    "own questions": ("train.jsonl", [QUESTION], lambda path: records(vqa.read([path.parent], "train", 8))),
    "own statements": ("train.jsonl", [STATEMENT], lambda path: records(nlvr2.read([path.parent], "train", 8))),
    "GLUE's sentences": ("SST-2/train.tsv", FILMS, sentences),
    "text": ("a.txt", ["one", "", "two", "lines"], lambda path: list(texts.read_documents([path]))),
    "vocabulary": ("vocab.txt", [*texts.SPECIAL, "a", "##b", "dog"], encoded),
    "tokenizer": ("tokenizer.json", [WORDS.to_str()], encoded),
    "metrics.jsonl": ("metrics.jsonl", [{"step": 5, "itc": 0.5}, {"step": 9, "itc": 0.25}], log.read_metrics),
}


def reader_of_lines(file, lines, read):
    def write(folder):
        for name in "ab":
            picture(folder / f"{name}.png")
        write_lines(folder / file, *lines)
        return functools.partial(read, folder / file)

    return write


for kind, (file, lines, read) in LINES.items():
    READERS[kind] = file, reader_of_lines(file, lines, read)


@reader("Karpathy's file", "dataset_coco.json")
def karpathys(folder):
    picture(folder / "val2014/a.jpg")
    karpathy(folder, entry("a.jpg", "train", "a dog", filepath="val2014"))
    return lambda: records(sources.pictures([folder], "train", 8))


@reader("shard", "train/0.tar")
def shard(folder):
    members = {"a.png": png(1), "a.txt": b"a dog\ndogs", "b.json": b'{"caption": "a cat"}', "b.png": png(2)}
    write_shard(folder / "train/0.tar", members | {"long" * 40 + ".png": png(3)})
    (folder / "val").mkdir()

    def read():
        source = sources.pictures([folder], "train", 8)
        for i in range(len(source)):
            with contextlib.suppress(images.Unreadable):
                source.image(i)

    return read


@reader("text next to an image", "train/a.txt")
def text_of_image(folder):
    picture(folder / "val/c.png")
    for name in "ab":
        picture(folder / f"train/{name}.png")
        write_lines(folder / f"train/{name}.txt", "a dog", "two dogs")
    return lambda: records(sources.pictures([folder], "train", 8, captions=True))


@reader("VQA 2.0's questions", "v2_OpenEnded_mscoco_train2014_questions.json")
@reader("VQA 2.0's annotations", "v2_mscoco_train2014_annotations.json")
def official_questions(folder):
    files.vqa(folder, ids=(1,))
    return lambda: records(vqa.read([folder], "train", 8))


@reader("NLVR2's statements", "train.json")
def statements(folder):
    files.nlvr2(folder, "train", "train.json")
    return lambda: records(nlvr2.read([folder], "train", 8))


@reader("checkpoint", "last.pt")
def a_checkpoint(folder):
    stage = bare(VL, VLMo(SMALL))
    stage.tokenizer = texts.wordpiece({piece: i for i, piece in enumerate([*texts.SPECIAL, *"abcd"])})
    args = argparse.Namespace(stage="vl", config="tiny", keep_previous=False)
    checkpoint.save(folder / "last.pt", stage, args, runtime.Runtime(), 3, 0.5)
    return lambda: checkpoint.load_model(folder / "last.pt")


@reader("released file", "vlmo.pt")
def released(folder):
    torch.save({"module": files.released("retrieval-absolute")}, folder / "vlmo.pt")
    return lambda: weights.from_vlmo(weights.read_file(folder / "vlmo.pt"), 4, 20)


@functools.cache
def noise(ending):
    """The bytes of a small picture."""
    levels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    try:
        Image.fromarray(levels).save(buffer, Image.registered_extensions()[ending])
    except (OSError, ValueError, KeyError):  # a format of another mode, or not of this build
        buffer = io.BytesIO()
        Image.fromarray(levels).convert("L").save(buffer, "PNG")
    return buffer.getvalue()


def image_reader(ending):
    def image(folder):
        (folder / f"a{ending}").write_bytes(noise(ending))
        return lambda: images.read_image(folder / f"a{ending}")

    return image


Image.init()
FORMATS = {form: ending for ending, form in sorted(Image.registered_extensions().items()) if form in Image.SAVE}
for form, ending in FORMATS.items():
    READERS[f"image {form}"] = f"a{ending}", image_reader(ending)

# ---- Damage --------------------------------------------------------------------------------------

ODD = [None, True, -1, 10**30, 1e308, "", "x" * 5000, "\ud800", "\0", [], {}, [[]], {"a": {}}, "../..", 0.5]


def damage(content, rng):
    """Bytes, some of them damaged."""
    kind = rng.choice(("flip", "cut", "zero", "repeat", "insert", "replace", "json", "json", "deep"))
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice((1, 4, 100, 4096)))
    if kind == "flip":
        return content[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in content[at:end]) + content[end:]
    if kind == "cut":
        return content[:at]
    if kind == "zero":
        return content[:at] + bytes(end - at) + content[end:]
    if kind == "repeat":
        return content[:end] + content[at:]
    if kind == "insert":
        return content[:at] + rng.randbytes(rng.choice((1, 8, 500))) + content[at:]
    if kind == "replace":
        return rng.choice((b"", b"5", b"\xff\xfe", b"{", b"null\n", b"[" * 100_000, b"1" * 6000, rng.randbytes(300)))
    if kind == "deep":
        return content.replace(b":", b":" + b"[" * 100_000, 1)
    return change_json(content, rng)


def change_json(content, rng):
    """JSON, or JSON lines, with another value somewhere; other content as it is."""
    lines = content.split(b"\n")
    number = rng.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except (ValueError, RecursionError):
        return content
    lines[number] = json.dumps(changed(value, rng)).encode()
    return b"\n".join(lines)


def changed(value, rng):
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {name: one for name, one in value.items() if name != key}
        return value | {key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], changed(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def run(cases, seed=0):
    """→ {kind: Counter of "read" and "refused"}, and the cases that did anything else."""
    outcomes, wrong = collections.defaultdict(collections.Counter), []
    kinds = list(READERS)
    for case in range(cases):
        kind = kinds[case % len(kinds)]
        file, prepare = READERS[kind]
        rng = random.Random(f"{seed} {case}")
        with tempfile.TemporaryDirectory() as folder:
            read = prepare(Path(folder))
            path = Path(folder, file)
            path.write_bytes(damage(path.read_bytes(), rng))
            try:
                read()
                outcomes[kind]["read"] += 1
            except (UserError, OSError) as error:
                outcomes[kind]["refused"] += 1
                if "\n" in str(error):
                    wrong.append((case, kind, f"two lines: {error}"))
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                wrong.append((case, kind, repr(error)[:300]))
    return outcomes, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    outcomes, wrong = run(args.cases, args.seed)
    for kind, found in outcomes.items():
        print(f"{kind:24} {found['read']:6} read {found['refused']:6} refused")
    for case, kind, error in wrong:
        print(f"case {case}, {kind}: {error}")
    print(f"{args.cases} cases, {len(wrong)} neither read nor refused in one line")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
