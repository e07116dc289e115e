"""Records on disk: a source whose records are in files that all processes of a node share. They are
written once, to the node's temporary folder, and unlinked when all processes have them open. No
process holds the text: a record is read when it is asked for.
"""

import functools
import json
import os
import sys

import numpy as np

import runtime
from data import Picture
from images import read_image


class Records:
    """A source on disk. Its records are named tuples of one kind. The `image` of a record is a
    path, or a pair of paths; `at` says where an image in a shard is."""

    drawn = False

    def __init__(self, kind, records, by_text=True):
        """records: an iterable; one process per node goes through it, once. by_text: in retrieval a
        caption is right for every picture that has it; False: only for its own."""
        self.kind, self.by_text = kind, by_text
        fill = functools.partial(write_records, records)
        self.lines, self.line_ends, self.text_ends = runtime.once_per_node(fill, open_records)

    def __len__(self):
        return len(self.line_ends) - 1

    def __getitem__(self, i):
        start, end = self.line_ends[i], self.line_ends[i + 1]
        line = os.pread(self.lines.fileno(), end - start, start)  # forked workers share no position
        return self.kind(*json.loads(line))

    def image(self, i, view=None):
        """view: of images.read_image."""
        record = self[i]
        if isinstance(record.image, str):
            return read_image(record.image, view, getattr(record, "at", None))
        return tuple(read_image(path, view) for path in record.image)

    def caption_ends(self):
        """Where the captions of each picture end, among all captions: (n,) int64."""
        return self.text_ends[1:]

    def corpus(self):
        """The texts of every k-th record: about a million, or all."""
        k = -(-int(self.text_ends[-1]) // 10**6)
        for i in range(0, len(self), max(1, k)):
            record = self[i]
            yield from record.captions if self.kind is Picture else [record.text]


def write_records(records, folder):
    """Writes the files that open_records opens."""
    encode, line_end, text_end = json.JSONEncoder().encode, 0, 0
    with (
        open(folder / "lines", "wb") as lines,
        open(folder / "line_ends", "wb") as line_ends,
        open(folder / "text_ends", "wb") as text_ends,
    ):
        line_ends.write(bytes(8))
        text_ends.write(bytes(8))
        for record in records:
            line_end += lines.write(encode(record).encode())
            text_end += len(record.captions) if isinstance(record, Picture) else 1
            line_ends.write(line_end.to_bytes(8, sys.byteorder))
            text_ends.write(text_end.to_bytes(8, sys.byteorder))


def open_records(folder):
    """→ the file of the records as JSON, unbuffered; and where each ends in it, and its texts end
    among all texts: memory-mapped (n + 1,) int64, from 0 on."""
    lines = open(folder / "lines", "rb", buffering=0)
    line_ends = np.memmap(folder / "line_ends", np.int64, "r")
    text_ends = np.memmap(folder / "text_ends", np.int64, "r")
    return lines, np.asarray(line_ends), np.asarray(text_ends)  # a memmap is slow to index
