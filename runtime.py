"""Where a script runs: processes, device, precision, optimizer, learning rate, log, files, one-line
errors."""

import argparse
import collections
import contextlib
import ctypes
import datetime
import functools
import gc
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- Errors and flags ----------------------------------------------------------------------------


class UserError(Exception):
    """An error the user can fix: one line that says what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """An argparse parser with defaults in its help, and with errors of one line."""

    def __init__(self, **settings):
        super().__init__(formatter_class=Help, allow_abbrev=False, **settings)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults where there are any, and a description with line breaks."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


def at_least(low):
    """A type of flags: numbers, int or float like `low`, not below it, and at most 10¹²."""

    def number(text):
        value = type(low)(text)
        if not low <= value <= 10**12:
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {low}, at most 10¹²")
        return value

    number.__name__ = type(low).__name__  # argparse says "invalid int value"
    return number


class Stopped(Exception):
    """A signal ended the run, after a step and with a checkpoint."""

    def __init__(self, number, message):
        super().__init__(message)
        self.number = number


def run(main):
    """Runs a script's main. An error that the user can fix, a file that the system refuses, or too
    little memory ends it with one line and status 2; a signal with 128 and its number."""
    status, line = 0, ""
    try:
        main()
    except (UserError, OSError) as error:
        status, line = 2, f"error: {error}"
    except Stopped as error:
        status, line = 128 + error.number, str(error)
    except KeyboardInterrupt:
        status = 130
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        advice = "try a smaller --batch-size, --accumulate 2 or more, --recompute, or a smaller --image-size"
        status, line = 2, f"error: the memory is full ({first_line(error)}): {advice}"
    gc.collect()  # main's objects are gone with the error: the progress bar closes before the line
    if line:
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)  # process 0's line comes first; if all fail alike, torchrun ends this one before its own
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
    elif status == 0 and dist.is_initialized():
        dist.barrier()  # nobody leaves while another one still talks to it
        dist.destroy_process_group()
    sys.stdout.flush()
    # Not sys.exit: other processes may wait for us in a collective call that will never come, and
    # threads of the process group that are still alive would abort the end of Python
    os._exit(status)


def out_of_memory(error):
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return full or "allocate memory" in str(error) or "not enough memory" in str(error)


# ---- Processes and precision ---------------------------------------------------------------------


class Runtime:
    """This process among W: rank, world, device, main (True on process 0), and autocast().

    Reads torchrun's environment; without it, one process and no process group.
    """

    def __init__(self, amp="off"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.main = self.rank == 0
        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            if self.local_rank >= gpus:
                raise UserError(f"process {self.local_rank} has no GPU: start at most {gpus} per node")
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            keep_memory()
        if self.world > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            patience = datetime.timedelta(hours=2)  # the others wait while one process reads a whole corpus
            dist.init_process_group(backend, timeout=patience)
        self.dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def wrap(self, stage):
        """The stage in DDP if there are other processes, else the stage itself."""
        if self.world == 1:
            return stage
        model = nn.parallel.DistributedDataParallel(
            stage,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=stage.takes_turns,
        )
        model.broadcast_buffers = False  # they never change (new versions have another name for the argument)
        return model

    def from_main(self, answer):
        """Process 0's answer() on all processes; the others do not call it."""
        answers = [answer() if self.main else None]
        if self.world > 1:
            dist.broadcast_object_list(answers, device=self.device)
        return answers[0]

    def meet(self):
        """Waits for all processes."""
        if self.world > 1:
            dist.barrier()

    def mean(self, values):
        """Average of a tensor over the processes, as nested lists. One collective call, one wait
        for the device."""
        values = values.detach().double()
        if self.world > 1:
            dist.all_reduce(values)
        return (values / self.world).tolist()

    def print(self, *words):
        if self.main:
            print(*words, flush=True)


def keep_memory():
    """Keeps freed memory in the process (glibc); otherwise every large tensor is mmapped afresh and
    its pages zeroed: a sixth to a quarter of a step's time on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return memory to the kernel
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets a mapping of its own, which would end with it


class Signals:
    """SIGTERM and SIGINT ask a run to end: after the same step on all processes, with a checkpoint. A
    second signal, or half a minute in which the step has not ended, ends it at once."""

    def __init__(self, run):
        self.run, self.caught, self.agreed, self.pending = run, 0, 0, None
        self.group = dist.new_group(backend="gloo") if run.world > 1 else None
        handlers = {signal.SIGTERM: self.catch, signal.SIGINT: self.catch, signal.SIGALRM: self.give_up}
        self.before = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def close(self):
        """From here on signals do again what they did before."""
        signal.alarm(0)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.pending:
            self.pending[1].wait()

    def end(self, step, out):
        """Ends a run that was asked to, once process 0 has saved."""
        self.run.meet()
        self.close()
        raise Stopped(self.agreed, f"stopped after step {step}: --resume --out {out} goes on")

    def catch(self, number, frame):
        if self.caught:
            os._exit(128 + number)
        self.caught = number
        signal.alarm(30)

    def give_up(self, number, frame):
        os._exit(128 + self.caught)

    def asked(self):
        """The number of the signal, or 0: the same on all processes. They agree on it in the
        background, one step later than it came, so that no step waits."""
        if not self.group:
            self.agreed = self.caught
            return self.agreed
        if self.pending:
            number, work = self.pending
            work.wait()
            self.agreed = int(number)
        number = torch.tensor(self.caught)
        self.pending = number, dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return self.agreed


def loader_workers(device):
    """Default number of loader processes per training process. On a CPU they would take the cores
    that compute."""
    if torch.device(device).type != "cuda":
        return 0
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, cores - 1))


def seed_all(*words):
    """Seeds torch from whole numbers such as (seed, step, rank): random choices of a step need no
    stored state."""
    state = 0
    for word in words:
        state = (state * 1_000_003 + int(word) + 1) % 2**63
    torch.manual_seed(state)


# ---- Optimization --------------------------------------------------------------------------------


def adamw(stage):
    """Fused AdamW over the trainable parameters of a stage.

    Weights of Linear, Conv2d and word Embedding decay. Nothing else does: no bias, norm,
    LayerScale, position, type or [CLS] embedding, relative table or logit scale. Each group has a
    "factor" of its learning rate: stage.head_factor for the parameters of stage.head, else 1.
    """
    matrices = {id(m.weight) for m in stage.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))}
    in_head = {id(p) for p in stage.head.parameters()}
    groups = collections.defaultdict(list)
    for p in stage.parameters():
        if p.requires_grad:
            factor = stage.head_factor if id(p) in in_head else 1.0
            decay = stage.weight_decay if id(p) in matrices else 0.0
            groups[factor, decay].append(p)
    ordered = sorted(groups, reverse=True)
    groups = [{"params": groups[key], "factor": key[0], "weight_decay": key[1]} for key in ordered]
    return torch.optim.AdamW(groups, lr=0.0, betas=stage.betas, fused=True)


def learning_rate(step, steps, warmup, peak, decay="linear"):
    """Learning rate at step 1..steps: linear warmup to `peak` at step `warmup`, then decay towards
    0 after the last step, "linear" or "cosine" (half a wave)."""
    warmup = max(warmup, 1)
    if step <= warmup:
        return peak * step / warmup
    left = (steps + 1 - step) / (steps + 1 - warmup)  # 1 … 0
    return peak * (left if decay == "linear" else (1 - math.cos(math.pi * left)) / 2)


def speed_up(stage, args, run):
    """--compile: compiles the blocks. --recompute: a block keeps only its input for the backward
    pass. In this order, because what checkpoint() wraps is hidden from the compiler."""
    if args.compile:
        compile_blocks(stage.blocks(), run)
    if args.recompute:
        for block in stage.blocks():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(blocks, run):
    """Compiles each block, or says that there is no compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=run.device))
    except torch._dynamo.exc.TorchDynamoException as error:
        run.print(f"--compile: there is no compiler ({first_line(error)}), the blocks run as they are")
        return
    # All blocks share their code, which is compiled for each kind of input, of block (lower, last,
    # fusing) and of mode.
    torch._dynamo.config.cache_size_limit = 64  # recompile_limit since torch 2.7
    for block in blocks:
        block.forward = torch.compile(block.forward)


# ---- Files and the log ---------------------------------------------------------------------------


def first_line(error):
    return str(error).strip().split("\n")[0][:120]


def refuse_output(flag, path):
    """UserError, before any work, for a file that cannot be written."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{flag} {path}: no such folder")
    if not os.access(path.resolve().parent, os.W_OK):
        raise UserError(f"{flag} {path}: nothing can be written there")


def write(path, fill):
    """Writes a file as a whole or not at all: fill(file) to a temporary name, synced to disk,
    renamed."""
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
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} could not be written, what was there before is kept: {error}") from None


class Log:
    """metrics.jsonl and the progress bar, on process 0: means over the steps since the last line,
    and over processes.

    Values stay on the device until a line is written. Resuming after step `done` drops later lines.
    saved: the step of the last checkpoint; 0: there is none.
    """

    def __init__(self, out, args, run, stage, loader, done=0, record=-math.inf):
        self.run, self.stage, self.loader, self.args, self.record = run, stage, loader, args, record
        self.out, self.saved, self.applied, self.in_a_row = out, done, 0, 0
        self.bar = tqdm(total=args.steps, initial=done, disable=not run.main, unit="step", mininterval=1)
        self.file = None
        if run.main:
            path = Path(out, "metrics.jsonl")
            kept = ""
            if done and path.exists():  # the test split is measured again at the end
                for line, entry in read_metrics(path):
                    kept += line if entry["step"] <= done and entry.get("split") != "test" else ""
            write(path, lambda file: file.write(kept.encode()))
            self.file = open(path, "a", buffering=1)
        self.restart(done)

    def restart(self, step):
        self.step, self.clock = step, time.perf_counter()
        self.sums = collections.defaultdict(float)
        self.counts = collections.Counter()
        self.skipped = torch.zeros((), device=self.run.device)

    def add(self, values):
        """Adds the losses of one part of a step: {name: scalar}."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.detach().float()
            self.counts[name] += 1

    def end_step(self, gradient_norm):
        """gradient_norm: under fp16 a step in which it is not finite is skipped, and counts as one."""
        if self.args.amp == "fp16":
            finite = gradient_norm.isfinite()
            self.skipped += ~finite
            gradient_norm = gradient_norm.where(finite, 0)
        self.add({"gradient norm": gradient_norm})
        self.bar.update()

    def write(self, step, lr):
        """Writes a line. UserError, on all processes alike, if a loss or parameter is not finite, or
        fp16 has skipped too many steps."""
        means = [total / self.counts[name] for name, total in self.sums.items()]
        size = nn.utils.get_total_norm([p.detach() for p in self.stage.parameters() if p.requires_grad])
        others = [size.float(), self.skipped, means[0].new_tensor(self.loader.unreadable)]
        *means, size, skipped, unreadable = self.run.mean(torch.stack([*means, *others]))  # the only wait for the device
        values, steps = dict(zip(self.sums, means)), step - self.step
        if skipped:
            values["gradient norm"] *= steps / max(steps - skipped, 1)
        for name, value in [*values.items(), ("the norm of all parameters", size)]:
            if not math.isfinite(value):
                raise UserError(f"{name} is {value} between steps {self.step + 1} and {step}: {self.advice()}")
        self.applied += steps - skipped
        self.in_a_row = self.in_a_row + steps if skipped == steps else 0
        if self.in_a_row >= 100 or (step == self.args.steps and self.applied == 0):
            raise UserError(f"fp16 has skipped the last {self.in_a_row} updates, because gradients overflow: use --amp bf16")
        counts = {"skipped": round(skipped)} if self.args.amp == "fp16" else {}
        rate = {f"{self.stage.unit}_per_s": steps * self.args.batch_size / (time.perf_counter() - self.clock)}
        self.line(step=step, **values, lr=lr, **rate, **counts, unreadable=round(unreadable * self.run.world))
        shown = [*self.stage.loss_weights, "gradient norm"]
        self.bar.set_postfix({name: f"{values[name]:.2f}" for name in shown if name in values}, refresh=False)
        self.restart(step)

    def advice(self):
        if self.saved:
            last = Path(self.out, "last.pt")
            return f"{last} is of step {self.saved}, from before; --resume --allow-changes with a lower --lr"
        return "there is no checkpoint yet; try a lower --lr"

    def measure(self, split, step):
        """Measures the stage on a split and writes a line. → whether it is the best so far, by
        stage.best."""
        began = time.perf_counter()
        with self.run.autocast():
            results = self.stage.measure(split, self.run.device)
        self.stage.train()
        self.line(step=step, split=split, **results)
        if self.run.main:
            self.bar.write(f"step {step}, split {split}: {in_words(results)}")
        self.clock += time.perf_counter() - began  # the rate is that of training
        improved = self.stage.best is not None and results[self.stage.best] > self.record
        if improved:
            self.record = results[self.stage.best]
        return improved

    def close(self):
        self.bar.close()
        if self.file:
            self.file.close()

    def line(self, **entry):
        """Measures that are not finite, such as a perplexity, become null."""
        if self.file:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
            self.file.write(json.dumps(finite) + "\n")


def read_metrics(path):
    """The lines of a metrics.jsonl: [(line, entry), …]."""
    found = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # a killed run may leave half a line
        try:
            entry = json.loads(line)
            found.append((line, entry | {"step": int(entry["step"])}))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise UserError(f"{path} is damaged: move it away (a run that is resumed begins a new one)") from None
    return found


def in_words(results):
    """{name: number} as one line."""
    shown = []
    for name, value in results.items():
        shown.append(f"{name} {value:.4g}" if value < 1000 else f"{name} {value:.0f}")
    return ", ".join(shown)
