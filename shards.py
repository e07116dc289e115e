"""Shards: .tar files as img2dataset and WebDataset write them. Members that follow each other and
differ only in their ending are a sample: KEY.jpg, and KEY.txt with a caption, or KEY.json with its
"caption". An image stays where it is in the file, so a shard is neither unpacked nor read in order.
"""

import functools
import itertools
import signal
import tarfile
from concurrent.futures import ProcessPoolExecutor

import runtime
from data import Picture, split_by_hash
from reading import IMAGES, checked_text, malformed, parse_json, print_left_out
from runtime import UserError


def read_shards(paths, split=None, captions=False):
    """The pictures of shards, in order. Each core reads one shard at a time, because a shard of
    10,000 samples has 30,000 headers."""
    if not paths:
        return
    read = functools.partial(read_shard, split=split, captions=captions)
    cores = runtime.cores()
    quiet = signal.SIGINT, signal.SIG_IGN  # Ctrl-C ends this process, and with it the others
    with ProcessPoolExecutor(min(cores, len(paths)), initializer=signal.signal, initargs=quiet) as pool:
        for first in range(0, len(paths), cores):
            for found in pool.map(read, paths[first : first + cores]):
                yield from found


def read_shard(path, split=None, captions=False):
    """The pictures of a shard's samples. split: only of those that a hash of their key gives to it.
    captions: only of those that have one. Samples that are left out are counted on stderr.

    UserError for a shard that is cut off or damaged.
    """
    found, count, left_out = [], 0, []
    with malformed(path), tarfile.open(path, "r:") as tar:
        for key, group in itertools.groupby(members(path, tar), sample_key):
            if split and split_by_hash(key) != split:
                continue
            sample = {member.name[len(key) :].lower(): member for member in group}
            image = next((member for end, member in sample.items() if end in IMAGES), None)
            texts = sample_captions(path, tar, sample)
            count += 1
            if image and (texts or not captions):
                name = f"{path}/{image.name}"
                found.append(Picture(name, texts, name, (path, image.offset_data, image.size)))
            else:
                left_out.append(key)
    print_left_out(path, left_out, count, "an image and a caption" if captions else "an image")
    return found


def sample_key(member):
    """The name up to the first dot that follows the folders."""
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def sample_captions(path, tar, sample):
    """The captions of a sample {ending: member}: one, or none."""
    member = sample.get(".txt") or sample.get(".json")
    if not member:
        return []
    where = f"{path}, member {member.name}"
    with malformed(where):
        text = tar.extractfile(member).read().decode("utf-8-sig")
        caption = text if ".txt" in sample else parse_json(text, where).get("caption") or ""
        caption = checked_text(caption, where)
    return [caption] if caption.strip() else []


BLOCK = 512  # bytes, of which a .tar file consists; one of zeros ends it


def members(path, tar):
    """The regular files in a shard, each a TarInfo: its name, offset_data and size. UserError where
    it is cut off."""
    while member := tar.next():
        tar.members.clear()  # it would keep all of them
        if member.isreg():
            yield member
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(BLOCK) != bytes(BLOCK):
        raise UserError(f"{path} is cut off or damaged at its end")
