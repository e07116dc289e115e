"""Pairs, images and text: WordPiece, masking, augmentation, data sets on disk, and the built-in world of shapes.

A *source* has `len(source)`; `source[i]`, what is known of sample i: a Picture, Question, Statement or Labelled;
and `source.image(i)`, RGB, or a pair of images. Sources with captions also have `source.corpus()`, text to train a
vocabulary on, and `source.by_text`: in retrieval a caption is right for every picture that has it; False: for its own.
Every random choice about a sample is a function of (seed, epoch, index): workers may come and go.

Shape letters: B batch, T text tokens with [T_CLS] and [T_SEP], S side of a square image in pixels.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the loader's forks

import numpy as np
import tokenizers
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch.utils.data import Dataset

IGNORE = -100  # a label that is not predicted


class DataError(Exception):
    """Data that cannot be used: one line that says which and why."""


class Unreadable(DataError):
    """An image file that cannot be read."""


# ---- Text: WordPiece and whole-word masking (Sections 3.1, 3.3) ------------------------------------------------------

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece(vocab=None):
    """BERT's uncased tokenizer over a {word piece: id} table; without one, ready to be trained."""
    model = tokenizers.models.WordPiece(vocab or {}, unk_token="[UNK]", max_input_chars_per_word=100)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer


def train_tokenizer(captions, vocab_size):
    """WordPiece of at most `vocab_size` entries, trained on a list of captions; the same every time.

    The library numbers the inner letters ("##a") in the order of a salted hash, and its ties with them, unless they are
    handed to it as given.
    """
    tokenizer = wordpiece()
    letters = sorted(set("".join(map(tokenizer.normalizer.normalize_str, captions))) - set(" "))
    given = SPECIAL + ["##" + letter for letter in letters]
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=given, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    return wordpiece(tokenizer.get_vocab())


def load_tokenizer(path):
    """From `vocab.txt` (one piece a line, as BERT's) or `tokenizer.json`. DataError if it is neither."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"vocabulary {path} cannot be read: {error}") from None
    if Path(path).suffix == ".json":
        return tokenizer_from_json(text, path)
    pieces = text.removesuffix("\n").split("\n")
    tokenizer = wordpiece({piece.removesuffix("\r"): i for i, piece in enumerate(pieces)})
    return check_tokenizer(tokenizer, path)


def tokenizer_from_json(text, path):
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path} holds no tokenizer: {error}") from None
    return check_tokenizer(tokenizer, path)


def check_tokenizer(tokenizer, path):
    if not isinstance(tokenizer.model, tokenizers.models.WordPiece):
        raise DataError(f"vocabulary {path} is not WordPiece but {type(tokenizer.model).__name__}")
    absent = [token for token in SPECIAL if tokenizer.token_to_id(token) is None]
    if absent:
        raise DataError(f"vocabulary {path} lacks {', '.join(absent)}")
    ids = sorted(tokenizer.get_vocab().values())
    if ids != list(range(len(ids))):
        raise DataError(f"vocabulary {path} has an entry twice or a number without one: {len(ids)} up to {ids[-1]}")
    tokenizer.no_padding()  # Words pads and cuts
    tokenizer.no_truncation()
    return tokenizer


class Words:
    """Captions as token ids of one length: [T_CLS] words [T_SEP] padding."""

    def __init__(self, tokenizer, length):
        self.tokenizer, self.length, self.size = tokenizer, length, tokenizer.get_vocab_size()
        self.pad, self.cls, self.sep, self.mask = (tokenizer.token_to_id(SPECIAL[i]) for i in (0, 2, 3, 4))
        self.inner = np.zeros(self.size, dtype=bool)  # pieces that continue a word
        self.inner[[i for piece, i in tokenizer.get_vocab().items() if piece.startswith("##")]] = True

    def frame(self, pieces):
        """Piece ids, at most T−2 of them → ids (T,) int64, mask (T,) bool, True = real token."""
        ids = torch.full((self.length,), self.pad)
        ids[: len(pieces) + 2] = torch.tensor([self.cls, *pieces, self.sep])
        return ids, torch.arange(self.length) < len(pieces) + 2

    def encode(self, caption):
        """As `frame`; what is too long is cut."""
        return self.frame(self.tokenizer.encode(caption, add_special_tokens=False).ids[: self.length - 2])

    def words(self, ids):
        """ids (T,) → the positions of each word's pieces: those that start with "##" belong to the piece before."""
        words, inner = [], False  # inner: is there a word that a piece can continue?
        for position, piece in enumerate(ids.tolist()):
            if piece in (self.pad, self.cls, self.sep):
                inner = False
            elif inner and self.inner[piece]:
                words[-1].append(position)
            else:
                words.append([position])
                inner = True
        return words

    def mask_words(self, ids, rng):
        """Masks 15 % of the words whole, at least one where there is any: each of their tokens becomes [MASK] in 80 %,
        a random token in 10 %, itself in 10 %. → masked ids (T,), labels (T,) with −100 where nothing is predicted."""
        masked, labels, words = ids.clone(), torch.full_like(ids, IGNORE), self.words(ids)
        for word in rng.sample(words, min(len(words), max(1, round(0.15 * len(words))))):
            for position in word:
                labels[position] = ids[position]
                choice = rng.random()
                if choice < 0.9:
                    masked[position] = self.mask if choice < 0.8 else rng.randrange(self.size)
        return masked, labels


# ---- Images: reading, and augmentation in Pillow (Section 4.1) -------------------------------------------------------

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on broken files
GRAY = (128, 128, 128)


def read_image(path):
    """RGB; what is transparent shows white. Unreadable, with the path, if it is no image."""
    try:
        with Image.open(path) as image:
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UNREADABLE as error:
        raise Unreadable(f"{path} cannot be read: {error}") from None


def to_tensor(image, view=lambda image: image):
    """RGB image → uint8 (3, S, S) of view(image); a pair of images → (2, 3, S, S)."""
    if isinstance(image, tuple):
        return torch.stack([to_tensor(one, view) for one in image])
    return torch.from_numpy(np.array(view(image))).permute(2, 0, 1).contiguous()


def resize(image, size):
    return image.resize((size, size), Image.Resampling.BICUBIC)


def random_resized_crop(image, size, rng):
    """A crop of 50–100 % of the area and of 3:4 to 4:3, resized to a square."""
    width, height = image.size
    for _ in range(10):
        target = rng.uniform(0.5, 1) * width * height
        ratio = math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.randint(0, width - w), rng.randint(0, height - h)
            return image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    return resize(image, size)  # very long or tall images


def affine(image, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    matrix = (a, b, c, d, e, f)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GRAY)


OPERATIONS = {  # of RandAugment, as (image, level 0 … 1, sign ±1): those that leave colours their names
    "identity": lambda image, level, sign: image,
    "auto-contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "brightness": lambda image, level, sign: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * level),
    "sharpness": lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * level),
    "shear-x": lambda image, level, sign: affine(image, b=0.3 * level * sign),
    "shear-y": lambda image, level, sign: affine(image, d=0.3 * level * sign),
    "translate-x": lambda image, level, sign: affine(image, c=10 / 224 * image.width * level * sign),
    "translate-y": lambda image, level, sign: affine(image, f=10 / 224 * image.height * level * sign),
    "rotate": lambda image, level, sign: image.rotate(30 * level * sign, Image.Resampling.BILINEAR, fillcolor=GRAY),
}


def rand_augment(image, rng):
    """RandAugment(2, 7): two operations, drawn with replacement, at magnitude 7 of 10."""
    for operation in rng.choices(list(OPERATIONS.values()), k=2):
        image = operation(image, 0.7, rng.choice((-1, 1)))
    return image


AUGMENTATIONS = ("none", "crop", "randaugment")


def augment(image, size, rng, kind="randaugment", flip=False):
    """A training view (S, S): "none" (resized), "crop" (random resized crop), "randaugment" (crop, then both)."""
    image = resize(image, size) if kind == "none" else random_resized_crop(image, size, rng)
    if flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return rand_augment(image, rng) if kind == "randaugment" else image


# ---- Blockwise masking (Section 3.4, as in BEiT) ---------------------------------------------------------------------

MASKED, SMALLEST = 75 / 196, 16 / 196  # of all patches: how many are hidden, and the smallest block


def mask_blocks(side, rng):
    """Which of side × side patches are hidden: (side², ) bool, row by row, True = hidden.

    Blocks of random size, 3:1 to 1:3, at random places, each with at least SMALLEST of the grid, until MASKED of it is
    hidden (rounded up or down at random, so that small grids have their share) and never more: a block that would add
    more, or nothing, is drawn again, a hundred times at most.
    """
    wanted, smallest = int(MASKED * side * side + rng.random()), max(1, round(SMALLEST * side * side))
    hidden = np.zeros((side, side), dtype=bool)
    for _ in range(100):
        missing = wanted - int(hidden.sum())
        if not missing:
            break
        area = rng.uniform(smallest, max(smallest, missing))
        aspect = math.exp(rng.uniform(-math.log(3), math.log(3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h * w < smallest or max(h, w) > side:
            continue
        y, x = rng.randint(0, side - h), rng.randint(0, side - w)
        if 0 < h * w - int(hidden[y : y + h, x : x + w].sum()) <= missing:
            hidden[y : y + h, x : x + w] = True
    return torch.from_numpy(hidden.flatten())


# ---- Sources on disk -------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """With captions, or none; pictures of one item are no negatives of each other."""

    image: str  # the path
    captions: list
    item: str


class Records:
    """A source on disk, of records of one kind: one JSON line each in one array of bytes, which forked workers share
    without copying. Their `image` is a path, or a pair of paths."""

    def __init__(self, kind, records, by_text=True):
        self.kind, self.by_text = kind, by_text
        lines = [json.dumps(record, default=str).encode() for record in records]
        self.ends = np.cumsum([0] + [len(line) for line in lines])
        self.bytes = np.frombuffer(b"".join(lines), dtype=np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        return self.kind(*json.loads(self.bytes[self.ends[i] : self.ends[i + 1]].tobytes()))

    def image(self, i):
        path = self[i].image
        return read_image(path) if isinstance(path, str) else tuple(map(read_image, path))

    def count_captions(self):
        return sum(len(self[i].captions) for i in range(len(self)))

    def corpus(self):
        captions = (lambda record: record.captions) if self.kind is Picture else (lambda record: [record.text])
        return [text for i in range(len(self)) for text in captions(self[i])]


def read_json(path, text=None, where=None):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8") if text is None else text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{where or path}: no valid JSON: {error}") from None


def check_captions(captions, where):
    """captions, or DataError unless they are a list of at least one string (of characters that can be encoded)."""
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise DataError(f"{where}: captions must be a list of at least one string, not {json.dumps(captions)[:80]}")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: a caption is no valid text: {error}") from None
    return captions


def json_lines(path):
    """(where, value) of each line that is not blank."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, read_json(path, line, where)


def read_manifest(path, split):
    """{"image": path below the manifest's folder, "captions": [str, …], "item": optional}, one a line."""
    for where, entry in json_lines(path):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise DataError(f'{where}: needs {{"image": path, "captions": [text, …]}}')
        item, file = entry.get("item"), Path(path).parent / entry["image"]
        if not isinstance(item, str | int | None):
            raise DataError(f"{where}: item must be a text or a number, not {json.dumps(item)[:80]}")
        yield file, check_captions(entry.get("captions"), where), str(file if item is None else item)


def read_karpathy(path, split):
    """Karpathy's dataset_coco.json or dataset_flickr30k.json; training includes COCO's "restval"."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f'{path}: not Karpathy\'s format: it has no list of "images"')
    folder = Path(path).parent
    roots = [folder, folder / "images", folder / "flickr30k-images", folder / "flickr30k_images"]
    for number, entry in enumerate(content["images"]):
        where = f"{path}, image {number}"
        try:
            name, own = Path(entry.get("filepath", ""), entry["filename"]), entry["split"]
            captions = [sentence["raw"] for sentence in entry["sentences"]]
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{where}: needs filename, split, and sentences with raw text") from None
        if own == split or (own == "restval" and split == "train"):
            file = next((root / name for root in roots if (root / name).exists()), folder / name)
            yield file, check_captions(captions, where), str(file)


def find_split(folder, split):
    """What one --data folder has of a split: (file, its reader), or None. A manifest goes before Karpathy's JSON."""
    readers = {
        f"{split}.jsonl": read_manifest,
        "dataset_coco.json": read_karpathy,
        "dataset_flickr30k.json": read_karpathy,
    }
    return next(((Path(folder, name), readers[name]) for name in readers if Path(folder, name).exists()), None)


IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def files_below(folder, endings):
    """All files below a folder that end so, in order; folders that cannot be read are errors, too."""

    def refuse(error):
        raise DataError(f"{error.filename} cannot be read: {error.strerror}")

    walk = os.walk(folder, onerror=refuse, followlinks=True)
    return sorted(
        os.path.join(where, name) for where, _, names in walk for name in names if name.lower().endswith(endings)
    )


def dealt(name):
    """The split of what has none: by a hash of its name or text, a fiftieth each to val and test."""
    return {0: "test", 1: "val"}.get(stable_hash(name) % 50, "train")


def find_images(folder, split):
    """Image files below a folder: (path, no captions, item). A folder with `train` and `val` or `test` has folders of
    splits; the files of any other are dealt."""
    if Path(folder, "train").is_dir() and (Path(folder, "val").is_dir() or Path(folder, "test").is_dir()):
        folder = Path(folder, split)
        yield from ((path, [], path) for path in (files_below(folder, IMAGES) if folder.is_dir() else []))
    else:
        files = files_below(folder, IMAGES)
        yield from ((path, [], path) for path in files if dealt(os.path.relpath(path, folder)) == split)


def refuse_missing(source, split):
    """DataError that names the images of a source that do not exist; each folder is asked once."""
    present = functools.cache(lambda folder: set(os.listdir(folder)) if os.path.isdir(folder) else set())
    images = (source[i].image for i in range(len(source)))
    paths = dict.fromkeys(path for image in images for path in ([image] if isinstance(image, str) else image))
    missing = [path for path in paths if os.path.basename(path) not in present(os.path.dirname(path) or ".")]
    if missing:
        names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise DataError(f"{len(missing)} of the {len(paths)} images of split {split} are missing: {names}")


def read_sources(data, split, image_size, needed=True, captions=True):
    """The source that --data names: "shapes", or one or more folders. DataError before any work if files are missing.

    needed: every folder must have the split; else the source is that of those that do, or None if none does.
    captions: False takes folders of images, too, where no file says what they show.
    """
    if list(data) == ["shapes"]:
        return Shapes(split, image_size)
    records, by_text, named = [], True, "train.jsonl, dataset_coco.json or dataset_flickr30k.json"
    for folder in data:
        if Path(folder).is_file():
            raise DataError(
                f"--data {folder}: is a file; this stage takes {'pairs' if captions else 'images'} in a folder"
            )
        if not Path(folder).is_dir():
            raise DataError(f"--data {folder}: no such folder")
        if found := find_split(folder, split):
            records.append(found[1](found[0], split))
            by_text = by_text and found[1] is read_manifest
        elif not captions and not any(find_split(folder, name) for name in SPLITS):
            records.append(find_images(folder, split))
        elif needed:
            raise DataError(f"--data {folder}: has no captions: no {named.replace('train', split)}")
    source = Records(Picture, itertools.chain.from_iterable(records), by_text)
    if not len(source) and needed:
        raise DataError(f"--data {' '.join(map(str, data))}: no pictures in split {split}")
    refuse_missing(source, split)
    return source if len(source) else None


# ---- The downstream tasks on disk (Section 4) ------------------------------------------------------------------------


class Absent(DataError):
    """Data without the split that was asked for."""


def subset(splits, split):
    """What `splits` calls a split. Absent if it has none of that name."""
    if split not in splits:
        raise Absent(f"there is no split {split}, but {', '.join(splits)}")
    return splits[split]


class Question(NamedTuple):
    """Of VQA 2.0. The last three are None where they are not published (test2015)."""

    image: str
    text: str
    id: int
    answers: list  # of the ten annotators
    majority: str  # the most frequent one
    kind: str  # "yes/no", "number" or "other"


VQA_SUBSETS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}


def read_questions(folder, split):
    """A split of VQA 2.0, as downloaded and unpacked into one folder; of its val2014 "minival" has a fiftieth of the
    images, and "trainval" the rest beside train2014. DataError where the files do not fit together."""
    if split == "minival":
        yield from (record for record in read_questions(folder, "val") if dealt(record[0].name) == "val")
    elif split == "trainval":
        yield from read_questions(folder, "train")
        yield from (record for record in read_questions(folder, "val") if dealt(record[0].name) != "val")
    else:
        yield from join_answers(*read_vqa(folder, subset(VQA_SUBSETS, split)))


def read_vqa(folder, subset):
    """→ file of the questions, [(image path, question, id)], file of the annotations, {id: (answers, majority, type)},
    or None where there is no such file."""
    path = Path(folder, f"v2_OpenEnded_mscoco_{subset}_questions.json")
    answers = Path(folder, f"v2_mscoco_{subset}_annotations.json")
    images = subset.replace("-dev", "")
    root = first_with(images, folder)
    questions, known = [], {} if answers.exists() else None
    for where, entry in listed(path, "questions"):
        try:
            image, text, id = entry["image_id"], entry["question"], entry["question_id"]
            questions.append((root / f"COCO_{images}_{image:012d}.jpg", text, id))
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{where}: needs image_id (a number), question and question_id") from None
        if not isinstance(text, str) or not isinstance(id, int):
            raise DataError(f"{where}: question must be a text and question_id a number")
    for where, entry in listed(answers, "annotations") if answers.exists() else ():
        try:
            id, given = entry["question_id"], [answer["answer"] for answer in entry["answers"]]
            known[id] = given, entry["multiple_choice_answer"], entry["answer_type"]
        except (KeyError, TypeError):
            needs = "question_id, answers, multiple_choice_answer and answer_type"
            raise DataError(f"{where}: needs {needs}") from None
        if not given or not all(isinstance(text, str) for text in (*given, *known[id][1:])):
            raise DataError(f"{where}: answers, multiple_choice_answer and answer_type must be texts")
    return path, questions, answers, known


def join_answers(path, questions, answers, known):
    """Records of Questions. DataError for an id that comes twice, or is in one of the two files alone."""
    seen = set()
    for file, text, id in questions:
        if id in seen:
            raise DataError(f"{path}: question_id {id} comes twice")
        if known is not None and id not in known:
            raise DataError(f"{answers} has no answers to question {id} of {path.name}: are they of another split?")
        seen.add(id)
        yield file, text, id, *(known[id] if known is not None else (None, None, None))
    for id in known or ():
        if id not in seen:
            raise DataError(
                f"{answers} has answers to question {id}, which {path.name} lacks: are they of another split?"
            )


def listed(path, name):
    """(where, entry) of the list of that name in a JSON file."""
    if not path.exists():
        raise Absent(f"{path}: no such file; --data takes the folder with what VQA 2.0's archives hold")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise DataError(f'{path}: not VQA 2.0\'s format: it has no list of "{name}"')
    for number, entry in enumerate(content[name]):
        yield f"{path}, {name} {number}", entry


def first_with(images, folder):
    """Where a folder of images lies: in the folder of the data, or in its `images`."""
    places = [Path(folder, images), Path(folder, "images", images)]
    return next((place for place in places if place.is_dir()), places[0])


class Statement(NamedTuple):
    """Of NLVR2."""

    image: tuple  # left and right
    text: str
    id: str  # split-set-pair-sentence
    label: bool


NLVR2_FILES = {"train": "train", "val": "dev", "dev": "dev", "test": "test1", "test1": "test1"}


def read_statements(folder, split):
    """A split of NLVR2, in the layout of its release: train's images in numbered folders, dev's and test1's in one."""
    name, seen = subset(NLVR2_FILES, split), set()
    places = [Path(folder, below, f"{name}.json") for below in ("", "data", "nlvr2/data")]
    path, root = next((place for place in places if place.exists()), None), first_with(name, folder)
    if path is None:
        raise Absent(f"{places[0]}: no such file; --data takes a folder with NLVR2's json lines and images")
    for where, entry in json_lines(path):
        id, text, label, directory = (
            entry.get(key) if isinstance(entry, dict) else None
            for key in ("identifier", "sentence", "label", "directory")
        )
        if not isinstance(id, str) or not isinstance(text, str) or id.count("-") < 3:
            raise DataError(f"{where}: needs an identifier (split-set-pair-sentence) and a sentence")
        if label not in ("True", "False"):
            raise DataError(f'{where}: {id} has no label "True" or "False"')
        if id in seen:
            raise DataError(f"{where}: identifier {id} comes twice")
        seen.add(id)
        within = root if directory is None else root / str(directory)
        left, right = (within / f"{id.rsplit('-', 1)[0]}-img{side}.png" for side in (0, 1))
        yield (left, right), text, id, label == "True"


class Labelled(NamedTuple):
    """A picture of a class."""

    image: str
    label: str


def read_classes(folder, split):
    """A split of a folder of images, a folder a class: in `train`, `val`, `test`; without these, images are dealt."""
    yield from ((path, Path(path).parent.name) for path, _, _ in find_images(folder, split))


def read_task(task, data, split, image_size):
    """The source of task "vqa", "nlvr2" or "classify" that --data names: "shapes", or one folder. DataError before any
    work if files are missing; Absent if there is no such split."""
    kind, read, world = {
        "vqa": (Question, read_questions, ShapesQuestions),
        "nlvr2": (Statement, read_statements, ShapesStatements),
        "classify": (Labelled, read_classes, ShapesClasses),
    }[task]
    if list(data) == ["shapes"]:
        return world(split, image_size)
    if len(data) > 1:
        raise DataError(f"--data {' '.join(map(str, data))}: task {task} takes one folder")
    if not Path(data[0]).is_dir():
        raise DataError(f"--data {data[0]}: no such folder")
    source = Records(kind, read(data[0], split))
    refuse_missing(source, split)
    if not len(source):
        raise Absent(f"--data {data[0]}: split {split} is empty")
    return source


def samples(source):
    """The samples of a source, to collect its answers or classes from: all on disk, the first 5,000 of the built-in
    world, which have every one."""
    return (source[i] for i in range(len(source) if isinstance(source, Records) else min(len(source), 5000)))


# ---- Answers (VQA 2.0) -----------------------------------------------------------------------------------------------

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
APOSTROPHES = {  # a contraction that lacks one of its apostrophes → the contraction
    word[:at] + word[at + 1 :]: word for word in CONTRACTIONS for at, letter in enumerate(word) if letter == "'"
}


@functools.lru_cache(100_000)
def normalise(answer):
    """An answer as VQA 2.0's evaluation compares them: lower case; without articles, punctuation, and periods but in
    numbers; numbers to ten as digits; contractions with their apostrophes."""
    given = text = " ".join(answer.split())
    joined = re.search(r"\d,\d", given)  # "1,000": then, and next to a space, a sign goes; else it parts two words
    for sign in PUNCTUATION:
        text = text.replace(sign, "" if joined or f"{sign} " in given or f" {sign}" in given else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ("a", "an", "the"))


def answer_vocabulary(majorities):
    """The answers that a model chooses from: the normalised majority answers that come at least 9 times, as they come;
    those of train2014 and val2014 are the usual 3,129."""
    counts = collections.Counter(map(normalise, majorities))
    return [answer for answer, count in counts.items() if count >= 9]


def released_answers(folder):
    """The answers of the released VQA models from a folder of VQA 2.0, in the order of the authors' preprocessing: as
    they come in train2014, then in val2014."""
    files = (read_vqa(folder, subset) for subset in ("train2014", "val2014"))
    return answer_vocabulary(majority for _, _, _, known in files for _, majority, _ in (known or {}).values())


def soft_scores(answers, numbers):
    """The annotators' answers → (A,) float: an answer that n of ten gave scores 0.3 n, at most 1. numbers: {answer:
    its number among A}."""
    scores = torch.zeros(len(numbers))
    for answer in map(normalise, answers):
        if answer in numbers:
            scores[numbers[answer]] += 0.3
    return scores.clamp(max=1)


# ---- Plain text (Section 3.4) ----------------------------------------------------------------------------------------


def text_files(data):
    """Text files, or those of folders with *.txt below. DataError if there is none."""
    found = []
    for path in map(Path, data):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if path.is_file() and path.suffix.lower() in (*IMAGES, ".json", ".jsonl"):
            raise DataError(f"{path}: plain text is wanted here")
        files = files_below(path, (".txt",)) if path.is_dir() else [str(path)]
        if not files:
            raise DataError(f"{path}: plain text is wanted here, and there is no *.txt below")
        found += files
    return found


def read_lines(path):
    """The lines of a text file, stripped. DataError if it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            yield from map(str.strip, file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from None


def documents(path):
    """The documents of a text file: what stands between blank lines; in a file without any inside, its lines."""
    texts = lambda: itertools.groupby(read_lines(path), key=bool)  # runs of blank lines and of others
    several = itertools.islice((filled for filled, _ in texts() if filled), 1, 2)
    if any(several):
        yield from (" ".join(lines) for filled, lines in texts() if filled)
    else:
        yield from filter(None, read_lines(path))


def read_documents(data):
    """All documents as (split, text): of text files, dealt by a hash of their text; or the built-in world's captions,
    one a scene: two that say the same would give each other's words away."""
    if list(data) == ["shapes"]:
        for split in SPLITS:
            world = Shapes(split, 0)
            yield from ((split, random.Random(i).choice(world[i].captions)) for i in range(len(world)))
    else:
        for path in text_files(data):
            yield from ((dealt(document), document) for document in documents(path))


def text_corpus(data):
    """Texts to train a vocabulary on: of stage text's split train (a million documents at most)."""
    if list(data) == ["shapes"]:
        return Shapes("train", 0).corpus()
    return [text for split, text in itertools.islice(read_documents(data), 10**6) if split == "train"]


def pack(texts, words, folder):
    """Writes the token ids of (split, text) pairs, a [T_SEP] after each text, one file a split, that `Texts` reads."""
    parallel, texts = os.environ["TOKENIZERS_PARALLELISM"], iter(texts)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        with contextlib.ExitStack() as stack:
            files = {split: stack.enter_context(open(Path(folder, split), "wb")) for split in SPLITS}
            while chunk := list(itertools.islice(texts, 1000)):
                encodings = words.tokenizer.encode_batch([text for _, text in chunk], add_special_tokens=False)
                for (split, _), encoding in zip(chunk, encodings):
                    if encoding.ids:
                        np.array([*encoding.ids, words.sep], dtype=token_type(words)).tofile(files[split])
    except OSError as error:
        raise DataError(f"{folder}: no room for the tokens ({error}): TMPDIR names another place") from None
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = parallel


def token_type(words):
    return np.uint16 if words.size <= 2**16 else np.uint32


# ---- The built-in world ----------------------------------------------------------------------------------------------

COLORS = {"red": (220, 40, 40), "orange": (245, 150, 30), "yellow": (240, 220, 50), "green": (50, 160, 70),
          "blue": (40, 90, 220), "purple": (140, 60, 170), "pink": (250, 160, 200), "black": (30, 30, 30)}  # fmt: skip
SIZES = {"small": 0.62, "large": 1.0}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
LAYOUTS = {"row": ("left of", "right of", "from left to right", "from right to left"),
           "column": ("above", "below", "from top to bottom", "from bottom to top")}  # fmt: skip
SPLITS = {"train": 100_000, "val": 500, "test": 500}  # scenes, and how a meaning is dealt: 8, 1 and 1 tenths


class Shapes:
    """The built-in world: two or three coloured shapes in a row or a column, drawn from (seed, split, index).

    A scene is {"layout", "things": [{"size", "color", "shape"}, …]} from left to right or top to bottom. Its captions
    are all the ways to say it, and its item is its meaning. A hash of the meaning deals it to one split, so splits
    share no scene and no caption.
    """

    def __init__(self, split, image_size, seed=0, count=None):
        self.split, self.image_size, self.seed, self.count = split, image_size, seed, count or subset(SPLITS, split)
        self.by_text = True

    def __len__(self):
        return self.count

    def scene(self, i):
        return scene_of(self.split, f"{self.seed} {self.split} {i}")

    def image(self, i):
        return draw_scene(self.scene(i), self.image_size, random.Random(f"drawing {self.seed} {self.split} {i}"))

    def __getitem__(self, i):
        captions = describe(self.scene(i))
        return Picture(None, captions, captions[0])

    def count_captions(self):
        return 2 * self.count

    def corpus(self):
        """Captions, questions and statements, enough for every word of this world to come many times."""
        captions = [caption for i in range(min(self.count, 2000)) for caption in describe(self.scene(i))]
        asked, stated = ShapesQuestions(self.split, 0, self.seed), ShapesStatements(self.split, 0, self.seed)
        return captions + [source[10 * i].text for i in range(200) for source in (asked, stated)]


def make_thing(rng):
    return {"size": rng.choice(list(SIZES)), "color": rng.choice(list(COLORS)), "shape": rng.choice(SHAPES)}


@functools.lru_cache(10_000)
def scene_of(split, seed):
    """Kept, for its captions, its picture and each of its questions ask for it."""
    return make_scene(split, random.Random(seed))


def make_scene(split, rng):
    """A scene whose meaning belongs to a split."""
    while True:
        things = [make_thing(rng) for _ in range(rng.choice((2, 3)))]
        scene = {"layout": rng.choice(list(LAYOUTS)), "things": things}
        tenth = stable_hash(describe(scene)[0]) % 10
        if split == ("test" if tenth == 9 else "val" if tenth == 8 else "train"):
            return scene


def describe(scene):
    """All the captions that are right for a scene."""
    names = [f"a {thing['size']} {thing['color']} {thing['shape']}" for thing in scene["things"]]
    before, after, forth, back = LAYOUTS[scene["layout"]]
    if len(names) == 2:
        return [f"{names[0]} {before} {names[1]}", f"{names[1]} {after} {names[0]}"]
    listed = lambda names: f"{names[0]}, {names[1]} and {names[2]}"
    return [f"{listed(names)} {forth}", f"{listed(names[::-1])} {back}"]


def draw_scene(scene, size, rng):
    """The scene as an RGB image (size, size), with places, sizes, colours and background a little at random."""
    canvas, n = 2 * size, len(scene["things"])  # drawn twice as large, then averaged: smooth edges
    background = rng.randint(225, 255)
    image = Image.new("RGB", (canvas, canvas), (background,) * 3)
    for place, thing in enumerate(scene["things"]):
        along = (place + 0.5 + rng.uniform(-0.06, 0.06)) / n
        across = rng.uniform(0.35, 0.65)
        x, y = (along, across) if scene["layout"] == "row" else (across, along)
        radius = 0.155 * SIZES[thing["size"]] * rng.uniform(0.92, 1.08) * canvas
        color = tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in COLORS[thing["color"]])
        draw_shape(ImageDraw.Draw(image), thing["shape"], x * canvas, y * canvas, radius, color)
    return image.reduce(2)


def draw_shape(draw, shape, x, y, r, color):
    """One shape around (x, y) within a circle of radius about r, in pixels."""
    around = lambda corners, first, *radii: [
        (x + radii[k % len(radii)] * math.sin(2 * math.pi * k / corners + first),
         y - radii[k % len(radii)] * math.cos(2 * math.pi * k / corners + first)) for k in range(corners)
    ]  # fmt: skip
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=color, width=max(1, round(0.35 * r)))
    elif shape == "square":
        draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=color)
    elif shape == "triangle":
        draw.polygon(around(3, 0.0, 1.1 * r), fill=color)
    elif shape == "star":
        draw.polygon(around(10, 0.0, 1.1 * r, 0.45 * r), fill=color)
    elif shape == "cross":
        draw.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), fill=color)
        draw.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), fill=color)


PLACES = {"row": ("on the left", "on the right"), "column": ("at the top", "at the bottom")}  # of the first, the last
TIMES = 4  # questions on each scene, pairs of images for each statement


def trait(thing, *names):
    """What a thing is by some of its properties: ("red shape", does another thing share them?)."""
    what = " ".join([thing[name] for name in names] + ["shape"] * ("shape" not in names))
    return what, lambda other: all(other[name] == thing[name] for name in names)


def a(what):
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


def ask(scene, rng):
    """A question about a scene: (text, answer, type of the answer as in VQA 2.0)."""
    kind = rng.choice(("yes/no", "number", "other"))
    return *{"yes/no": ask_whether, "number": ask_how_many, "other": ask_which}[kind](scene, rng), kind


def ask_whether(scene, rng):
    """Whether a color is there; as often yes as no."""
    colors, answer = {thing["color"] for thing in scene["things"]}, rng.choice(("yes", "no"))
    color = rng.choice([color for color in COLORS if (color in colors) == (answer == "yes")])
    return f"is there {a(f'{color} shape')}?", answer


def ask_how_many(scene, rng):
    thing = rng.choice(scene["things"]) if rng.random() < 0.6 else make_thing(rng)
    what, like_it = trait(thing, *rng.choice(((), ("color",), ("shape",))))
    return f"how many {what}{'es' if what[-1] == 's' else 's'} are there?", str(sum(map(like_it, scene["things"])))


def ask_which(scene, rng):
    """The color, shape or size of a thing, which is named by another property or by its place."""
    things, wanted = scene["things"], rng.choice(("color", "shape", "size"))
    thing = rng.choice(things)
    what, like_it = trait(thing, rng.choice([name for name in ("color", "shape") if name != wanted]))
    if rng.random() < 0.5 or sum(map(like_it, things)) > 1:
        end = rng.choice((0, -1))
        thing, what = things[end], f"shape {PLACES[scene['layout']][end]}"
    return f"what {wanted} is the {what}?", thing[wanted]


class ShapesQuestions(Shapes):
    """VQA in the built-in world: four questions on every scene, with ten annotators who agree."""

    def __len__(self):
        return TIMES * self.count

    def __getitem__(self, i):
        text, answer, kind = ask(self.scene(i // TIMES), random.Random(f"question {self.seed} {self.split} {i}"))
        return Question(None, text, i, [answer] * 10, answer, kind)

    def image(self, i):
        return super().image(i // TIMES)


def state(rng):
    """A statement about two scenes: (text, does it hold of (left, right)?)."""
    what, like_it = trait(make_thing(rng), "color")
    count, size = lambda scene: sum(map(like_it, scene["things"])), lambda scene: len(scene["things"])
    side, total = rng.choice((0, 1)), rng.choice((4, 5, 6))
    name, number = ("left", "right")[side], {4: "four", 5: "five", 6: "six"}[total]
    kinds = {  # the statement, what it means, and how often it comes
        f"the {name} image shows {a(what)}.": (lambda *scenes: count(scenes[side]) > 0, 3),
        f"both images show {a(what)}.": (lambda *scenes: all(map(count, scenes)), 2),
        f"neither image shows {a(what)}.": (lambda *scenes: not any(map(count, scenes)), 2),
        f"only one image shows {a(what)}.": (lambda *scenes: sum(count(scene) > 0 for scene in scenes) == 1, 1),
        f"the images show {number} shapes in all.": (lambda *scenes: sum(map(size, scenes)) == total, 1),
        f"the {name} image shows more shapes.": (lambda *scenes: size(scenes[side]) > size(scenes[1 - side]), 1),
    }
    [text] = rng.choices(list(kinds), [often for _, often in kinds.values()])
    return text, kinds[text][0]


class ShapesStatements(Shapes):
    """NLVR2 in the built-in world: every statement comes with four pairs of images, and is true of two of them."""

    def __len__(self):
        return TIMES * self.count

    def stated(self, i):
        """→ the statement, does it hold of two scenes?, shall it of those of pair i?"""
        rng = random.Random(f"statement {self.seed} {self.split} {i // TIMES}")
        text, holds = state(rng)
        return text, holds, rng.sample([True, False] * (TIMES // 2), TIMES)[i % TIMES]

    def __getitem__(self, i):
        text, _, label = self.stated(i)
        return Statement(None, text, f"{self.split}-{i // TIMES}-{i % TIMES}-0", label)

    def image(self, i):
        _, holds, label = self.stated(i)
        rng = random.Random(f"pair {self.seed} {self.split} {i}")
        scenes = [make_scene(self.split, rng) for _ in range(2)]
        while holds(*scenes) != label:
            scenes[rng.randrange(2)] = make_scene(self.split, rng)
        return tuple(draw_scene(scene, self.image_size, rng) for scene in scenes)


class ShapesClasses(Shapes):
    """Image classification in the built-in world: color and shape of the first thing, from the left or the top."""

    def __getitem__(self, i):
        return Labelled(None, trait(self.scene(i)["things"][0], "color", "shape")[0])


# ---- Samples and their order -----------------------------------------------------------------------------------------


def stable_hash(text):
    """A 63-bit number of a text, the same in every process and run (Python's own hash is salted)."""
    code = text.encode("utf-8", "surrogateescape")  # names of files need not be valid text
    return int.from_bytes(hashlib.blake2b(code, digest_size=8).digest(), "big") >> 1


IN_A_ROW = 100  # unreadable images in a row: not a few broken files, but a disk that is gone


class Images(Dataset):
    """Training samples of a source, indexed by (epoch, index): image uint8 (3, S, S); hidden (N,) bool, True = masked
    patch; unreadable, the files met on the way that could not be read: the next picture stands in. After 100 such
    files in a row a sample has nothing else."""

    def __init__(self, source, image_size, seed, augmentation, flip, hide=None):
        """hide: rng → hidden; None: it is not needed."""
        self.source, self.image_size, self.seed, self.hide = source, image_size, seed, hide
        self.augmentation, self.flip = augmentation, flip

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        rng = random.Random(f"{self.seed} {key[0]} {key[1]}")
        i, image, unreadable = self.read(key[1])
        if image is None:
            return {"unreadable": unreadable}
        sample = self.sample(i, image, rng) | {"unreadable": unreadable}
        return sample | {"hidden": self.hide(rng)} if self.hide else sample

    def sample(self, i, image, rng):
        """What a sample has beside hidden and unreadable."""
        return {"image": self.view(image, rng)}

    def read(self, index):
        """→ number of the sample, its picture or None, unreadable files. Not an error: a loader worker's is a
        traceback, so it is for the main process to raise."""
        unreadable = []
        for i in range(index, index + IN_A_ROW):
            i = i % len(self.source)
            try:
                return i, self.source.image(i), unreadable
            except Unreadable as error:
                unreadable.append(str(error))
        return i, None, unreadable

    def view(self, image, rng):
        return to_tensor(image, lambda one: augment(one, self.image_size, rng, self.augmentation, self.flip))


class Pairs(Images):
    """Training samples (image, one of its captions): image, hidden and unreadable as above; text, masked, labels (T,)
    int64; mask (T,) bool, True = real token; ids (2,) int64, hashes of item and caption."""

    def __init__(self, source, words, image_size, seed, augmentation, flip, hide=None):
        super().__init__(source, image_size, seed, augmentation, flip, hide)
        self.words = words

    def sample(self, i, image, rng):
        picture = self.source[i]
        caption = rng.choice(picture.captions)
        text, mask = self.words.encode(caption)
        masked, labels = self.words.mask_words(text, rng)
        ids = torch.tensor([stable_hash(picture.item), stable_hash(caption)])
        image = self.view(image, rng)
        return {"image": image, "text": text, "mask": mask, "masked": masked, "labels": labels, "ids": ids}


class Examples(Images):
    """Training samples of a downstream task: image and unreadable as above, of a pair of images (2, 3, S, S); text and
    mask where there is a text; target, what `target` makes of source[i]."""

    def __init__(self, source, words, target, image_size, seed, augmentation, flip):
        super().__init__(source, image_size, seed, augmentation, flip)
        self.words, self.target = words, target

    def sample(self, i, image, rng):
        sample = {"image": self.view(image, rng), "target": self.target(self.source[i])}
        if self.words:
            sample["text"], sample["mask"] = self.words.encode(self.source[i].text)
        return sample


class Texts(Dataset):
    """Training samples of packed text, indexed by (epoch, index): masked, labels (T,) int64, mask (T,) bool. Documents
    fill a sample to the last token, and go on in the next (RoBERTa's full sentences)."""

    def __init__(self, path, words, seed):
        self.words, self.seed = words, seed
        self.tokens = np.memmap(path, token_type(words), mode="r") if os.path.getsize(path) else np.zeros(0, np.uint16)

    def __len__(self):
        return -(-len(self.tokens) // (self.words.length - 2))

    def __getitem__(self, key):
        epoch, index = key
        room = self.words.length - 2
        text, mask = self.words.frame(self.tokens[index * room : (index + 1) * room].tolist())
        masked, labels = self.words.mask_words(text, random.Random(f"{self.seed} {epoch} {index}"))
        return {"masked": masked, "labels": labels, "mask": mask, "unreadable": []}


def cut(mask):
    """The length to which a batch of texts can be cut: its longest, rounded up to a multiple of 8. mask (B, T) bool."""
    longest = int(mask.sum(1).max())
    return min(-(-longest // 8) * 8, mask.shape[1])


def collate(samples):
    """Samples, stacked, with one list of unreadable files; that list alone if a sample has nothing else."""
    names = [name for name in samples[0] if name != "unreadable" and all(name in sample for sample in samples)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in names}
    return batch | {"unreadable": [file for sample in samples for file in sample["unreadable"]]}


class Order:
    """Which samples each batch holds, without end: batch k of all W processes is positions k·W·b … (k+1)·W·b of the
    shuffled epochs, and process r takes its r-th part. So the global batch is the same for any W, and a position in
    the data is a number. Iterating gives lists of b (epoch, index), from batch `start` on."""

    def __init__(self, length, batch, rank, world, seed, start=0):
        self.length, self.batch, self.rank, self.world, self.seed, self.start = length, batch, rank, world, seed, start

    def __iter__(self):
        @functools.lru_cache(2)
        def shuffled(epoch):
            return np.random.default_rng([self.seed, epoch]).permutation(self.length)

        for k in itertools.count(self.start):
            first = (k * self.world + self.rank) * self.batch
            epochs = [divmod(position, self.length) for position in range(first, first + self.batch)]
            yield [(epoch, int(shuffled(epoch)[place])) for epoch, place in epochs]
