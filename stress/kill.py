"""Kills runs and resumes them: every one must end as if nobody had.

    python stress/kill.py --kills 200

A run of most stages and tasks, on one and on two processes, gets a SIGKILL at a random moment, or at a
write of one of its files (before, within or after it). It is resumed, with a second kill or without,
and at its end compared with an undisturbed run, bit for bit: parameters, optimizer, metrics.
"""

import argparse
import collections
import importlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from torch.distributed.elastic.utils.distributed import get_free_port

sys.path[:0] = [str(Path(__file__).parent.parent / "tests"), str(Path(__file__).parent.parent)]

import conftest  # one thread

import runtime

# Six steps each, with a checkpoint after every second
TRAIN = "--steps 6 --warmup 2 --save-every 2 --log-every 1 --batch-size 8"
TUNE = "--save-every 2 --log-every 1 --eval-every 2 --batch-size 8 --drop-path 0.1 --init START/vl/last.pt"
RUNS = {
    "dvae": f"train --stage dvae {TRAIN} --image-size 16 --codes 8 --width 16",
    "image": f"train --stage image {TRAIN} --init START/image/last.pt",
    "text": f"train --stage text {TRAIN} --init START/image/last.pt --drop-path 0.1",
    "vl": f"train --stage vl {TRAIN} --init START/text/last.pt --drop-path 0.1 --keep-previous",
    "momo-image": f"train --stage momo-image {TRAIN} {' '.join(conftest.SIZE)}",
    "momo-text": f"train --stage momo-text {TRAIN} {' '.join(conftest.SIZE)} --no-cmga",
    "momo-vl": f"train --stage momo-vl {TRAIN} {' '.join(conftest.SIZE)}",
    "vqa": f"finetune --task vqa {TUNE} --epochs 0.04",
    "nlvr2": f"finetune --task nlvr2 {TUNE} --epochs 0.04",
    "retrieval": f"finetune --task retrieval {TUNE} --epochs 0.08",
    "classify": f"finetune --task classify {TUNE} --epochs 0.16",
}


def start(words, world, kill_at=None):
    """Starts a script's main in `world` processes → their numbers. kill_at: (n, moment) of the n-th
    write of process 0."""
    port, pids = get_free_port(), []
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        status = 1
        try:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world))
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            silence = os.open(os.environ.get("LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            if kill_at and rank == 0:
                die_while_writing(*kill_at)
            script, *flags = words
            sys.argv = [f"{script}.py", *flags]
            importlib.import_module(script).main()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pids


def die_while_writing(number, moment):
    """This process dies at its write `number`: "before" it, "within" it, or "after" its rename."""
    writes, replace, fsync = [], os.replace, os.fsync

    def counted(path, fill, write=runtime.write):
        writes.append(path)
        if len(writes) == number and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, fill)

    def killing(function, when):
        def call(*arguments):
            if len(writes) == number and moment == when == "within":
                os.kill(os.getpid(), signal.SIGKILL)
            function(*arguments)
            if len(writes) == number and moment == when == "after":
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    runtime.write = counted
    os.fsync, os.replace = killing(fsync, "within"), killing(replace, "after")


def wait(pids, seconds=None):
    """Waits for processes, at most so long; if one fails or time is up, kills the rest. → whether all
    ended well."""
    end, left, well = time.monotonic() + (seconds or 120), set(pids), True
    while left:
        for pid in list(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.remove(pid)
                well = well and status == 0
        if left and (not well or time.monotonic() > end):
            well = False
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return well


def same(one, two):
    """Whether two runs left the same."""
    try:
        conftest.assert_same_run(one, two)
    except (AssertionError, ValueError, runtime.UserError) as error:
        print(f"  {str(error)[:300]}")
        return False
    return True


def run(kills, folder, kinds, seed):
    """→ {(kind, processes): Counter of kills, "went on" and "differed"}."""
    folder = Path(folder)
    if any("START" in RUNS[kind] for kind in kinds):
        for words in conftest.stage_commands(folder / "start"):  # this process starts no threads: it forks
            assert wait(start(["train", *words], 1)), words
    done, outcomes, number = {}, collections.defaultdict(collections.Counter), 0
    while sum(found["kills"] for found in outcomes.values()) < kills:
        kind, world = kinds[number // 2 % len(kinds)], 1 + number % 2
        rng, number = random.Random(f"{seed} {number}"), number + 1
        words = RUNS[kind].replace("START", str(folder / "start")).split()
        if (kind, world) not in done:
            whole = folder / f"{kind}-{world}"
            began = time.monotonic()
            assert wait(start([*words, "--out", str(whole)], world)), f"{kind} on {world} processes"
            done[kind, world] = whole, time.monotonic() - began
        whole, seconds = done[kind, world]
        out = folder / f"{kind}-{world}-{number}"
        words += ["--out", str(out), "--resume"]
        for _ in range(rng.choice((1, 1, 2))):
            outcomes[kind, world]["kills"] += 1
            if rng.random() < 0.5:
                wait(start(words, world, (rng.randint(1, 8), rng.choice(("before", "within", "after")))))
            else:
                wait(start(words, world), rng.uniform(0, seconds))
        went_on = wait(start(words, world)) and same(whole, out)
        outcomes[kind, world]["went on" if went_on else "differed"] += 1
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="RUN")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(args.kills, folder, args.only, args.seed)
    for (kind, world), found in sorted(outcomes.items()):
        print(f"{kind:12} {world} processes  {found['kills']:3} kills  {found['went on']:3} went on  {found['differed']} differed")
    sys.exit(any(found["differed"] for found in outcomes.values()))


if __name__ == "__main__":
    main()
