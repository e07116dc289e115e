"""Pictures on disk, as downloaded: manifests, Karpathy's files, folders of images. A source is
explained in data.py."""

import contextlib
import functools
import itertools
import json
import os
from pathlib import Path

import numpy as np

import shapes
from data import SPLITS, Absent, Picture, split_by_hash
from images import read_image
from runtime import UserError


class Records:
    """A source on disk. Its records, named tuples of one kind, are JSON lines in one array of
    bytes, which forked workers share without copying. The `image` of a record is a path, or a pair
    of paths."""

    drawn = False

    def __init__(self, kind, records, by_text=True):
        """by_text: in retrieval a caption is right for every picture that has it; False: only for
        its own."""
        self.kind, self.by_text = kind, by_text
        lines = [json.dumps(record, default=str).encode() for record in records]
        self.ends = np.cumsum([0] + [len(line) for line in lines])
        self.bytes = np.frombuffer(b"".join(lines), dtype=np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        return self.kind(*json.loads(self.bytes[self.ends[i] : self.ends[i + 1]].tobytes()))

    def image(self, i, view=None):
        """view: of images.read_image."""
        paths = self[i].image
        if isinstance(paths, str):
            return read_image(paths, view)
        return tuple(read_image(path, view) for path in paths)

    def without(self, names):
        """The source without the pictures of these file names. UserError if it has none of them, or
        no others."""
        kept = []
        for i in range(len(self)):
            if os.path.basename(self[i].image) not in names:
                kept.append(self[i])
        if len(kept) in (0, len(self)):
            raise UserError(f"--exclude leaves out {len(self) - len(kept)} of {len(self)} pictures")
        return Records(self.kind, kept, self.by_text)

    def caption_counts(self):
        """How many captions each picture has, (n,)."""
        return np.array([len(self[i].captions) for i in range(len(self))])

    def corpus(self):
        texts = []
        for i in range(len(self)):
            texts += self[i].captions if self.kind is Picture else [self[i].text]
        return texts


def read_splits(names, read):
    """{split: source} by read(split). The first of `names` must be there, the others may be
    absent."""
    found = {}
    for split in names:
        try:
            found[split] = read(split)
        except Absent:
            if split == names[0]:
                raise
    return found


def read_pictures(args, image_size, captions=False, paths=None):
    """{split: source} of the pictures that --data names; of training without those that --exclude
    names. captions: they must have captions. paths: other folders than --data, read whole."""
    if paths:
        return read_splits(args.splits, lambda split: pictures(paths, split, image_size, captions))
    names = {line.strip() for line in read_text(args.exclude).splitlines()} if args.exclude else set()
    found = read_splits(args.splits, lambda split: pictures(args.data, split, image_size, captions))
    if names and args.data == ["shapes"]:
        raise UserError("--exclude: the built-in world has no files")
    if names and "train" in found:
        found["train"] = found["train"].without(names)
    return found


def pictures(paths, split, image_size, captions=False):
    """The source of pictures that --data names: "shapes", or one or more folders; of training, all
    must have it.

    UserError, before any work, for missing files; Absent if no folder has the split.
    """
    if list(paths) == ["shapes"]:
        return shapes.World(split, image_size)
    records, by_text = [], True
    for folder in paths:
        check_folder(folder)
        file = captions_file(folder, split)
        if file:
            read = read_manifest if file.suffix == ".jsonl" else read_karpathy
            records.append(read(file, split))
            by_text = by_text and file.suffix == ".jsonl"
        elif not captions and not any(captions_file(folder, name) for name in SPLITS):
            records.append((Picture(path, [], path) for path in image_files(folder, split)))
        elif split == "train":
            raise Absent(f"--data {folder} has no {' or '.join(caption_files(split))}")
    source = Records(Picture, itertools.chain.from_iterable(records), by_text)
    if not len(source):
        raise Absent(f"--data {' '.join(map(str, paths))}: no pictures in split {split}")
    refuse_missing(source, split)
    return source


def task_folder(paths):
    """The one folder that --data names for a task."""
    if len(paths) > 1:
        raise UserError(f"--data {' '.join(paths)}: this task takes one folder")
    check_folder(paths[0])
    return Path(paths[0])


def task_records(kind, records, split):
    """The source of a task's records. Absent if there are none, UserError for missing images."""
    source = Records(kind, records)
    if not len(source):
        raise Absent(f"--data: split {split} is empty")
    refuse_missing(source, split)
    return source


def check_folder(folder):
    if not Path(folder).is_dir():
        raise UserError(f"--data {folder}: no such folder")


def refuse_missing(source, split):
    """UserError that names the images of a source that do not exist; each folder is listed once."""
    present = functools.cache(list_folder)
    paths = {}  # in order, each once
    for i in range(len(source)):
        image = source[i].image
        paths.update(dict.fromkeys([image] if isinstance(image, str) else image))
    missing = [path for path in paths if os.path.basename(path) not in present(os.path.dirname(path) or ".")]
    if missing:
        names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise UserError(f"{len(missing)} of the {len(paths)} images of split {split} are missing: {names}")


def list_folder(folder):
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


# ---- Files of captions ---------------------------------------------------------------------------


def caption_files(split):
    """Names of files with captions; a manifest goes before Karpathy's JSON."""
    return [f"{split}.jsonl", "dataset_coco.json", "dataset_flickr30k.json"]


def captions_file(folder, split):
    """The file with the captions of a split in a folder, or None."""
    paths = [Path(folder, name) for name in caption_files(split)]
    return next((path for path in paths if path.exists()), None)


def read_manifest(path, split):
    """{"image": path below the manifest's folder, "captions": [str, …], "item": optional}, one per
    line."""
    for where, entry in json_lines(path):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise UserError(f'{where} needs {{"image": path, "captions": [text, …]}}')
        item, file = entry.get("item"), str(path.parent / entry["image"])
        if not isinstance(item, str | int | None):
            raise UserError(f"{where}: item must be a text or a number, not {json.dumps(item)[:80]}")
        yield Picture(file, checked_captions(entry.get("captions"), where), file if item is None else str(item))


def read_karpathy(path, split):
    """Karpathy's dataset_coco.json or dataset_flickr30k.json; training includes COCO's
    "restval"."""
    folder = path.parent
    roots = [folder, folder / "images", folder / "flickr30k-images", folder / "flickr30k_images"]
    for where, entry in official_records(path, "images"):
        with malformed(where):
            name, own = Path(entry.get("filepath", ""), entry["filename"]), entry["split"]
            captions = [sentence["raw"] for sentence in entry["sentences"]]
        if own == split or (own == "restval" and split == "train"):
            file = next((root / name for root in roots if (root / name).exists()), folder / name)
            yield Picture(str(file), checked_captions(captions, where), str(file))


def checked_captions(captions, where):
    """captions; UserError unless they are a list of at least one string (of characters that can be
    encoded)."""
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{where}: captions must be a list of at least one string, not {json.dumps(captions)[:80]}")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a caption is no valid text: {error}") from None
    return captions


# ---- JSON ----------------------------------------------------------------------------------------


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no valid JSON: {error}") from None


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def json_lines(path):
    """(where, value) of each line that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where)


def fields(where, entry, **kinds):
    """The values of a record's fields, of these types. UserError that names the record and the field."""
    for name, kind in kinds.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
            raise UserError(f'{where}: "{name}" must be there, a {kind.__name__}')
    return [entry[name] for name in kinds]


def official_records(path, name):
    """(where, entry) of the list of that name in an official JSON file."""
    content = parse_json(read_text(path), path)
    with malformed(path):
        entries = list(content[name])
    for number, entry in enumerate(entries):
        yield f"{path}, {name} {number}", entry


@contextlib.contextmanager
def malformed(where):
    """Turns what a malformed record of an official file raises into one line that names file and
    record."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"{where} is not as published ({type(error).__name__}: {error})") from None


# ---- Folders of images ---------------------------------------------------------------------------

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def files_below(folder, endings):
    """All files below a folder with one of these endings, in order. UserError for a folder that
    cannot be read."""
    found = []
    for where, _, names in os.walk(folder, onerror=refuse, followlinks=True):
        found += [os.path.join(where, name) for name in names if name.lower().endswith(endings)]
    return sorted(found)


def refuse(error):
    raise UserError(f"{error.filename} cannot be read: {error.strerror}")


def image_files(folder, split):
    """Image files of a split below a folder. A folder with `train` and `val` or `test` has a folder
    per split; the files of any other are split by a hash."""
    if Path(folder, "train").is_dir() and (Path(folder, "val").is_dir() or Path(folder, "test").is_dir()):
        folder = Path(folder, split)
        return files_below(folder, IMAGES) if folder.is_dir() else []
    files = files_below(folder, IMAGES)
    return [path for path in files if split_by_hash(os.path.relpath(path, folder)) == split]


def folder_of_images(path, image_size):
    """The source of all images below a folder, or of its split test if it has captions; without a
    path, the built-in world."""
    if path is None:
        return shapes.World("test", image_size)
    check_folder(path)
    if captions_file(path, "test"):
        return pictures([path], "test", image_size)
    files = files_below(path, IMAGES)
    if not files:
        raise UserError(f"{path} has no images ({', '.join(IMAGES)})")
    return Records(Picture, (Picture(file, [], file) for file in files))
