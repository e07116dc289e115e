"""Pictures on disk, as downloaded. A source is explained in data.py.

A folder is read by the first of these that it has; SPLIT is train, val or test:

    SPLIT.jsonl             a manifest: {"image", "captions", "item"} per line
    SPLIT.csv, SPLIT.tsv    a table with columns filepath and title (open_clip's), or image and caption
    dataset_coco.json, dataset_flickr30k.json    Karpathy's splits
    *.tar                   shards, see shards.py
    images                  and, where captions are needed, NAME.txt next to NAME.jpg, one per line

Shards and images lie in folders train, val and test, or are split by a hash of their names.
"""

import csv
import functools
import itertools
import os
from pathlib import Path

import reading
import shapes
from data import SPLITS, Absent, Picture, split_by_hash
from reading import IMAGES, checked_captions, files_below, hidden, path_below
from records import Records
from runtime import UserError
from shards import read_shards


def read_splits(names, read):
    """{split: source} by read(split). The first of `names` must be there, others may be absent."""
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
    names = None
    if args.exclude and not paths:
        if shapes.asked(args.data):
            raise UserError("--exclude: the built-in world has no files")
        names = {line.strip() for line in reading.read_text(args.exclude).splitlines()}
    paths = paths or args.data
    return read_splits(args.splits, lambda split: pictures(paths, split, image_size, captions, names))


def pictures(paths, split, image_size, captions=False, excluded=None):
    """The source of pictures that --data names: the built-in world, or one or more folders; of
    training, all must have it. captions: they must have captions. excluded: names of files that
    training leaves out.

    UserError, before any work, for missing files; Absent if no folder has the split.
    """
    if world := shapes.World.read(paths, split, image_size):
        return world
    for folder in paths:
        check_folder(folder)
    files = [captions_file(folder, split) for folder in paths]
    by_text = not any(file and file.suffix == ".json" for file in files)  # as usual for Karpathy's splits
    records = all_pictures(paths, split, captions)
    if excluded is not None and split == "train":
        records = without(records, excluded)
    if split != "train":  # recall counts each picture once; training takes lines as they come
        records = merged(records)
    source = Records(Picture, records, by_text)
    if not len(source):
        raise absent(paths, split, captions)
    return source


def folder_pictures(folder, split, captions):
    """The pictures of a split in a folder, of the kind that comes first in the list above."""
    file = captions_file(folder, split)
    if file:
        yield from refuse_missing(READERS[file.suffix](file, split), split)
    elif any(captions_file(folder, name) for name in SPLITS):
        return  # it has other splits
    elif shard_files(folder):
        by_hash = None if has_split_folders(folder) else split
        yield from read_shards(shard_files(folder, split), by_hash, captions)
    elif captions:
        yield from with_captions(image_files(folder, split), folder)
    else:
        for path in image_files(folder, split):
            yield Picture(path, [], path)


def all_pictures(paths, split, captions):
    """The pictures of a split in folders; of training, each must have some."""
    for folder in paths:
        count = 0
        for count, picture in enumerate(folder_pictures(folder, split, captions), start=1):
            yield picture
        if split == "train" and not count:
            raise absent([folder], split, captions)


def without(records, names):
    """The records whose image has none of these names. UserError at the end if that is all, or none."""
    count = kept = 0
    for count, record in enumerate(records, start=1):
        if os.path.basename(record.image) not in names:
            kept += 1
            yield record
    if count and kept in (0, count):
        raise UserError(f"--exclude leaves out {count - kept} of {count} pictures")


def merged(records):
    """The records, those of one image as one."""
    found = {}
    for record in records:
        known = found.setdefault(record.image, record)
        if known is not record:
            known.captions.extend(record.captions)
    yield from found.values()


def absent(paths, split, captions):
    """The error that there are no such pictures."""
    data = " ".join(map(str, paths))
    if captions:
        files = ", ".join(caption_file_names(split))
        return Absent(f"{data}: no pictures with captions in split {split} ({files}, *.tar, or *.txt)")
    return Absent(f"{data}: no pictures in split {split}")


def task_folder(paths):
    """The one folder that --data names for a task."""
    if len(paths) > 1:
        raise UserError(f"--data {' '.join(paths)}: this task takes one folder")
    check_folder(paths[0])
    return Path(paths[0])


def task_records(kind, records, split):
    """The source of a task's records. Absent if there are none, UserError for missing images."""
    source = Records(kind, refuse_missing(records, split))
    if not len(source):
        raise Absent(f"--data: split {split} is empty")
    return source


def check_folder(folder):
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")


# ---- Missing images ------------------------------------------------------------------------------


def refuse_missing(records, split):
    """The records; UserError at the end that names missing images. Each folder is listed once: a
    disk on a network is slow to answer for each image."""
    listing = functools.cache(list_folder)
    missing = {}  # paths, each once, in order
    for record in records:
        yield record
        for path in [record.image] if isinstance(record.image, str) else record.image:
            folder, name = os.path.split(path)
            if name not in listing(folder):
                missing[path] = None
    if missing:
        names = ", ".join(itertools.islice(missing, 5)) + (", …" if len(missing) > 5 else "")
        raise UserError(f"{len(missing)} images of split {split} are missing: {names}")


def list_folder(folder):
    """The names in a folder; none if there is no such folder."""
    try:
        return set(os.listdir(folder or "."))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        reading.refuse(error)


# ---- Files of captions ---------------------------------------------------------------------------


def caption_file_names(split):
    """Names of files with captions; the first that is there is read."""
    tables = [f"{split}.jsonl", f"{split}.csv", f"{split}.tsv"]
    return [*tables, "dataset_coco.json", "dataset_flickr30k.json"]


def captions_file(folder, split):
    """The file with the captions of a split in a folder, or None."""
    paths = [Path(folder, name) for name in caption_file_names(split)]
    return next((path for path in paths if path.exists()), None)


def read_manifest(path, split):
    """{"image": path below its folder, "captions": [str, …], "item": optional}, one per line. Items
    of two folders are different ones."""
    folder = str(path.parent)  # paths are slow: these lines run millions of times
    for where, entry in reading.json_lines(path):
        [image] = reading.fields(where, entry, image=str)
        file, item = path_below(folder, image, where), entry.get("item")
        captions = checked_captions(entry.get("captions"), where)
        yield Picture(file, captions, file if item in (None, "") else f"{folder}/{item}")


def read_table(path, split):
    """Rows below a header, separated by tabs if the header has one, else by commas. Rows of one
    image that follow each other are a picture."""
    count, left_out = 0, []
    for count, (file, rows) in enumerate(itertools.groupby(table_rows(path), key=lambda row: row[0]), start=1):
        captions = [caption for _, caption in rows if caption.strip()]
        if captions:
            yield Picture(file, captions, file)
        else:
            left_out.append(file)
    reading.print_left_out(path, left_out, count, "a caption")


def table_rows(path):
    """(path of the image, caption) of each row of a table."""
    folder = str(path.parent)
    lines = (line for _, line in reading.text_lines(path))
    header = next(lines, "")
    delimiter = "\t" if "\t" in header else ","
    rows = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            image, caption = row.get("filepath", row.get("image")), row.get("title", row.get("caption"))
            if image is None or caption is None or None in row:  # None: what has no column
                needed = "filepath and title (or image and caption) are needed"
                raise UserError(f"{where}: {needed}, and no more columns than the header has")
            yield path_below(folder, image, where), caption
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.reader.line_num}: {error}") from None


def read_karpathy(path, split):
    """Karpathy's dataset_coco.json or dataset_flickr30k.json; COCO's "restval" is for training."""
    below = ["", "images", "flickr30k-images", "flickr30k_images"]
    roots = [os.path.join(path.parent, name) for name in below]
    for where, entry in reading.official_records(path, "images"):
        with reading.malformed(where):
            name = os.path.join(entry.get("filepath", ""), entry["filename"])
            captions = [sentence["raw"] for sentence in entry["sentences"]]
            own_split = entry["split"]
        if own_split == split or (own_split == "restval" and split == "train"):
            files = [path_below(root, name, where) for root in roots]
            file = next(filter(os.path.exists, files), os.path.join(path.parent, name))
            yield Picture(file, checked_captions(captions, where), file)


READERS = {".jsonl": read_manifest, ".csv": read_table, ".tsv": read_table, ".json": read_karpathy}

# ---- Folders of images or shards -----------------------------------------------------------------


SPELLINGS = {*SPLITS, "valid", "validation", "dev", "training", "testing"}


def has_split_folders(folder):
    """Whether a folder has a folder per split: two of `train`, `val` and `test`, or one and no
    other folder. UserError if one of several has another name."""
    folders = next(os.walk(folder), ("", [], []))[1]
    folders = [name for name in folders if not hidden(name)]
    splits = [name for name in folders if name.lower() in SPELLINGS]
    if len(splits) > 1 and (wrong := set(splits).difference(SPLITS)):
        raise UserError(f"{Path(folder, min(wrong))}: folders of splits are train, val and test: rename it")
    return len(splits) > 1 or (len(folders) == 1 and folders[0] in SPLITS)


def image_files(folder, split):
    """Image files of a split below a folder: in the split's own, or those that a hash of their
    names gives to it."""
    if not has_split_folders(folder):
        files = files_below(folder, IMAGES)
        return (path for path in files if split_by_hash(os.path.relpath(path, folder)) == split)
    below = os.path.join(folder, split)
    return files_below(below, IMAGES) if os.path.isdir(below) else ()


def shard_files(folder, split=None):
    """The shards in a folder, or in its folders of splits (only in that of `split`), in order."""
    below = [""]
    if has_split_folders(folder):
        below = [split] if split else SPLITS
    found = []
    for name in below:
        found += sorted(map(str, Path(folder, name).glob("*.tar")))
    return found


def with_captions(paths, folder):
    """Pictures of images that have a text file of the same name, whose lines are captions."""
    count, left_out = 0, []
    for count, path in enumerate(paths, start=1):
        text = os.path.splitext(path)[0] + ".txt"
        lines = reading.text_lines(text) if os.path.exists(text) else ()
        captions = [line.strip() for _, line in lines if line.strip()]
        if captions:
            yield Picture(path, captions, path)
        else:
            left_out.append(path)
    reading.print_left_out(folder, left_out, count, "a text file with captions")


def folder_of_images(path, image_size):
    """The source of all images below a folder, or of its split test if it has captions; without a
    path, the built-in world."""
    if path is None:
        return shapes.World("test", image_size)
    check_folder(path)
    if captions_file(path, "test"):
        return pictures([path], "test", image_size)
    images = (Picture(file, [], file) for file in files_below(path, IMAGES))
    shards = list(files_below(path, (".tar",)))
    source = Records(Picture, itertools.chain(read_shards(shards), images))
    if not len(source):
        raise UserError(f"{path} has no images ({', '.join(IMAGES)}) and no shards (.tar)")
    return source
