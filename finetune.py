"""Fine-tuning on the paper's tasks (Section 3.5, Figure 3; Sections 4.3–4.5, Appendices C and D).

    python finetune.py --task vqa --init runs/vl/last.pt                        # on the built-in world
    python finetune.py --task retrieval --init runs/base/last.pt --data coco --amp bf16
    torchrun --nproc_per_node=8 finetune.py --task nlvr2 --init runs/base/last.pt --data nlvr2 --amp bf16

The loop is that of train.py. Shape letters: b local batch, A answers, C classes.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import nn

import data
import evaluate
import losses
import runtime
import train
import weights
from mome import CONFIGS

# Per task: what the paper publishes for the base model (Appendices C and D), or its released code (drop-path, head's
# factor). For classification it gives nothing: these are of this project. Flickr30K's retrieval starts from COCO's.
PAPER = {
    "vqa": {"image_size": 480, "batch_size": 128, "epochs": 10, "lr": 3e-5, "drop_path": 0.15, "head_factor": 20.0},
    "nlvr2": {"image_size": 384, "batch_size": 128, "epochs": 10, "lr": 5e-5, "drop_path": 0.1},
    "retrieval": {"image_size": 384, "batch_size": 2048, "epochs": 20, "lr": 2e-5, "drop_path": 0.2},
    "flickr30k": {"image_size": 384, "batch_size": 2048, "epochs": 40, "lr": 1e-5, "drop_path": 0.2},
    "classify": {"image_size": 224, "batch_size": 1024, "epochs": 100, "lr": 5e-4, "drop_path": 0.1},
    "probe": {"image_size": 224, "batch_size": 1024, "epochs": 90, "lr": 1e-3, "drop_path": 0.0},
}
LARGE = {"vqa": {"lr": 1.5e-5}, "nlvr2": {"lr": 3e-5}, "retrieval": {"epochs": 10, "lr": 1e-5}}
TINY = {  # what suits the tiny model in the built-in world: its ITM leaves a saturated pooler, which learns late
    "vqa": {"epochs": 0.32, "lr": 5e-4, "fresh_pooler": True},
    "nlvr2": {"epochs": 0.16, "lr": 2.5e-4, "fresh_pooler": True},
    "retrieval": {"epochs": 0.32, "lr": 2.5e-4},
    "classify": {"epochs": 0.64, "lr": 2.5e-4},
    "probe": {"epochs": 0.64, "lr": 1e-2},
}
TINY["flickr30k"] = TINY["retrieval"]
STANDARDISED = 4096  # the pictures, of all processes, that give the features of a linear probe their mean and variance


def recipe(args, config):
    """The default of every flag that follows task, data and config."""
    task = "probe" if args.linear_probe else args.stage
    if task == "retrieval" and any(Path(folder, "dataset_flickr30k.json").exists() for folder in args.data):
        task = "flickr30k"
    common = {"head_factor": 1.0, "fresh_pooler": False, "clip": 0.0, "save_every": 1000}
    if config == "tiny":
        return common | {"batch_size": 64, "drop_path": 0.0, "clip": 1.0, "save_every": 100} | TINY[task]
    return common | PAPER[task] | (LARGE.get(task, {}) if config == "large" else {})


# ---- The tasks -------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A task that chooses: for one sample, among answers, truth values or classes."""

    unit: str  # what a sample is
    loss: Callable  # (logits (b, C), targets) → scalar
    choices: Callable  # iterable of training samples → list of str
    target: Callable  # (sample, {choice: number}) → tensor
    augment: str  # how training images are augmented


TASKS = {  # their modules and metrics are in evaluate.TASKS
    "vqa": Task(
        "questions",
        losses.answer_loss,
        lambda questions: data.answer_vocabulary(question.majority for question in questions),
        lambda question, numbers: data.soft_scores(question.answers, numbers),
        "randaugment",
    ),
    "nlvr2": Task(
        "statements",
        losses.class_loss,
        lambda statements: ["False", "True"],
        lambda statement, numbers: torch.tensor(numbers[str(statement.label)]),
        "randaugment",
    ),
    "classify": Task(
        "images",
        losses.class_loss,
        lambda pictures: sorted({picture.label for picture in pictures}),
        lambda picture, numbers: torch.tensor(numbers[picture.label]),
        "crop",
    ),
}


class TaskStage(nn.Module):
    """A task's module and its loss, as train.run takes them. What the task does not read is frozen."""

    def __init__(self, task, loss, linear_probe):
        super().__init__()
        self.task, self.model, self.head, self.loss, self.weights = task, task.model, task.head, loss, {"loss": 1.0}
        model = task.model
        if isinstance(task, evaluate.Classifier):
            model.requires_grad_(False)
            learns = () if linear_probe else train.image_path(model)
            for module in learns:
                module.requires_grad_(True)
        else:
            for module in (*train.untrained(model, "itm"), model.itm_head):
                module.requires_grad_(False)

    def forward(self, batch):
        """batch: image (b, 3, S, S), or pairs (b, 2, 3, S, S); text, mask (b, T) where there is a text; target, as the
        task's loss takes it."""
        if "text" in batch:
            T = data.cut(batch["mask"])
            batch = batch | {"text": batch["text"][:, :T], "mask": batch["mask"][:, :T]}
        return {"loss": self.loss(self.task(batch), batch["target"])}


def set_up_choice(args, here, config, start):
    """vqa, nlvr2, classify."""
    task, (module, evaluation) = TASKS[args.stage], evaluate.TASKS[args.stage]
    sources = read_splits(args, config.image_size)
    given = sources.values() if args.trainval else [sources["train"]]  # the usual 3,129 are of all
    choices = task.choices(sample for source in given for sample in data.samples(source))
    if not choices:
        raise runtime.UserError(f"--data {args.data[0]}: no answer comes often enough to be learned")
    words = None
    if args.stage == "classify":
        for source in sources.values():
            evaluate.check_classes(source, choices)
    else:
        config, words = train.vocabulary(args, here, config, start, sources["train"].corpus)
    same = start and start.content["stage"] == args.stage  # it has the head, and its pooler
    same = same and (start.resumed or not args.linear_probe)  # a probe begins with a head of its own
    anew = ("pooler",) if args.fresh_pooler and not same else ()
    model, taken = train.build(args, here, config, start, anew)
    stage = TaskStage(module(model, len(choices)), task.loss, args.linear_probe)
    if same:
        known = start.content["choices"]
        if known is None:
            raise runtime.UserError(f"{start.path} was imported without its answers: import it again, with --answers")
        if sorted(known) != sorted(choices):
            advice = "name a checkpoint of another stage with --init, for a new head"
            raise runtime.UserError(f"{start.path} was trained with other answers or classes than --data has: {advice}")
        choices = known  # in the order of the head
        weights.load_exactly(stage.head, start.content["head"], start.path)
    elif args.stage == "nlvr2":
        model.types.data[2] = model.types.data[1]  # the second image's type starts from the image's, as released

    numbers = {choice: k for k, choice in enumerate(choices)}
    target, augment = lambda sample: task.target(sample, numbers), train.augmentation(args, task.augment)
    samples = data.Examples(sources["train"], words, target, config.image_size, args.seed, augment, args.flip)
    if args.linear_probe and not same:
        standardise(stage, samples, train.loader(args, here, samples, 0), here.device)
    measure = lambda split: evaluation(stage.task, sources[split], words, choices, here.device)[0]
    tokenizer = words.tokenizer if words else start and start.tokenizer
    splits, note, kept = train.measured(sources), f", {len(choices)} choices", {"choices": choices}
    factor, best = args.head_factor, "accuracy"
    return train.Job(
        stage, samples, task.unit, config, tokenizer, taken, splits, measure, note, kept, best=best, factor=factor
    )


@torch.no_grad()
def standardise(stage, samples, batches, device):
    """The features of a linear probe get mean 0 and variance 1 over the first pictures; in MAE a BatchNorm does it."""
    stage.to(device).eval()
    unreadable, sums = train.Unreadable(len(samples)), 0.0
    for batch in batches:
        unreadable.check(batch)
        x = stage.task.features({"image": batch["image"].to(device)}).double()  # (b, D)
        sums = sums + torch.stack([torch.ones_like(x), x, x.square()]).sum(1)
        count, total, squares = losses.gather(sums[None]).sum(0)  # (D,) each
        if count[0] >= STANDARDISED:
            break
    mean = total / count
    stage.head[0].mean.copy_(mean)
    stage.head[0].deviation.copy_((squares / count - mean.square()).clamp(min=1e-12).sqrt())


def read_splits(args, image_size):
    """{split: source}: train, and those of val and test that --data has."""
    names = {"train": "trainval", "val": "minival"} if args.trainval else {"train": "train", "val": "val"}
    if args.stage != "vqa" or args.data == ["shapes"]:  # nobody tells VQA 2.0's answers of split test
        names["test"] = "test"
    sources = {}
    for split, name in names.items():
        try:
            sources[split] = data.read_task(args.stage, args.data, name, image_size)
        except data.Absent:
            if split == "train":
                raise
    if args.stage == "vqa":
        for split, source in sources.items():
            if not all(source[i].answers for i in (0, len(source) - 1)):  # "trainval" joins two files
                where = f"--data {args.data[0]}, split {names[split]}"
                raise runtime.UserError(f"{where}: no annotations beside the questions")
    return sources


def set_up_retrieval(args, here, config, start):
    """The dual encoder, with ITC alone, or with ITM beside it, if its head is to rerank."""
    read = lambda split: data.read_sources(args.data, split, config.image_size, needed=split == "train")
    sources = {split: read(split) for split in ("train", "val", "test")}
    config, words = train.vocabulary(args, here, config, start, sources["train"].corpus)
    model, taken = train.build(args, here, config, start)
    if not args.itm_weight and taken.get("itm_head") == "taken":
        here.print("--itm-weight is 0: the ITM head stays as it was, and does not follow the encoder (for --rerank)")
    used = {"itc": 1.0} | ({"itm": args.itm_weight} if args.itm_weight else {})
    stage = train.VisionLanguageStage(model, used)
    augment = train.augmentation(args, "randaugment")
    samples = data.Pairs(sources["train"], words, config.image_size, args.seed, augment, args.flip)
    measure = lambda split: evaluate.retrieval(model, sources[split], words, here.device)
    note = train.candidates(args, here, stage)
    splits = train.measured(sources)
    return train.Job(stage, samples, "pairs", config, words.tokenizer, taken, splits, measure, note, best="mean")


# ---- The command -----------------------------------------------------------------------------------------------------


def parse():
    parser = runtime.Parser(__doc__)
    group = parser.add_argument_group("run")
    group.add_argument("--task", dest="stage", choices=["retrieval", *TASKS], required=True)
    train.run_flags(group, "TASK")
    group.add_argument(
        "--eval-every",
        type=int,
        metavar="STEPS",
        help="measure on split val; 0: never [an epoch, or a quarter of the run]",
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", nargs="+", default=["shapes"], metavar="DIR", help="the built-in world [shapes]; a folder with "
        "VQA 2.0, NLVR2, or a folder a class; folders of pairs (retrieval)",
    )  # fmt: skip
    train.data_flags(group, "[randaugment, the paper's; classify: crop; shapes: none]")
    group.add_argument("--trainval", action="store_true", help="VQA 2.0: train on all but a fiftieth of val2014, too")

    group = parser.add_argument_group(
        "optimization",
        "defaults follow --task and --config (finetune.py: PAPER, LARGE, TINY); in brackets the paper's for vqa · "
        "nlvr2 · COCO's retrieval",
    )
    group.add_argument("--batch-size", type=int, metavar="B", help="of a step, over all processes [128 · 128 · 2048]")
    group.add_argument("--epochs", type=float, help="[10 · 10 · 20, large 10; Flickr30K 40]")
    group.add_argument(
        "--lr",
        type=float,
        help="peak, after 10 %% of the steps [3e-5 · 5e-5 · 2e-5; large 1.5e-5 · 3e-5 · 1e-5; Flickr30K 1e-5]",
    )
    group.add_argument("--head-factor", type=float, metavar="F", help="of the new head's learning rate [20 · 1 · –]")
    group.add_argument(
        "--fresh-pooler",
        action=argparse.BooleanOptionalAction,
        help="vqa, nlvr2: the pooler does not come from --init [no; tiny: yes]",
    )
    group.add_argument("--linear-probe", action="store_true", help="classify: the head alone learns")
    group.add_argument("--itm-weight", type=float, default=0.0, metavar="W", help="retrieval: ITM beside ITC [0]")
    train.optimization_flags(group, "[off]")
    train.speed_flags(parser)

    group = parser.add_argument_group(
        "architecture", "that of --init; without it, that of --config, with random weights. Of either can be changed:"
    )
    group.add_argument("--config", choices=list(CONFIGS), help="[tiny]")
    group.add_argument("--image-size", type=int, metavar="S", help="positions are resampled [480 · 384 · 384]")
    group.add_argument("--max-text-len", type=int, metavar="T", help="[that of --init, at most 40]")
    group.add_argument("--drop-path", type=float, metavar="P", help="[0.15 · 0.1 · 0.2]")
    parser.set_defaults(vocab_size=None)  # a new vocabulary has at most the config's size
    args = parser.parse_args()
    parser.refuse(args, ONLY, "task")
    if args.trainval and args.data == ["shapes"]:
        raise runtime.UserError("--trainval is of VQA 2.0: --data must name its folder")
    if args.init and args.config:
        raise runtime.UserError("--config is of a run without --init")
    args.out = args.out or f"runs/{args.stage}"
    return args


ONLY = {"trainval": ("vqa",), "linear_probe": ("classify",), "itm_weight": ("retrieval",), "head_factor": tuple(TASKS),
        "fresh_pooler": ("vqa", "nlvr2"), "vocab": ("vqa", "nlvr2", "retrieval"),
        "max_text_len": ("vqa", "nlvr2", "retrieval")}  # fmt: skip


def resolve(args, start):
    """Fills in what follows task and config → the Config: the checkpoint's, or --config's, with the flags on top."""
    name = start.content["args"]["config"] if start else args.config or "tiny"
    if args.config not in (None, name):
        raise runtime.UserError(f"{start.path} is of --config {name}")
    args.model = start.content["args"].get("model", "vlmo") if start else "vlmo"  # for stages that go on from here
    base = start.config if start else CONFIGS[name]
    defaults = {"config": name, "image_size": base.image_size, "max_text_len": min(base.max_text_len, 40)}
    for flag, value in (defaults | recipe(args, name)).items():
        if vars(args)[flag] is None:
            vars(args)[flag] = value
    try:
        flags = {flag: vars(args)[flag] for flag in ("image_size", "max_text_len", "drop_path")}
        return dataclasses.replace(base, **flags)
    except ValueError as error:
        raise runtime.UserError(str(error)) from None


def check(args, here):
    """UserError for numbers that do not fit."""
    train.check_run(args, here)
    if not 0 < args.epochs < math.inf:
        raise runtime.UserError("--epochs must be more than 0")
    if not all(0 <= value < math.inf for value in (args.head_factor, args.itm_weight)):
        raise runtime.UserError("--head-factor and --itm-weight must be finite and not negative")


def schedule(args, job):
    """Steps, warm-up, and how often to measure. In an epoch of retrieval every caption comes once, on average."""
    samples = job.samples.source.count_captions() if args.stage == "retrieval" else len(job.samples)
    args.steps = max(1, round(args.epochs * samples / args.batch_size))
    args.warmup = round(0.1 * args.steps)
    train.check_val(args, job.splits)
    if args.eval_every is None:  # four times at least
        args.eval_every = math.ceil(min(samples / args.batch_size, args.steps / 4)) if "val" in job.splits else 0


def main():
    args = parse()
    here = runtime.Runtime(args.amp)
    start = train.read_start(args, here)
    config = resolve(args, start)
    check(args, here)
    job = (set_up_retrieval if args.stage == "retrieval" else set_up_choice)(args, here, config, start)
    schedule(args, job)
    train.run(args, here, job, start)


if __name__ == "__main__":
    runtime.run(main, data.DataError)
