"""Pre-training: the flags and the loop of every stage (stages.py, momo_stages.py) and task (finetune.py).

    python train.py                             # stage vl: tiny model, built-in world, any machine

    python train.py --stage dvae                # what stage image needs
    python train.py --stage image               # the three stages, each from the one before
    python train.py --stage text --init runs/image/last.pt
    python train.py --stage vl --init runs/text/last.pt

    python train.py --stage text --help         # the flags of a stage, with their defaults
    torchrun --nproc_per_node=8 train.py --config base --data coco vg --amp bf16 --compile
"""

import argparse
import dataclasses
import math
from pathlib import Path

import torch
from torch import nn

import checkpoint
import data
import drawing
import runtime
from dvae import DVAE
from loader import Loader
from log import Log
from mome import CONFIGS
from momo_stages import MoMoAll, MoMoImage, MoMoText, MoMoVL
from runtime import UserError, at_least
from stage import FIELDS
from stages import VL, Image, Text

STAGES = {
    "dvae": DVAE,
    "image": Image,
    "text": Text,
    "vl": VL,
    "momo-image": MoMoImage,
    "momo-text": MoMoText,
    "momo-vl": MoMoVL,
    "momo-all": MoMoAll,
}

# ---- The flags, read in two steps: first what decides which other flags there are ----------------


def parse(stages, option, default, description):
    """→ the class of the stage, args, its Config, and the Checkpoint to start from or None."""
    first = runtime.Parser(add_help=False)
    first.add_argument(option, dest="stage", choices=list(stages), help="what to train")
    first.add_argument("--config", choices=list(CONFIGS), help="size of the model")
    first.add_argument("--init", metavar="FILE", help="start from this checkpoint")
    first.add_argument("--out", metavar="DIR", help="where the run goes")
    first.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    chosen, _ = first.parse_known_args()

    # The checkpoint that a run goes on from, or begins with, and the stage
    name = chosen.stage or default
    out = chosen.out or f"runs/{name}"
    for path in (Path(out), *Path(out).parents):
        if path.is_file():
            raise UserError(f"--out {out}: {path} is a file")
    start, last = None, Path(out, "last.pt")
    if chosen.resume and last.exists():
        start = checkpoint.read(last, resumed=True)
    elif chosen.init:
        start = checkpoint.read(chosen.init)
    if start and start.resumed:
        if chosen.stage not in (None, start.stage):
            raise UserError(f"{out} holds a run of {start.stage}: give {chosen.stage} another --out")
        name = start.stage
        if name not in stages:
            raise UserError(f"{out} holds a run of {name}, which another script continues")
    if not name:
        runtime.Parser(parents=[first], description=description).parse_args()  # it may be --help
        raise UserError(f"name a task: {option} {', '.join(stages)}")
    Stage = stages[name]

    # The model starts from the checkpoint's architecture, or from that of --config
    if start and (start.stage == "dvae") != (name == "dvae"):
        raise UserError(f"{option} {name} cannot start from {start.path}, written by stage {start.stage}")
    size = start.args["config"] if start else chosen.config or "tiny"
    if chosen.config not in (None, size):
        raise UserError(f"{start.path} was trained with --config {size}: leave --config out")
    base = start.config if start and name != "dvae" else CONFIGS[size]
    base = dataclasses.replace(base, **Stage.architecture)
    defaults = Stage.recipe.get(size, Stage.recipe["base"]) | {"stage": name, "config": size, "out": out}
    if start and start.stage == name:
        defaults["max_text_len"] = base.max_text_len  # a checkpoint of this stage keeps its own
    if start and start.resumed:
        defaults |= start.args | {"out": out, "allow_changes": False}  # allowed once

    # All other flags, with the defaults of this very run
    parser = runtime.Parser(parents=[first], description=description)
    run_flags(parser, tuned=option == "--task")
    Stage.flags(parser, base)  # a flag of another stage is an "unrecognized argument"
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    changed = {name: value for name, value in vars(args).items() if name in FIELDS}
    try:
        config = dataclasses.replace(base, **changed)
    except ValueError as error:
        raise UserError(str(error)) from None
    return Stage, args, config, start


def run_flags(parser, tuned):
    """Flags of every run. tuned: a task's run is measured in epochs, and chooses its best step."""
    parser.set_defaults(splits=data.SPLITS, training=True)
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=at_least(0), default=0, help="seed of all random choices")
    group.add_argument("--save-every", type=at_least(1), default=1000, metavar="STEPS", help="write last.pt")
    group.add_argument("--keep-previous", action="store_true", help="keep the old last.pt as previous.pt")
    changes = "let a resumed run learn with other settings: batch, seed, schedule, data, …"
    group.add_argument("--allow-changes", action="store_true", help=changes)
    group.add_argument("--log-every", type=at_least(1), default=20, metavar="STEPS", help="write to metrics.jsonl")
    when = "measure split val (default: per epoch, four times at least)" if tuned else "measure split val; 0: never"
    group.add_argument(
        "--eval-every", type=at_least(0), default=None if tuned else 0, metavar="STEPS", help=when
    )
    group = parser.add_argument_group("optimization")
    total = "samples of a step, over all processes"
    group.add_argument("--batch-size", type=at_least(1), metavar="B", help=total)
    if tuned:  # finetune.schedule sets steps, warmup and eval_every from it
        group.add_argument("--epochs", type=at_least(1e-9), help="epochs; the first tenth is warmup")
    else:
        group.add_argument("--steps", type=at_least(1), help="optimizer steps")
        group.add_argument("--warmup", type=at_least(0), metavar="STEPS", help="linear warmup to --lr")
    group.add_argument("--lr", type=at_least(0.0), help="peak learning rate")
    group.add_argument(
        "--clip", type=at_least(0.0), default=0.0, metavar="NORM", help="clip the gradient's norm; 0: off"
    )
    passes = "compute a step in A parts, in the memory of one; contrast and negatives see the whole step"
    group.add_argument("--accumulate", type=at_least(1), default=1, metavar="A", help=passes)
    group = parser.add_argument_group("speed")
    group.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision")
    switch = argparse.BooleanOptionalAction
    group.add_argument("--compile", action=switch, default=False, help="compile the blocks")
    group.add_argument("--recompute", action=switch, default=False, help="recompute blocks: less memory, slower")


# ---- The loop ------------------------------------------------------------------------------------


def summary(stage, args, run, start):
    """What a run says when it begins: what came from a checkpoint, and what it trains."""
    if start and not start.resumed:
        run.print(f"{start.path} (stage {start.stage}, step {start.step}):")
        run.print(checkpoint.report(checkpoint.with_sizes(stage.origin, stage.model)))
    count = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    told = f"{args.steps} steps of {args.batch_size} {stage.unit}{stage.note(args, run)}"
    splits = " and ".join(stage.measured()) or "nothing"
    run.print(
        f"stage {args.stage}, {args.config}: {count / 1e6:.1f} M trainable parameters, "
        f"{len(stage.samples[0])} {stage.unit}, {run.world} × {run.device}, {told}, "
        f"measured on {splits}\n  learns: {', '.join(checkpoint.trainable(stage.model))}"
    )


def freeze_unread(stage, batches, run):
    """Freezes what no loss reads, as one backward pass shows: no optimizer, checkpoint or DDP has it."""
    blocks = stage.blocks()
    runtime.recompute(blocks)  # the memory of this pass is not to be more than that of a step
    with run.autocast():
        values = stage(*batches)
    sum(values[name] for name in stage.loss_weights).backward()
    for parameter in stage.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    stage.zero_grad()
    for block in blocks:
        del block.forward


def train(stage, args, run, start=None):
    """The loop of every stage and every task."""
    resumed = bool(start and start.resumed)
    done, record = (start.step, start.record) if resumed else (0, -math.inf)

    # The parts of the first step tell what is trained
    stage.to(run.device).train()
    loader = Loader(stage.samples, args, run, done)
    parts = next(loader)
    freeze_unread(stage, parts[0], run)

    # Optimizer, and where a resumed run left it
    optimizer = runtime.adamw(stage)
    scaler = torch.amp.GradScaler(run.device.type, enabled=args.amp == "fp16")
    if resumed:
        start.restore(stage, args, run, optimizer, scaler)
    if start:
        start.release()
    runtime.speed_up(stage, args, run)
    model = run.wrap(stage) if run.world > 1 else stage

    # The folder of the run
    out = checkpoint.prepare(stage, args, run, resumed)
    summary(stage, args, run, start)
    log = Log(out, args, run, stage, loader, done, record)
    signals = runtime.Signals(run)

    for step in range(done + 1, args.steps + 1):
        lr = runtime.learning_rate(step, args.steps, args.warmup, args.lr, stage.decay)
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * lr
        stage.run_seed, stage.step = args.seed, step

        # Forward and backward, part by part; DDP sends gradients in the last one only
        with run.autocast():
            parts = stage.look_ahead(parts)
        for part, batches in enumerate(parts):
            model.require_backward_grad_sync = part == args.accumulate - 1  # DDP's; else of no effect
            stage.seed(part)
            with run.autocast():
                values = model(*batches)
            loss = sum(w * values[name] for name, w in stage.loss_weights.items() if name in values)
            scaler.scale(loss / args.accumulate).backward()
            log.add(values)
        if step < args.steps:
            parts = next(loader)  # while the GPU is busy

        # Update; under fp16 the scaler skips a gradient that is not finite
        scaler.unscale_(optimizer)
        log.end_step(nn.utils.clip_grad_norm_(stage.parameters(), args.clip or math.inf))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # Log, measure, save: a checkpoint is never ahead of metrics.jsonl, and what it holds is finite
        stop, last = signals.asked(), step == args.steps
        saves = step % args.save_every == 0 or last or stop
        measures = args.eval_every and (step % args.eval_every == 0 or (last and stage.best))
        if saves or measures or step % args.log_every == 0:
            log.write(step, lr)
        if measures and log.measure("val", step):  # the best so far
            checkpoint.save(out / "best.pt", stage, args, run, step, log.record)
        if saves:
            checkpoint.save(out / "last.pt", stage, args, run, step, log.record, optimizer, scaler)
            log.saved = step
        if stop and not last:
            signals.end(stop, step, out)

    signals.close()
    finish(stage, out, args, run, log)


def finish(stage, out, args, run, log):
    """The end of a run: the test split, a task's at its best step, and pictures."""
    run.meet()  # process 0 has saved
    file, step = out / "last.pt", args.steps
    if stage.best and args.eval_every:
        file = out / "best.pt"
        best = checkpoint.read(file)
        best.give(stage, run)
        step = best.step
    if "test" in stage.measured():
        log.measure("test", step)
    log.close()
    pictures = stage.draw(run.device) if stage.measured() else {}
    if run.main:
        if chart := drawing.curves({str(out): [out]}):
            pictures["curve.png"] = chart
        for name, picture in pictures.items():
            picture.save(out / name)
    beside = f"; {', '.join(pictures)} next to it" if pictures else ""
    run.print(f"{file} holds the model{beside}")


def start_runtime(args, start):
    """→ the Runtime. UserError, before any work, if the processes go on from different steps."""
    run = runtime.Runtime(args.amp)
    done = start.step if start and start.resumed else 0
    last = Path(args.out, "last.pt")
    if len(set(runtime.everyone(lambda: done))) > 1:
        raise UserError(f"--resume: {last} is not the same on all nodes: put --out where all find it")
    return run


def main():
    Stage, args, config, start = parse(STAGES, "--stage", "vl", __doc__)
    run = start_runtime(args, start)
    if args.warmup > args.steps:
        args.warmup = args.steps // 10
        run.print(f"the warm-up is longer than the run: cut to {args.warmup} steps")
    train(Stage(args, config, start, run), args, run, start)


if __name__ == "__main__":
    runtime.run(main)
