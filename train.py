"""Pre-training (Section 3.3): image-text contrast, image-text matching and masked language modeling on pairs.

    python train.py                                          # tiny model, built-in world, any machine
    torchrun --nproc_per_node=8 train.py --stage vl --config base --data coco vg sbu cc --vocab vocab.txt --amp bf16

Shape letters: b local batch, W processes, B = W·b, T text tokens, N patches, D dim, M masked tokens.
"""

import dataclasses
import itertools
import json
import math
import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import evaluate
import losses
import runtime
from mome import CONFIGS, Config, VLMo

# Per config: what the paper publishes (Section 4.1), and what suits the tiny one on two CPU cores.
RECIPES = {
    "tiny": {"batch_size": 64, "steps": 750, "warmup": 75, "lr": 1e-3, "clip": 1.0, "save_every": 100},
    "base": {"batch_size": 1024, "steps": 200_000, "warmup": 2500, "lr": 2e-4, "clip": 0.0, "save_every": 1000},
    "base_plus": {"batch_size": 1024, "steps": 200_000, "warmup": 2500, "lr": 2e-4, "clip": 0.0, "save_every": 1000},
    "large": {"batch_size": 1024, "steps": 200_000, "warmup": 2500, "lr": 5e-5, "clip": 0.0, "save_every": 1000},
}
BETAS, WEIGHT_DECAY = (0.9, 0.98), 0.01


# ---- Stage vl --------------------------------------------------------------------------------------------------------


class VisionLanguageStage(nn.Module):
    """All losses of a batch of pairs: encode → gather → draw → exchange → fuse → losses (Section 3.3)."""

    def __init__(self, model, active, negatives="global"):
        """active: which of "itc", "itm", "mlm" are in use; what only the others would train is frozen."""
        super().__init__()
        self.model, self.active, self.negatives = model, active, negatives
        for module in untrained(model, *active):
            module.requires_grad_(False)

    def forward(self, batch):
        """batch of data.collate, b pairs → {loss's name: scalar}, each as losses.py defines its mean."""
        same, out = losses.same_pairs(batch["ids"]), {}  # (b, B)
        i2t = t2i = torch.zeros(same.shape, device=same.device)  # without ITC all candidates are alike
        if "itc" in self.active:
            T = data.cut(batch["mask"])
            image = self.model.embed_image(batch["image"])  # (b, D)
            text = self.model.embed_text(batch["text"][:, :T], batch["mask"][:, :T])  # (b, D)
            i2t, t2i = losses.similarities(image, text, self.model.scale())
            out["itc"] = losses.itc_loss(i2t, t2i, same)
        if "itm" in self.active or "mlm" in self.active:
            out |= self.fuse(batch, i2t, t2i, losses.candidates(same, self.negatives))
        return out

    def fuse(self, batch, i2t, t2i, candidate):
        """MLM and ITM from one pass over up to 4b pairs: masked; matched; with a wrong image; with a wrong text."""
        b, image, text, mask = len(batch["image"]), batch["image"], batch["text"], batch["mask"]
        texts, masks, images = [], [], []
        if "mlm" in self.active:
            texts, masks, images = [batch["masked"]], [mask], [image]
        if "itm" in self.active:
            wrong_image, image_found = losses.draw_negatives(t2i, candidate)
            wrong_text, text_found = losses.draw_negatives(i2t, candidate)
            image_drawn = losses.exchange(image, wrong_image)
            text_drawn, mask_drawn = losses.exchange(torch.stack([text, mask.long()], dim=1), wrong_text).unbind(1)
            texts, masks = texts + [text, text, text_drawn], masks + [mask, mask, mask_drawn.bool()]
            images = images + [image, image_drawn, image]
        text, mask = torch.cat(texts), torch.cat(masks)
        T = data.cut(mask)
        hidden = self.model.encode_pair(text[:, :T], mask[:, :T], torch.cat(images), rows=T)  # (b, 3b or 4b, T, D)
        out = {}
        if "mlm" in self.active:
            labels = batch["labels"][:, :T]  # (b, T)
            at = (labels != data.IGNORE).nonzero(as_tuple=True)
            out["mlm"] = losses.mlm_loss(self.model.mlm_head(hidden[:b][at]), labels[at])  # of (M, V), (M,)
        if "itm" in self.active:
            pooled = self.model.pool(hidden[-3 * b :])  # (3b, D)
            matched = torch.arange(3 * b, device=pooled.device) < b
            found = torch.cat([torch.ones_like(image_found), image_found, text_found])
            out["itm"] = losses.itm_loss(self.model.itm_head(pooled), matched, found)
        return out


def untrained(model, *active):
    """What no active loss reads, so that it can be frozen: its gradient would be none."""
    fusing = [block for block in model.blocks if "vl" in block.experts]
    itc, itm, mlm = (name in active for name in ("itc", "itm", "mlm"))
    if not itc:  # no single-modality pass: the vision and language experts of the top layers are idle
        yield from (model.itc_image, model.itc_text, model.logit_scale)
        yield from (block.experts[name] for block in fusing for name in ("vision", "language"))
        last = model.blocks[-1]
        if not fusing:  # the last block computes a pair's text rows alone: image rows answer there, and ask nothing
            unread = [last.experts] + [last.attention.query, last.attention.out]
            yield from (router["vision"] for router in unread if "vision" in router)
    if not itm:
        yield from (model.pooler, model.itm_head)
    if not mlm:
        yield model.mlm_head
    if not itm and not mlm:
        yield from (block.experts["vl"] for block in fusing)


# ---- The command -----------------------------------------------------------------------------------------------------


def parse():
    parser = runtime.Parser(__doc__)
    group = parser.add_argument_group("run")
    group.add_argument("--stage", choices=["vl"], default="vl")
    group.add_argument(
        "--out", default="runs/vl", metavar="DIR", help="for last.pt, metrics.jsonl, config.json [%(default)s]"
    )
    group.add_argument("--init", metavar="FILE", help="start from this checkpoint's weights and tokenizer")
    group.add_argument("--resume", action="store_true", help="continue the run in --out if there is one, else start it")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--save-every", type=int, metavar="STEPS", help="[1000; for tiny 100]")
    group.add_argument("--log-every", type=int, default=20, metavar="STEPS", help="[%(default)s]")
    group.add_argument(
        "--eval-every", type=int, default=0, metavar="STEPS", help="zero-shot retrieval on split val [0: never]"
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", nargs="+", default=["shapes"], metavar="DIR", help="folders, or the built-in world [shapes]"
    )
    group.add_argument("--vocab", metavar="FILE", help="vocab.txt or tokenizer.json [trained on the captions]")
    group.add_argument("--augment", choices=data.AUGMENTATIONS, help="[randaugment, the paper's; for shapes none]")
    group.add_argument(
        "--flip", action="store_true", help="mirror half the images: not where captions say left and right"
    )
    group.add_argument("--workers", type=int, metavar="N", help="loader processes per training process [by the cores]")

    group = parser.add_argument_group(
        "optimization", "defaults follow --config; in brackets the paper's for base / large"
    )
    group.add_argument("--batch-size", type=int, metavar="PAIRS", help="of a step, over all processes [1024]")
    group.add_argument(
        "--accumulate", type=int, default=1, metavar="A", help="split a step into A passes; negatives come from one"
    )
    group.add_argument("--steps", type=int, help="[200000]")
    group.add_argument("--warmup", type=int, metavar="STEPS", help="[2500]")
    group.add_argument("--lr", type=float, help="peak learning rate [2e-4 / 5e-5]")
    group.add_argument("--clip", type=float, metavar="NORM", help="clip the gradient's norm; 0 = off [off]")
    group.add_argument("--itc-weight", type=float, default=1.0, metavar="W", help="0 drops the loss (default 1)")
    group.add_argument("--itm-weight", type=float, default=1.0, metavar="W", help="(default 1)")
    group.add_argument("--mlm-weight", type=float, default=0.25, metavar="W", help="(default 0.25)")
    group.add_argument("--negatives", choices=["global", "local"], default="global", help="hard negatives: Table 6")

    group = parser.add_argument_group("speed")
    group.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision [off]")
    group.add_argument("--compile", action="store_true", help="compile the blocks")

    group = parser.add_argument_group("architecture", "--config, and any field of it; in brackets each config's value")
    group.add_argument("--config", choices=list(CONFIGS), help="[tiny, or that of --init]")
    for field in dataclasses.fields(Config):
        values = ", ".join(f"{name} {vars(config)[field.name]}" for name, config in CONFIGS.items())
        flag, kind = "--" + field.name.replace("_", "-"), field.type
        group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=f"[{values}]")
    return parser.parse_args()


def check(args, here):
    """Fills in the recipe's defaults → weights of the losses in use. UserError for numbers that do not fit."""
    for name, value in RECIPES[args.config].items():
        if vars(args)[name] is None:
            vars(args)[name] = value
    if min(args.batch_size, args.accumulate, args.steps, args.save_every, args.log_every) < 1:
        raise runtime.UserError("--batch-size, --accumulate, --steps, --save-every and --log-every must be at least 1")
    if min(args.seed, args.warmup, args.eval_every, args.workers or 0) < 0:
        raise runtime.UserError("--seed, --warmup, --eval-every and --workers must not be negative")
    weights = {"itc": args.itc_weight, "itm": args.itm_weight, "mlm": args.mlm_weight}
    if not all(math.isfinite(value) and value >= 0 for value in (args.lr, args.clip, *weights.values())):
        raise runtime.UserError("--lr, --clip and the losses' weights must be finite and not negative")
    if not any(weights.values()):
        raise runtime.UserError("the losses' weights must not all be 0")
    if args.batch_size % (here.world * args.accumulate):
        parts = f"{here.world} processes × {args.accumulate} passes (--accumulate)"
        raise runtime.UserError(f"--batch-size {args.batch_size} is not divisible by {parts}")
    return {name: weight for name, weight in weights.items() if weight > 0}


def configure(args, config):
    """The architecture: `config` of a checkpoint (or None), or that of --config, with the flags on top."""
    base = CONFIGS[args.config or "tiny"] if args.config or not config else config
    flags = {field.name: vars(args)[field.name] for field in dataclasses.fields(Config)}
    try:
        return dataclasses.replace(base, **{name: value for name, value in flags.items() if value is not None})
    except ValueError as error:
        raise runtime.UserError(str(error)) from None


def make_tokenizer(args, here, source, size):
    """That of --vocab, or one trained on the captions, by process 0."""
    if args.vocab:
        return data.load_tokenizer(args.vocab)
    text = here.from_main(lambda: data.train_tokenizer(source.corpus(), size).to_str())
    return data.tokenizer_from_json(text, "the new tokenizer")


def prepare_folder(out, resumed, here):
    """--out exists; what an earlier run left there moves aside, so that nothing is lost."""
    try:
        if here.main and not resumed and (out / "last.pt").exists():
            names = (Path(f"{out.resolve()}.{n}") for n in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            out.resolve().rename(aside)
            here.print(f"{out} held a run: moved to {aside.name} beside it (--resume would have continued it)")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise runtime.UserError(f"--out {out}: {error.strerror}") from None


def loader(args, here, source, words, image_size, start):
    """Endless batches of this process from pass `start` on."""
    kind = args.augment or ("none" if args.data == ["shapes"] else "randaugment")
    pairs = data.Pairs(source, words, image_size, args.seed, kind, args.flip)
    local = args.batch_size // here.world // args.accumulate
    order = data.Order(len(source), local, here.rank, here.world, args.seed, start)
    workers, gpu = args.workers, here.device.type == "cuda"
    if workers is None:  # on a CPU they would only take the cores that compute
        workers = max(1, min(8, (os.cpu_count() or 1) // here.local_world - 1)) if gpu else 0
    return iter(DataLoader(pairs, batch_sampler=order, num_workers=workers, collate_fn=data.collate, pin_memory=gpu))


class Unreadable:
    """Image files that this process could not read: each named once and counted; too many end the run."""

    def __init__(self, images):
        self.files, self.limit = set(), max(10, images // 100)

    def check(self, batch):
        """Takes the list of files out of a batch."""
        files = batch.pop("unreadable")
        for file in sorted(set(files) - self.files):
            tqdm.write(f"unreadable image, another stands in: {file}")
            self.files.add(file)
        if len(self.files) > self.limit or not batch:
            reason = f"more than {self.limit}" if batch else f"{data.IN_A_ROW} in a row"
            raise data.DataError(f"{len(self.files)} images could not be read, {reason}: {files[0]}, …")


def check_finite(names, first, rows):
    """rows (steps, names) from step `first` on. UserError that names the first value that is not finite."""
    for step, row in enumerate(rows, start=first):
        for name, value in zip(names, row):
            if not math.isfinite(value):
                advice = "the last checkpoint is from before; try a lower --lr, or --resume with another --seed"
                raise runtime.UserError(f"stage vl, step {step}: {name} is {value}: {advice}")


def continue_from(start, path, described, here, optimizer):
    """Puts optimizer and scaler where a checkpoint left them → the number of steps done."""
    try:
        done, then = start["step"], start["args"] | {"processes": start["processes"]}
        optimizer.load_state_dict(start["optimizer"])
        if start["scaler"] and here.scaler.is_enabled():
            here.scaler.load_state_dict(start["scaler"])
    except (KeyError, ValueError):
        advice = "resume with the losses that it was trained with, or start from it with --init"
        raise runtime.UserError(f"{path} holds no run that can be continued like this: {advice}") from None
    now = described["args"] | {"processes": described["processes"], "resume": then.get("resume")}
    changed = [f"{name} {then.get(name)} → {value}" for name, value in now.items() if value != then.get(name)]
    here.print(f"resuming after step {done}" + (f" with other flags: {', '.join(changed)}" if changed else ""))
    return done


def main():
    args = parse()
    here = runtime.Runtime(args.amp)
    out, last = Path(args.out), Path(args.out, "last.pt")
    resumed = here.from_main(lambda: args.resume and last.exists())
    path = last if resumed else args.init
    start, config, tokenizer = evaluate.read_checkpoint(path) if path else ({}, None, None)
    if args.vocab and args.init and not resumed:
        raise runtime.UserError("--vocab does not go with --init: that checkpoint has its own vocabulary")
    config = configure(args, config)
    args.config = args.config or start.get("args", {}).get("config", "tiny")
    weights = check(args, here)

    # Data, model, optimizer
    source = data.read_sources(args.data, "train", config.image_size)
    val = data.read_sources(args.data, "val", config.image_size, needed=False) if args.eval_every else None
    test = data.read_sources(args.data, "test", config.image_size, needed=False)
    if args.eval_every and not val:
        raise runtime.UserError("--eval-every needs a val split, and --data has none")
    tokenizer = tokenizer or make_tokenizer(args, here, source, config.vocab_size)
    config = dataclasses.replace(config, vocab_size=tokenizer.get_vocab_size())
    words = data.Words(tokenizer, config.max_text_len)
    runtime.seed_all(args.seed)
    model = VLMo(config)
    if start:
        runtime.load_weights(model, start["model"], path)
    stage = VisionLanguageStage(model, list(weights), args.negatives).to(here.device)
    optimizer, done = runtime.optimizer(model, WEIGHT_DECAY, BETAS), 0
    described = {"args": vars(args), "config": dataclasses.asdict(config), "processes": here.world}
    if resumed:
        done = continue_from(start, path, described, here, optimizer)
    start = None  # a second copy of everything
    if args.compile:  # blocks share their code: kinds of input × lower, last, fusing × training or not
        torch._dynamo.config.recompile_limit = 64
        for block in model.blocks:
            block.compile()
    wrapped = here.wrap(stage)
    parameters = [p for p in model.parameters() if p.requires_grad]

    # The folder of the run, and what is written there
    prepare_folder(out, resumed, here)
    metrics = runtime.Metrics(out, here.main, done)
    if here.main:
        (out / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    candidates = args.batch_size // args.accumulate
    hard = candidates if args.negatives == "global" else candidates // here.world
    here.print(
        f"stage vl, config {args.config}: {sum(p.numel() for p in parameters) / 1e6:.1f} M trainable parameters, "
        f"{len(source)} pictures, {here.world} × {here.device}, {args.batch_size} pairs a step, "
        f"{candidates} candidates for contrast, {hard} for hard negatives"
    )
    names, history = [*weights, "gradient norm"], []
    unreadable, clock = Unreadable(len(source)), time.perf_counter()

    def log(step):
        """Averages since the last log, over steps and processes; on all processes, which stop together if need be."""
        nonlocal clock
        rows = here.mean(torch.stack(history))
        check_finite(names if args.amp != "fp16" else names[:-1], step - len(rows) + 1, rows)
        values = {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows))}
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        files = here.mean(torch.tensor(float(len(unreadable.files)), device=here.device)) * here.world
        metrics.write(step=step, **values, lr=optimizer.param_groups[0]["lr"], scale=model.scale().item(),
                      pairs_per_s=args.batch_size * len(rows) / seconds, unreadable=round(files))  # fmt: skip
        bar.set_postfix({name: f"{value:.2f}" for name, value in values.items()}, refresh=False)
        history.clear()

    def evaluated(name, pairs, step):
        nonlocal clock
        began = time.perf_counter()
        results = evaluate.retrieval(model, pairs, words, here.device)
        metrics.write(step=step, split=name, **results)
        clock += time.perf_counter() - began  # the rate of pairs is that of training
        return results

    batches = loader(args, here, source, words, config.image_size, done * args.accumulate)
    bar = tqdm(total=args.steps, initial=done, disable=not here.main, unit="step", mininterval=1)
    stage.train()
    for step in range(done + 1, args.steps + 1):
        runtime.seed_all(args.seed, step, here.rank)  # drop-path and negatives; the data have seeds of their own
        for group in optimizer.param_groups:
            group["lr"] = runtime.learning_rate(step, args.steps, args.warmup, args.lr)
        row = 0
        for part in range(args.accumulate):
            batch = next(batches)
            unreadable.check(batch)
            batch = {name: tensor.to(here.device, non_blocking=True) for name, tensor in batch.items()}
            with here.synchronised(wrapped, part == args.accumulate - 1):
                with here.autocast():
                    values = wrapped(batch)
                loss = sum(weight * values[name] for name, weight in weights.items())  # 1·ITC + 1·ITM + 0.25·MLM
                here.scaler.scale(loss / args.accumulate).backward()
            row = row + torch.stack([values[name].detach() for name in weights]) / args.accumulate
        here.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)
        here.scaler.step(optimizer)
        here.scaler.update()
        optimizer.zero_grad()
        history.append(torch.cat([row, norm[None]]))
        bar.update()

        if step % args.log_every == 0 or step % args.save_every == 0 or step == args.steps:
            log(step)
        if here.main and (step % args.save_every == 0 or step == args.steps):
            parts = {"model": model, "optimizer": optimizer, "scaler": here.scaler}
            state = {name: part.state_dict() for name, part in parts.items()}
            runtime.save(last, described | state | {"stage": "vl", "step": step, "tokenizer": tokenizer.to_str()})
        if val and step % args.eval_every == 0:
            results = evaluated("val", val, step)
            if here.main:
                bar.write(f"step {step}, split val\n{evaluate.table(results)}")
    bar.close()
    if test:
        results = evaluated("test", test, args.steps)
        here.print(f"zero-shot retrieval on the {len(test)} pictures of split test:\n{evaluate.table(results)}")
    here.print(f"{last} holds the model")


if __name__ == "__main__":
    runtime.run(main, data.DataError)
