"""Where a script runs: processes, device, precision, optimizer, learning rate, files, one-line errors."""

import argparse
import collections
import contextlib
import ctypes
import datetime
import functools
import gc
import math
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

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
    """An argparse type: a number from `low` to 10¹², int or float as `low` is."""

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
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be valid text
    try:
        main()
    except BrokenPipeError:  # of a reader of our output, such as head
        status = 141
    except (UserError, OSError) as error:
        status, line = 2, f"error: {error}"
    except Stopped as error:
        status, line = 128 + error.number, str(error)
    except KeyboardInterrupt:
        status = 130
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not (full or "allocate memory" in str(error) or "not enough memory" in str(error)):
            raise
        advice = "try a smaller --batch-size, --accumulate 2 or more, --recompute, or a smaller --image-size"
        status, line = 2, f"error: the memory is full ({first_line(error)}): {advice}"
    gc.collect()  # main's objects are gone with the error: the progress bar closes before the line
    if line:
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)  # process 0 speaks first; then torchrun ends this process before it speaks
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
    elif status == 0 and dist.is_initialized():
        dist.barrier()  # nobody leaves while another one still talks to it
        dist.destroy_process_group()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    # Not sys.exit: other processes may wait for us in a collective call that will never come, and
    # threads of the process group that are still alive would abort the end of Python
    os._exit(status)


# ---- Processes and precision ---------------------------------------------------------------------


WHILE_READING = datetime.timedelta(hours=4)  # the others wait while one process reads a whole corpus


class Runtime:
    """This process among W: rank, world, device, main (True on process 0), and autocast(); of
    several processes on_hosts, a group for numbers that are on no device.

    Reads torchrun's environment; without it, one process and no process group.
    """

    def __init__(self, amp="off"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.main = self.rank == 0
        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            if local_rank >= gpus:
                raise UserError(f"process {local_rank} has no GPU: start at most {gpus} per node")
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            keep_memory()
        if self.world > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, timeout=WHILE_READING)
                self.on_hosts = dist.new_group(backend="gloo")  # no device has to wait
            except (RuntimeError, ValueError) as error:  # ValueError: no rank, address or port
                advice = "start all of them, best with torchrun; GLOO_SOCKET_IFNAME names the network between nodes"
                raise UserError(f"{self.world} processes did not meet ({first_line(error)}): {advice}") from None
        self.dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.autocast = functools.partial(torch.autocast, self.device.type, self.dtype, enabled=self.dtype is not None)

    def wrap(self, stage):
        """The stage in DDP."""
        model = nn.parallel.DistributedDataParallel(
            stage,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=stage.takes_turns,
        )
        model.broadcast_buffers = False  # they never change (new versions have another name for the argument)
        return model

    def from_main(self, answer):
        """Process 0's answer(), or its UserError, on all processes; the others do not call it."""
        return everyone(lambda: answer() if self.main else None)[0]

    def meet(self):
        """Waits for all processes."""
        if self.world > 1:
            dist.barrier()

    def print(self, *words):
        if self.main:
            print(*words, flush=True)


def everyone(answer):
    """[answer() of each process], on all of them, or the UserError of one. All processes must call
    this, in the same order."""
    try:
        mine = answer()
    except UserError as error:
        mine = error
    found = [mine]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
    for each in found:
        if isinstance(each, UserError):
            raise each
    return found


def keep_memory():
    """Keeps freed memory in the process (glibc); otherwise every large tensor is mmapped afresh and
    its pages zeroed: a sixth to a quarter of a step's time on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return memory to the kernel
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets a mapping of its own, which would end with it


IMPATIENT = 5  # seconds; a second signal sooner is torchrun's copy of the first, later the user's


class Signals:
    """SIGTERM and SIGINT ask a run to end: after the same step on all processes, with a checkpoint.
    A second signal after IMPATIENT seconds ends it at once."""

    def __init__(self, run):
        self.run, self.caught = run, 0
        self.before = {number: signal.signal(number, self.catch) for number in (signal.SIGTERM, signal.SIGINT)}

    def close(self):
        """From here on signals do again what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def end(self, number, step, out):
        """Ends a run that was asked to, once process 0 has saved."""
        self.run.meet()
        self.close()
        raise Stopped(number, f"stopped after step {step}: --resume --out {out} goes on")

    def catch(self, number, frame):
        if not self.caught:
            self.caught, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > IMPATIENT:
            os._exit(128 + number)

    def asked(self):
        """The number of the signal, or 0: the same on all processes."""
        number = torch.tensor(self.caught)
        if self.run.world > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.run.on_hosts)
        return int(number)


def workers(device, count=None, loaders=1):
    """DataLoader arguments for `count` forked worker processes. None: on a GPU this loader's share
    of the process's cores, all but one; on a CPU 0, because workers would take the cores that
    compute. loaders: how many loaders share these cores."""
    if count is None and torch.device(device).type == "cuda":
        share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1
        count = max(1, share // loaders)
    forked = {"multiprocessing_context": "fork", "worker_init_fn": leave_group} if count else {}
    return {"num_workers": count or 0} | forked


def leave_group(_):
    """Runs in a loader process: from here on only its parent, which needs it for the last step, can end
    it, not Ctrl-C, which signals a whole process group, nor a cluster, which signals every process."""
    os.setpgrp()
    if hasattr(signal, "sigwaitinfo"):  # not on a Mac
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        threading.Thread(target=wait_for_parent, daemon=True).start()


def wait_for_parent():
    """Ends this process when its parent asks for it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_all(*words):
    """Seeds torch from whole numbers such as (seed, step, rank), so that no state need be stored."""
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
    parameters = collections.defaultdict(list)  # {(factor, decay): …}
    for p in stage.parameters():
        if p.requires_grad:
            factor = stage.head_factor if id(p) in in_head else 1.0
            decay = stage.weight_decay if id(p) in matrices else 0.0
            parameters[factor, decay].append(p)
    groups = []
    for factor, decay in sorted(parameters, reverse=True):
        groups.append({"params": parameters[factor, decay], "factor": factor, "weight_decay": decay})
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
    """--compile and --recompute, in this order, because what checkpoint() wraps is hidden from the
    compiler. UserError if the stage has no blocks."""
    blocks = stage.blocks()
    if (args.compile or args.recompute) and not blocks:
        raise UserError("this stage has no Transformer blocks: give --no-compile and --no-recompute")
    if args.compile:
        compile_blocks(blocks, run)
    if args.recompute:
        recompute(blocks)


def recompute(blocks):
    """From here on each block keeps only its input for the backward pass."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(blocks, run):
    """Compiles each block, or says that there is no compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=run.device))
    except torch._dynamo.exc.TorchDynamoException as error:
        run.print(f"--compile: there is no compiler ({first_line(error)}), the blocks run as they are")
        return
    # All blocks share their code, which is compiled for each kind of input, rate of drop-path, kind of
    # block (last, fusing) and mode
    torch._dynamo.config.cache_size_limit = 512  # recompile_limit since torch 2.7
    torch._dynamo.config.accumulated_cache_size_limit = 2048
    torch._dynamo.config.optimize_ddp = False  # it would cut blocks; DDP sends while the next one computes
    torch._inductor.config.fallback_random = True  # look_ahead needs the same drop-path without gradients
    for block in blocks:
        block.forward = torch.compile(block.forward)


# ---- Files ---------------------------------------------------------------------------------------


def once_per_node(fill, read):
    """read(folder) on every process, of a temporary folder that fill(folder) has filled once per
    node. The files in it are unlinked once all processes have them open. An error of fill is a
    UserError on all of them. All processes must call this, in the same order."""
    together = dist.is_initialized()
    local = int(os.environ.get("LOCAL_RANK", 0)) if together else 0
    with contextlib.ExitStack() as stack:
        folders = everyone(lambda: None if local else filled_folder(fill, stack))
        first = dist.get_rank() - local if together else 0  # of this node, whose ranks torchrun gives in a row
        answer = read(Path(folders[first]))
        if together:
            dist.barrier()
    return answer


def filled_folder(fill, stack):
    """Makes and fills a temporary folder, which goes with the ExitStack → its path."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="vlmo-", ignore_cleanup_errors=True)
        path = stack.enter_context(folder)
        fill(Path(path))
    except OSError as error:
        advice = "set TMPDIR to another place"
        raise UserError(f"a temporary folder could not be filled ({error}): {advice}") from None
    return path


def first_line(error):
    return str(error).strip().split("\n")[0][:120]


def refuse_output(flag, path):
    """UserError, before any work, for a file that cannot be written."""
    whole = Path(path).resolve()
    if whole.is_dir() or not os.access(whole.parent, os.W_OK):
        raise UserError(f"{flag} {path}: no file can be written there")


def write(path, fill):
    """Writes a file as a whole or not at all: fill(file) to a temporary name, synced, renamed."""
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
        raise UserError(f"{path} could not be written (an earlier file is kept): {error}") from None
