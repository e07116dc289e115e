"""What a sample is, and the order of samples. Images are in images.py, words in texts.py.

A *source* has `len(source)`; `source[i]`, a record of what is known of sample i; `source.image(i)`,
an RGB image or a tuple of two, or `source.image(i, view)`, for a training view of that side; and
`source.drawn`, True for the built-in world, whose images are augmented only if that is asked for,
and never mirrored. Sources with text also have `source.corpus()`, texts to train a vocabulary on; those
of pictures with captions, `source.caption_ends()`, where the captions of each picture end among all.
Every random choice about a sample is a function of (seed, epoch, index), so the order of workers does
not matter.

Shape letters: b local batch, T text tokens with [T_CLS] and [T_SEP], N patches, S side of an image in
pixels.
"""

import hashlib
import itertools
import math
import random
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import losses
from images import AUGMENTATIONS, Unreadable, augment, resize, to_tensor
from runtime import UserError, at_least, workers


class Picture(NamedTuple):
    """A picture and its captions, if any. Pictures of one item are never each other's negatives."""

    image: str  # the path, or a name; in a shard, SHARD.tar/NAME
    captions: list
    item: str
    at: tuple = None  # of an image in a shard: (file, offset, size)


class Absent(UserError):
    """Data without the split that was asked for."""


WORLD = "shapes: the built-in world; shapes:N: N scarce scenes of it"


def flags(parser, images=None, text=False, exclude=True):
    """Adds the flags of training data. images: how training images are augmented by default; None:
    there are none. exclude: whether some can be left out."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", default=["shapes"], metavar="PATH", help=WORLD)
    if images:
        usual = f"(default: {images}; in the built-in world none)"
        group.add_argument("--augment", choices=AUGMENTATIONS, help=f"views of training images {usual}")
        mirrored = "mirror no image, for texts that say left and right (the built-in world never is)"
        group.add_argument("--no-flip", action="store_true", help=mirrored)
    if images and exclude:
        names = "a list, one per line, of image files (names without folders) to leave out of training"
        group.add_argument("--exclude", metavar="FILE", help=names)
    if text:
        known = "(default: the checkpoint's, or a new one)"
        group.add_argument("--vocab", metavar="FILE", help=f"vocab.txt or tokenizer.json {known}")
    usual = "loader processes per training process (default: from the number of cores; on a CPU 0)"
    group.add_argument("--workers", type=at_least(0), metavar="N", help=usual)


# ---- Training samples ----------------------------------------------------------------------------


def stable_hash(text):
    """63 bits of a text, the same in every process (Python's own hash is salted)."""
    code = text.encode("utf-8", "surrogatepass")  # names of files need not be valid text
    return int.from_bytes(hashlib.blake2b(code, digest_size=8).digest(), "big") >> 1


SPLITS = ("train", "val", "test")


def split_by_hash(name):
    """The split of what has none: by a hash of its name or text, a fiftieth each for val and test."""
    return {0: "test", 1: "val"}.get(stable_hash(name) % 50, "train")


IN_A_ROW = 100  # unreadable images in a row: not a few broken files, but a disk that is gone


class Images(Dataset):
    """Training samples of a source, indexed by (epoch, index).

    image: uint8 (3, S, S), or (2, 3, S, S) of two images. hidden: (N,) bool, True = masked patch,
    if `hide` is given. unreadable: how many pictures in a row could not be read; the next one
    replaces them. IN_A_ROW: no other was found, and the sample holds nothing else.
    """

    def __init__(self, source, image_size, args, usual="crop", hide=None):
        """usual: the augmentation of images from disk. hide: (rng) → hidden."""
        self.source, self.image_size, self.seed, self.hide = source, image_size, args.seed, hide
        self.augmentation = args.augment or ("none" if source.drawn else usual)
        self.flip = self.augmentation != "none" and not source.drawn and not args.no_flip
        self.named = set()  # unreadable files

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key
        rng = random.Random(f"{self.seed} {epoch} {index}")
        wanted = self.picture(index)
        for unreadable in range(IN_A_ROW):
            i = (wanted + unreadable) % len(self.source)
            try:
                image = self.source.image(i, self.image_size)
                break
            except Unreadable as error:
                if str(error) not in self.named:
                    tqdm.write(f"{error}; the next image replaces it", file=sys.stderr)
                    self.named.add(str(error))
        else:  # an error in a loader process would end in a traceback: the Loader raises it
            return {"unreadable": torch.tensor(IN_A_ROW)}
        sample = self.sample(index, i, rng)  # masks words: draws from rng before augment does
        views = []
        for side in image if isinstance(image, tuple) else (image,):
            view = augment(side, self.image_size, rng, self.augmentation, self.flip)
            views.append(to_tensor(view))
        sample["image"] = torch.stack(views) if isinstance(image, tuple) else views[0]
        if self.hide:
            sample["hidden"] = self.hide(rng)
        return sample | {"unreadable": torch.tensor(unreadable)}

    def picture(self, index):
        """The number of a sample's picture."""
        return index

    def sample(self, index, i, rng):
        """What a sample holds besides, of picture i, its own or a replacement."""
        return {}


class Pairs(Images):
    """Training samples (image, caption): every caption of every picture, once an epoch. Besides
    those of Images a sample has text, masked, labels (T,) int64; mask (T,) bool, True = real token;
    ids (2,) int64, hashes of the item, and of the caption as the model reads it."""

    def __init__(self, source, words, image_size, args, hide=None):
        super().__init__(source, image_size, args, "randaugment", hide)
        self.words = words
        if words and not source.drawn:
            print_not_read_whole(source.corpus(), words)
        self.ends = source.caption_ends()  # where the pairs of each picture end

    def __len__(self):
        return int(self.ends[-1])

    def picture(self, index):
        return int(self.ends.searchsorted(index, side="right"))

    def sample(self, index, i, rng):
        picture = self.source[i]
        number = self.ends[self.picture(index)] - 1 - index  # of the caption, counted from the last
        caption = picture.captions[number % len(picture.captions)]  # a replacement may have fewer
        text, mask = self.words.encode(caption)
        masked, labels = self.words.mask_words(text, rng)
        ids = torch.tensor([stable_hash(picture.item), stable_hash(str(text.tolist()))])
        return {"text": text, "mask": mask, "masked": masked, "labels": labels, "ids": ids}


class Examples(Images):
    """Training samples of a task: besides those of Images target, and of tasks with texts text, mask (T,)."""

    def __init__(self, source, words, target, image_size, args, usual="randaugment"):
        """words: None if the task has no texts. target: (record) → tensor."""
        super().__init__(source, image_size, args, usual)
        self.words, self.target = words, target
        if words and not source.drawn:
            print_not_read_whole(source.corpus(), words)

    def sample(self, index, i, rng):
        record = self.source[i]
        sample = {"target": self.target(record)}
        if self.words:
            sample["text"], sample["mask"] = self.words.encode(record.text)
        return sample


def print_not_read_whole(texts, words, special=2):
    """Says, on process 0, how many of the first thousand texts a model cannot read whole. special:
    how many tokens a sample has besides those of its text."""
    if losses.rank():
        return
    found = list(itertools.islice(texts, 1000))
    encodings = words.tokenizer.encode_batch(found, add_special_tokens=False)
    cut = sum(len(encoding.ids) > words.length - special for encoding in encodings)
    unknown = sum("[UNK]" in encoding.tokens for encoding in encodings)
    if cut or unknown:
        told = f"{cut} are cut to {words.length} tokens, {unknown} have words that the vocabulary lacks"
        tqdm.write(f"of {len(found)} texts {told}", file=sys.stderr)


# ---- The order of samples ------------------------------------------------------------------------


def shuffled_batches(length, batch, rank, world, seed, start=0):
    """Yields the b keys (epoch, index) of each batch as a list, from batch `start` on, without end.

    Batch k of all W processes is positions k·W·b … (k+1)·W·b of the shuffled epochs, and process r
    takes its r-th part. So the global batch is the same for any W, and a position in the data is a
    number.
    """
    for k in itertools.count(start):
        first = (k * world + rank) * batch
        epochs, places = np.divmod(np.arange(first, first + batch), length)
        keys = []
        for epoch in range(epochs[0], epochs[-1] + 1):
            indices = shuffled(places[epochs == epoch], length, (seed, epoch))
            keys += [(epoch, index) for index in indices.tolist()]
        yield keys


ROUNDS = 4  # of shifts by rows and by columns


def shuffled(places, length, key):
    """The indices at these places (n,) of a shuffled range(length): int64 (n,), computed without
    the other places. key: whole numbers; each gives another order.

    The range fills a table row by row. A round shifts each row, and then each column, by a hash of
    its number: a Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    The table can have a few cells too many; what lands there is shuffled again until it is inside.
    """
    rows = np.uint64(math.isqrt(length - 1) + 1)
    columns = np.uint64(-(-length // int(rows)))
    keys = np.random.default_rng(key).integers(2**64, size=(ROUNDS, 2), dtype=np.uint64)
    index = places.astype(np.uint64)
    outside = np.full(len(index), True)
    while outside.any():
        row, column = np.divmod(index[outside], columns)
        for row_key, column_key in keys:
            column = (column + scramble(row ^ row_key)) % columns
            row = (row + scramble(column ^ column_key)) % rows
        index[outside] = row * columns + column
        outside = index >= length
    return index.astype(np.int64)


def scramble(x):
    """Hashes of numbers: uint64 (n,) → uint64 (n,) below 2³³. As in SplitMix64 (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(31)  # numbers of 33 bits: a sum with one does not overflow


# ---- What an evaluation reads --------------------------------------------------------------------


class Views(Dataset):
    """The images of a source, or pairs of them, as evaluation sees them; a message in place of an
    unreadable one."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __getitem__(self, i):
        try:
            image = self.source.image(i)
        except Unreadable as error:  # an error in a loader process would come with a traceback
            return str(error)
        if isinstance(image, tuple):
            return torch.stack([to_tensor(resize(one, self.size)) for one in image])
        return to_tensor(resize(image, self.size))


def stack(views):
    """Views → uint8 (n, …), or the message of the first that is unreadable."""
    broken = [view for view in views if isinstance(view, str)]
    return broken[0] if broken else torch.stack(views)


def pictures(source, batches, size, device):
    """For each list of numbers: uint8 (n, 3, S, S), or pairs (n, 2, 3, S, S). Unreadable if one is."""
    loader = DataLoader(Views(source, size), batch_sampler=batches, collate_fn=stack, **workers(device))
    for views in loader:
        if isinstance(views, str):
            raise Unreadable(views)
        yield views.to(device)


def shard(count, batch):
    """This process's share of 0 … count−1, in batches. Shares are equally long, for losses.gather:
    at the end the number count−1 is repeated."""
    share = -(-count // losses.world())
    first = min(losses.rank() * share, count)
    mine = [min(first + k, count - 1) for k in range(share)]
    return [mine[k : k + batch] for k in range(0, share, batch)]


def sample_batches(count, batch=64):
    """This process's share of 0 … count−1 (10,000 at most), in batches; each number comes once."""
    mine = list(range(losses.rank(), min(count, 10_000), losses.world()))
    return [mine[k : k + batch] for k in range(0, len(mine), batch)]
