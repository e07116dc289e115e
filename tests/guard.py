"""Trains five tiny steps of every stage and task, on one process and on two, and prints a hash of what each leaves.

    python tests/guard.py > before.txt        # a few minutes
    python tests/guard.py | diff before.txt -

Moving and rewriting code must not change a line. The hash covers the parameters, not their names.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SIZE = "--dim 32 --layers 2 --heads 2 --image-size 16 --patch-size 8 --drop-path 0.1"
RUN = "--batch-size 8 --save-every 5 --log-every 5"
TRAIN = f"{RUN} --steps 5 --warmup 2"
TUNE = f"{RUN} --drop-path 0.1 --image-size 24 --eval-every 0"

RUNS = {  # in an order in which each finds what it starts from
    "dvae": f"train.py --stage dvae --image-size 16 --patch-size 8 --codes 8 {TRAIN}",
    "image": f"train.py --stage image {SIZE} --dvae OUT/dvae/last.pt {TRAIN}",
    "text": f"train.py --stage text --init OUT/image/last.pt {TRAIN}",
    "vl": f"train.py --stage vl --init OUT/text/last.pt {TRAIN} --accumulate 2",
    "vl-scratch": f"train.py --stage vl {SIZE} --position relative --layer-scale 0.1 --attention separate {TRAIN}",
    "vl-contrast": f"train.py --stage vl {SIZE} --vl-layers 0 --itm-weight 0 --mlm-weight 0 {TRAIN}",
    "vl-shared": f"train.py --stage vl {SIZE} --experts shared --itc-weight 0 --negatives local {TRAIN}",
    "momo-image": f"train.py --stage momo-image {SIZE} {TRAIN}",
    "momo-text": f"train.py --stage momo-text --init OUT/momo-image/last.pt {TRAIN}",
    "momo-vl": f"train.py --stage momo-vl --init OUT/momo-text/last.pt {TRAIN} --accumulate 2",
    "vqa": f"finetune.py --task vqa --init OUT/vl/last.pt --epochs 1e-4 {TUNE} --head-factor 20",
    "nlvr2": f"finetune.py --task nlvr2 --init OUT/vl/last.pt --epochs 1e-4 {TUNE}",
    "retrieval": f"finetune.py --task retrieval --init OUT/vl/last.pt --epochs 2e-4 {TUNE} --itm-weight 1",
    "classify": f"finetune.py --task classify --init OUT/momo-vl/last.pt --epochs 4e-4 {TUNE}",
    "probe": f"finetune.py --task probe --init OUT/vl/last.pt --epochs 4e-4 {TUNE}",
}


def train(name, processes, folder):
    """Runs one of RUNS, and returns the hash of its model and head."""
    words = RUNS[name].replace("OUT", str(folder)).split()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), *words, "--out", str(folder / name)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    content = torch.load(folder / name / "last.pt", weights_only=True)
    tensors = [*content["model"].values(), *content["head"].values()]
    digests = sorted(hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in tensors)
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def all_runs(processes):
    """Lines of name, number of processes, hash."""
    with tempfile.TemporaryDirectory() as folder:
        return [f"{name:12} {processes} {train(name, processes, Path(folder))}" for name in RUNS]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with ThreadPoolExecutor() as pool:
        for lines in pool.map(all_runs, (1, 2)):
            print("\n".join(lines))
