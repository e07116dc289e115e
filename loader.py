"""The loader: the batches of each step, on the device, with all that the host must know of them.

Shape letters: b local batch, T text tokens with [T_CLS] and [T_SEP], N patches, M masked tokens or patches.
"""

import time

import torch
from torch.utils.data import DataLoader, default_collate

from data import IN_A_ROW, shuffled_batches
from runtime import UserError, workers
from texts import IGNORE, cut


class Loader:
    """This process's steps without end: lists of the step's parts (--accumulate), each with a batch
    of every data set, on the device.

    Counts unreadable images, and the seconds that the run waited. UserError if more than 1 % of
    what was read (and more than 10 images) is unreadable, or IN_A_ROW images in a row.
    """

    def __init__(self, samples, args, run, start=0):
        """samples: a list of data sets. start: how many steps to leave out."""
        self.device, self.parts = run.device, args.accumulate
        self.read, self.unreadable, self.waited = 0, 0, 0.0
        local, rest = divmod(args.batch_size, run.world * self.parts)
        if rest:
            parts = f"{run.world} processes × {self.parts} parts (--accumulate)"
            raise UserError(f"--batch-size {args.batch_size} is not divisible by {parts}")
        processes = workers(run.device, args.workers, len(samples))
        self.loaders = []
        for data_set in samples:
            if args.batch_size > len(data_set):
                raise UserError(f"--batch-size {args.batch_size} is more than there are samples: {len(data_set)} at most")
            order = shuffled_batches(len(data_set), local, run.rank, run.world, args.seed, start * self.parts)
            pinned = run.device.type == "cuda"
            loader = DataLoader(data_set, batch_sampler=order, collate_fn=collate, pin_memory=pinned, **processes)
            self.loaders.append(iter(loader))

    def __iter__(self):
        return self

    def __next__(self):
        began, columns = time.perf_counter(), []
        for loader in self.loaders:
            batches = [next(loader) for _ in range(self.parts)]
            for batch in batches:
                if "unreadable" in batch:
                    self.count(batch.pop("unreadable"))
            columns.append([to_device(batch, self.device) for batch in with_counts(batches)])
        self.waited += time.perf_counter() - began
        return list(zip(*columns))

    def count(self, unreadable):
        """unreadable (b,): how many images in a row could not be read before each sample's, which
        replaces them."""
        self.read += len(unreadable)
        self.unreadable += int((unreadable > 0).sum())
        if unreadable.max() >= IN_A_ROW:
            raise UserError(f"{IN_A_ROW} images in a row could not be read: is their disk still there?")
        if self.unreadable > max(10, self.read // 100):
            raise UserError(f"{self.unreadable} of {self.read} images could not be read: repair them, or leave them out")


def collate(samples):
    """The samples as a batch; if some have no image, only these, as {"unreadable": (n,)}."""
    missing = [sample for sample in samples if len(sample) == 1]  # see data.Images
    return default_collate(missing or samples)


def with_counts(parts):
    """The batches of a step, from one data set, with the numbers that a stage needs of them. They are
    counted here, on the host: to read a length or a count from the device, the host would have to wait.

    Texts are cut to one length T, and a batch with masked places also gets

    masked_at, hidden_at (M,) int64
        where its labels (b, T) are not −100, and where hidden (b, N) is True, as flat indices.
    masked_labels (M,) int64
        the labels there.
    masked_count, hidden_count
        how many such places a part has on average, so that each part's share is of the step's mean.
    visible (fewest, most)
        how many tokens of a text can be seen.
    """
    parts = [dict(part) for part in parts]
    if "mask" in parts[0]:
        T = max(cut(part["mask"]) for part in parts)
    for part in parts:
        for name in part.keys() & {"text", "mask", "masked", "labels"}:
            part[name] = part[name][:, :T]
        if "labels" in part:
            predicted = part["labels"] != IGNORE
            part["masked_at"] = predicted.flatten().nonzero()[:, 0]
            part["masked_labels"] = part["labels"][predicted]
            seen = (part["mask"] & ~predicted).sum(1)
            part["visible"] = int(seen.min()), int(seen.max())
        if "hidden" in part:
            part["hidden_at"] = part["hidden"].flatten().nonzero()[:, 0]
    for name in ("masked", "hidden"):
        if f"{name}_at" in parts[0]:
            mean = sum(len(part[f"{name}_at"]) for part in parts) / len(parts)
            for part in parts:
                part[f"{name}_count"] = mean
    return parts


def to_device(batch, device):
    """A batch's tensors on the device; its numbers stay as they are."""
    moved, gpu = {}, torch.device(device).type == "cuda"
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            if gpu:  # from pinned memory the copy does not make the host wait
                value = value.contiguous().pin_memory()
            value = value.to(device, non_blocking=True)
        moved[name] = value
    return moved
