"""How long a large manifest takes to be read, and how much memory each process then has.

    python stress/size.py --lines 4000000

Writes a manifest of that many lines, each with a caption of its own and one of 1,000 small images in 10
folders. Two processes share it as two of torchrun would, shuffle it, and draw records at random.
Memory is what is resident beyond the import of torch, in MB.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch.distributed.elastic.utils.distributed import get_free_port

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import sources


def write_manifest(folder, lines):
    rng, words = random.Random(0), "a the red dog cat on under small large tree house runs sees".split()
    for number in range(10):
        (folder / str(number)).mkdir()
    for number in range(1000):
        Image.new("RGB", (8, 8)).save(folder / f"{number % 10}/{number}.png")
    with open(folder / "train.jsonl", "w") as file:
        for number in range(lines):
            image, caption = rng.randrange(1000), " ".join(rng.choices(words, k=10))
            entry = {"image": f"{image % 10}/{image}.png", "captions": [f"{caption} {number}"]}
            file.write(json.dumps(entry) + "\n")


def memory():
    """{"RssAnon", "RssFile", "VmRSS", "VmHWM" (the peak of VmRSS): MB} of this process."""
    lines = (line.split() for line in open("/proc/self/status"))
    values = {line[0].removesuffix(":"): line[1] for line in lines if len(line) > 1}
    return {name: int(values[name]) // 1000 for name in ("VmRSS", "RssAnon", "RssFile", "VmHWM")}


def use(rank, world, port, folder, draws):
    """What a process does with the data, and what it takes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    before, start = memory(), time.perf_counter()
    source = sources.pictures([folder], "train", 8, captions=True)
    args = SimpleNamespace(seed=0, augment=None, no_flip=False)
    pairs = data.Pairs(source, None, 8, args)
    batches = iter(data.shuffled_batches(len(pairs), 1000, rank, world, 0))
    first = next(batches)
    ready = time.perf_counter() - start
    for _ in range(draws // 1000):
        for _, index in first:
            source[pairs.picture(index)]
        first = next(batches)
    drawn = time.perf_counter() - start - ready
    after = memory()
    grown = ", ".join(f"{name} {after[name] - before[name]}" for name in after)
    disk = os.fstat(source.lines.fileno()).st_size + source.line_ends.nbytes + source.text_ends.nbytes
    print(f"process {rank}: {len(pairs)} pairs, first batch after {ready:.1f} s, "
          f"{1e6 * drawn / draws:.0f} µs per record; MB: {grown}; "
          f"temporary files {disk / 1e6:.0f} MB", flush=True)  # fmt: skip
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=4_000_000)
    parser.add_argument("--draws", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), args.lines)
        size = Path(folder, "train.jsonl").stat().st_size
        print(f"manifest: {args.lines} lines, {size / 1e6:.0f} MB", flush=True)
        mp.spawn(use, (2, get_free_port(), folder, args.draws), nprocs=2)


if __name__ == "__main__":
    main()
