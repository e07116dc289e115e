"""Where a script runs: processes, device, precision, optimizer groups, schedule, checkpoints, metrics, errors."""

import argparse
import collections
import contextlib
import ctypes
import datetime
import json
import math
import os
import pickle
import struct
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

# ---- Errors ---------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something that the user can mend: one line that says what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors: one line, without the usage of fifty flags above it."""

    def __init__(self, description):
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=plain, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")

    def refuse(self, args, only, what):
        """UserError for a flag that args.stage, a `what`, does not read. only: {flag: the stages that read it}."""
        for flag, stages in only.items():
            if args.stage not in stages and vars(args)[flag] != self.get_default(flag):
                name = "--" + flag.replace("_", "-")
                raise UserError(f"{name} is of {what} {' and '.join(stages)}, not of {args.stage}")


def run(main, *mistakes):
    """Runs a script's main. A UserError, a file or folder that the system refuses, or one of `mistakes` ends it with
    one line and exit status 2."""
    try:
        main()
    except (UserError, OSError, *mistakes) as error:
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)  # process 0's line comes first; if all fail alike, torchrun ends this one before its own
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    else:
        status = 0
    if status == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    if status:
        os._exit(status)  # not sys.exit: other processes may wait for us in a collective call that will never come


# ---- Processes and precision ----------------------------------------------------------------------------------------


class Runtime:
    """This process among W: rank, world, device, main (True on process 0), and autocast().

    Reads torchrun's environment; without it, one process and no process group.
    """

    def __init__(self, amp="off"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.local_rank = local = int(os.environ.get("LOCAL_RANK", 0))
        if torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise UserError(f"process {local} has no GPU: start at most {torch.cuda.device_count()} per node")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            keep_memory()
        if self.world > 1:
            backend, patience = "nccl" if self.device.type == "cuda" else "gloo", datetime.timedelta(hours=2)
            dist.init_process_group(backend, timeout=patience)  # one process may read a whole corpus
        self.dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def scaler(self):
        """Of one training run, for fp16; otherwise it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def wrap(self, stage, parts=False):
        """A stage for DDP, where there are other processes. parts: an update may train a part of it alone."""
        if self.world == 1:
            return stage
        ids = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            stage,
            device_ids=ids,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
            find_unused_parameters=parts,
        )

    def from_main(self, answer):
        """Process 0's answer() on all processes; the others do not ask."""
        answers = [answer() if self.main else None]
        if self.world > 1:
            dist.broadcast_object_list(answers, device=self.device)
        return answers[0]

    def once_a_node(self, work):
        """All processes meet, work() runs on one of each node, all wait until it is done everywhere."""
        self.meet()
        if self.local_rank == 0:
            work()
        self.meet()

    def meet(self):
        """Waits for all processes."""
        if self.world > 1:
            dist.barrier()

    def synchronised(self, stage, last):
        """Around a pass: gradients are sent in the last pass of a step; in those before they add up on this process."""
        return contextlib.nullcontext() if last or self.world == 1 else stage.no_sync()

    def mean(self, values):
        """Average of a tensor over the processes, as nested lists. One collective call, one wait for the device."""
        values = values.detach().double()
        if self.world > 1:
            dist.all_reduce(values)
        return (values / self.world).tolist()

    def print(self, *words):
        if self.main:
            print(*words, flush=True)


def keep_memory():
    """What tensors free stays with the process, where the C library is glibc. Else every large tensor is handed out by
    the kernel anew, which zeroes it page by page: a sixth to a quarter of a step's time."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no tensor has a mapping of its own, which would end with it


def workers(device):
    """Loader processes for each training process that suit this machine: on a CPU they would only take the cores that
    compute."""
    each = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, (os.cpu_count() or 1) // each - 1)) if torch.device(device).type == "cuda" else 0


def seed_all(*words):
    """Seeds torch from whole numbers, say (seed, step, rank): a step's random choices need no stored state."""
    state = 0
    for word in words:
        state = (state * 1_000_003 + int(word) + 1) % 2**63
    torch.manual_seed(state)


# ---- Optimizer ------------------------------------------------------------------------------------------------------


def optimizer(model, weight_decay, betas, head=None, factor=1.0):
    """Fused AdamW over what is trainable. Matrices of Linear, Conv2d and word Embedding decay; nothing else does:
    no bias, norm, LayerScale, position, type or [CLS] embedding, relative table or logit scale.

    Each group has a "factor" of its learning rate: `factor` for the parameters of `head`, a part of the model, else 1.
    """
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))}
    of_head = {id(p) for p in head.parameters()} if head else set()
    groups = collections.defaultdict(list)
    for p in model.parameters():
        if p.requires_grad:
            groups[factor if id(p) in of_head else 1.0, weight_decay if id(p) in matrices else 0.0].append(p)
    groups = [{"params": groups[f, decay], "factor": f, "weight_decay": decay} for f, decay in sorted(groups)[::-1]]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def learning_rate(step, steps, warmup, peak, decay="linear"):
    """Of step 1 … steps: linear warm-up to `peak` at step `warmup`, then decay towards 0 after the last step, "linear"
    or "cosine" (half a wave)."""
    warmup = max(warmup, 1)
    if step <= warmup:
        return peak * step / warmup
    left = (steps + 1 - step) / (steps + 1 - warmup)  # 1 … 0
    return peak * (left if decay == "linear" else (1 - math.cos(math.pi * left)) / 2)


# ---- Files ----------------------------------------------------------------------------------------------------------


def write(path, fill):
    """Writes a file whole or not at all: fill(file) to a temporary name, synced to disk, renamed. UserError if it
    cannot be."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} could not be written, what was there before is kept: {error}") from None


def save(path, content):
    """Writes a checkpoint."""
    write(path, lambda file: torch.save(content, file))


DAMAGED = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, OSError)
DAMAGED += (pickle.UnpicklingError, struct.error)  # what torch.load raises on a file that is no checkpoint


def first_line(error):
    return str(error).strip().split("\n")[0][:120]


def load(path):
    """A checkpoint of this project as a dict of CPU tensors and plain values. UserError if it is none."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise UserError(f"{path} is not a checkpoint of this project, or is damaged ({first_line(error)})") from None
    has = content.keys() if isinstance(content, dict) else ()
    if lacks := {"stage", "step", "args", "config", "model", "tokenizer"}.difference(has):
        raise UserError(f"{path} is not a checkpoint of this project: it has no {', '.join(sorted(lacks))}")
    return content


class Metrics:
    """metrics.jsonl in the output folder, a line an entry, written by process 0. Resuming drops what came after its
    step, and what was measured then: it is measured again."""

    def __init__(self, folder, main, step):
        self.file = None
        if main:
            path = Path(folder, "metrics.jsonl")
            lines = path.read_text().splitlines(keepends=True) if path.exists() and step else []
            whole = [line for line in lines if line.endswith("\n")]  # a killed run may leave half a line
            try:
                entries = [(line, json.loads(line)) for line in whole]
            except ValueError:
                raise UserError(f"{path} is damaged: move it away, and the run goes on with a new one") from None
            self.file = open(path, "w", buffering=1)
            self.file.writelines(line for line, entry in entries if entry["step"] + ("split" in entry) <= step)

    def write(self, **entry):
        """Numbers that are not finite, such as the gradient norm of a skipped fp16 step, become null."""
        if self.file:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
            self.file.write(json.dumps(finite) + "\n")
