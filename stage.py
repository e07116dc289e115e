"""What a stage of training is, and what a downstream task is: the contract that the loop of
train.py relies on.

Shape letters: b local batch, T text tokens, D dim, M masked tokens, V vocabulary.
"""

import argparse
import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import data
import losses
import runtime
from loader import to_device, with_counts
from mome import Block, Config
from runtime import UserError, at_least


class Stage(nn.Module):
    """One kind of training: its recipe, flags, data, losses and measure.

    A subclass has `recipe`, {config: defaults of flags, fields of Config among them} (base_plus and
    large take the row of base if they have none), and four methods, always in this order:

    flags(parser, base)
        Adds the flags that only this stage has. base: the Config that it starts from.
    __init__(args, config, start, run)
        Reads the data and builds the model, from the Checkpoint `start` (checkpoint.py) or from
        nothing, on this Runtime (runtime.py). Sets model, loss_weights, sources and samples; the
        rest has defaults, below.
    forward(*batches)
        One batch of each data set in `samples`, as loader.py has it → {name: scalar}: the losses of
        this step, all in loss_weights at step 0 (train.freeze_unread); other names are logged only.
    measure(split, device)
        → {name: number} on split "val" or "test".
    """

    unit = "pairs"  # what a sample is
    betas, weight_decay, decay = (0.9, 0.98), 0.01, "linear"  # AdamW, learning rate (Section 4.1)
    architecture = {}  # fields of the Config that a run of this stage starts with
    best = None  # of a task: the number that decides which step is kept as best.pt
    takes_turns = False  # whether some steps train only a part of the parameters
    negatives = "global"  # where hard negatives come from: all processes, or "local", each its own
    head_factor = 1.0  # of the learning rate of the head
    step, run_seed = 0, 0  # the step that is being computed, 0 before the first; --seed

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.head = nn.Module()  # what later stages leave behind: not VLMo's heads, which are in the model
        self.loss_weights = {}  # {name of a loss: its factor}
        self.sources = {}  # {split: what it is measured on}
        self.samples = []  # data sets to train on
        self.tokenizer = None
        self.origin = {}  # {group of tensors: how it came from a checkpoint}, see checkpoint.fit
        self.extra = {}  # what a checkpoint holds besides

    def note(self, args, run):
        """What a run adds to its first line, after "steps of 64 pairs", such as ", with a new head"."""
        return ""

    def corpus(self):
        """Texts to train a vocabulary on."""
        return self.sources["train"].corpus()

    def measured(self):
        """The splits that this stage can be measured on."""
        return [split for split in ("val", "test") if split in self.sources]

    def draw(self, device):
        """Pictures of what has been learned, which the end of a run writes: {file name: RGB image}.
        Called only if there is a split to measure on."""
        return {}

    def look_ahead(self, parts):
        """parts: a list with the batches of each part of a step (--accumulate) → the same, plus
        what forward must know of the whole step besides counts."""
        return parts

    def seed(self, part=-1):
        """Seeds what a part of this step draws on this process, such as drop-path, which look_ahead
        and forward must draw alike; −1: the draw of negatives. The data have their own seeds."""
        runtime.seed_all(self.run_seed, self.step, losses.rank(), part)

    def blocks(self):
        """All Transformer blocks."""
        return [module for module in self.modules() if isinstance(module, Block)]


CHOICES = {
    "position": ["absolute", "relative"],
    "experts": ["mome", "shared"],
    "attention": ["shared", "separate"],
}
FIELDS = [field.name for field in dataclasses.fields(Config)]


def config_flags(parser, base, names=FIELDS):
    """Adds flags for fields of the Config, which mome.py explains."""
    group = parser.add_argument_group("architecture (fields of Config in mome.py)")
    for name in names:
        flag, value, choices = f"--{name.replace('_', '-')}", getattr(base, name), CHOICES.get(name)
        metavar = None if choices else type(value).__name__.upper()
        group.add_argument(
            flag, type=type(value), default=value, choices=choices, metavar=metavar, help="(default: %(default)s)"
        )


def weight_flag(group, name, default):
    group.add_argument(
        f"--{name}-weight", type=at_least(0.0), default=default, metavar="W", help="0 drops the loss"
    )


# ---- A downstream task ---------------------------------------------------------------------------


class Task(Stage):
    """A task that chooses, for each sample, among answers, truth values or classes (Section 3.5).
    Without args.training it only evaluates a checkpoint.

    Besides the methods of a stage a subclass has

    predict(batch)
        → logits (b, C) for C choices. batch: image, and text, mask (b, T) if the task has texts.
    results(predicted, source)
        → {name: number}. predicted: the number of a choice for each sample.
    submission(predicted, source)
        → str, what the official server or script reads.
    """

    best = "accuracy"
    submitted = ""  # what evaluate.py --predictions writes
    words = None  # of tasks with texts

    def __init__(self, args, start):
        super().__init__()
        self.loss_weights, self.head_factor = {"loss": 1.0}, args.head_factor
        self.trained = start if start and start.stage == args.stage else None  # it has this head

    def set_choices(self, found):
        """Sets what the head chooses from: the choices found in the training data (None in an
        evaluation). A trained head for the same choices keeps their order; for other choices the
        head is a new one, as from ImageNet-22k to ImageNet-1k (Table 3)."""
        known = self.trained.extra["choices"] if self.trained else found
        if known is None:
            advice = "import it again, with --answers"
            raise UserError(f"{self.trained.path} was imported without its answers: {advice}")
        if found is not None and sorted(known) != sorted(found):
            if self.trained.resumed:
                raise UserError(f"{self.trained.path} was trained with other answers or classes")
            known, self.trained = found, None
        self.choices = known
        self.extra = {"choices": known}

    def note(self, args, run):
        return "" if self.trained else ", with a new head"

    def fresh(self, args):
        """Groups not to take from the checkpoint: with --fresh-pooler and a new head, the pooler
        and the matching head, which reads it."""
        return ["pooler", "itm_head"] if not self.trained and args.fresh_pooler else []

    def set_head(self, head):
        """Sets the head, with the weights of a checkpoint of this task."""
        self.head = head
        if self.trained:
            checkpoint.load_exactly(head, self.trained.head, self.trained.path)

    @classmethod
    def evaluation_flags(cls, parser):
        """Adds the flags that only this task has in evaluate.py."""
        parser.add_argument("--predictions", metavar="FILE", help=cls.submitted)

    @staticmethod
    def check(start, args):
        """UserError if a checkpoint cannot be evaluated on this task."""
        if start.stage != args.stage:
            advice = f"fine-tune it first: finetune.py --task {args.stage} --init {start.path}"
            raise UserError(f"{start.path} (stage {start.stage}) has no head for task {args.stage}: {advice}")

    def published(self, source):
        """Whether the right answers are known."""
        return True

    def measure(self, split, device):
        source = self.sources[split]
        return self.results(self.answers(source, device), source)

    def evaluate(self, args, run):
        """Measures split args.split, and writes the predictions to args.predictions, if that is a
        path. UserError if there would be nothing to do."""
        source = self.sources[args.split]
        if not self.published(source) and not args.predictions:
            advice = "--predictions writes yours for the server"
            raise UserError(f"split {args.split} has no published answers: {advice}")
        run.print(f"{args.split}: {len(source)} {self.unit}")
        predicted = self.answers(source, run.device, args.batch_size)
        if args.predictions and run.main:
            official = self.submission(predicted, source).encode()
            runtime.write(args.predictions, lambda file: file.write(official))
        return self.results(predicted, source) if self.published(source) else {}

    @torch.no_grad()
    def answers(self, source, device, batch=64):
        """The number of the best choice for each sample, on every process, which share the work."""
        self.eval()
        out = []
        shares = data.shard(len(source), batch)
        views = data.pictures(source, shares, self.model.config.image_size, device)
        for numbers, image in zip(shares, views):
            inputs = {"image": image}
            if self.words:
                ids, mask = self.words.encode_all([source[i].text for i in numbers])
                inputs |= {"text": ids.to(device), "mask": mask.to(device)}
            out.append(self.predict(inputs).argmax(1))
        return losses.gather(torch.cat(out))[: len(source)].tolist()


def task_flags(parser, base, images="randaugment", text=True):
    """Adds the flags of every task. images: how training images are augmented by default; None:
    the task has none."""
    names = ["drop_path"]
    if images:
        names.append("image_size")
    if text:
        names.append("max_text_len")
    group = parser.add_argument_group("head")
    factor = "the head's learning rate is F times --lr"
    group.add_argument("--head-factor", type=at_least(0.0), default=1.0, metavar="F", help=factor)
    if text and images:
        fresh = "with a new head also start a new pooler, and drop the matching head, which reads it"
        group.add_argument("--fresh-pooler", action=argparse.BooleanOptionalAction, default=False, help=fresh)
    data.flags(parser, images, text, exclude=False)
    config_flags(parser, dataclasses.replace(base, max_text_len=min(base.max_text_len, 40)), names)


# ---- What measures share -------------------------------------------------------------------------


def percent(part, count):
    return 100 * part / max(count, 1)


def perplexity(loss, count):
    """exp of a mean; infinite if that is too large, or there is nothing to average."""
    return math.exp(loss / count) if count and loss / count < 700 else math.inf


@torch.no_grad()
def masked_words(predict, packed, training, device):
    """Accuracy (in percent) and perplexity of predict(batch) → logits (M, V) on the masked tokens
    of `packed`, a texts.Texts, and those of the training texts' unigram distribution (from 10 M
    tokens at most, with one added to each count)."""
    words = packed.words
    seen = torch.from_numpy(np.bincount(training.tokens[: 10**7], minlength=words.size)).double().to(device)
    seen[words.sep] = 0  # separates documents
    unigram = ((seen + 1) / (seen + 1).sum()).log()
    found = torch.zeros(5, dtype=torch.float64, device=device)  # masked, right, loss; unigram: right, loss
    for numbers in data.sample_batches(len(packed)):
        samples = [packed[0, i] for i in numbers]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        batch = to_device(with_counts([batch])[0], device)
        logits, labels = predict(batch).float(), batch["masked_labels"]  # (M, V), (M,)
        right, loss = (logits.argmax(1) == labels).sum(), F.cross_entropy(logits, labels, reduction="sum")
        plain_right, plain_loss = (labels == seen.argmax()).sum(), -unigram[labels].sum()
        found += torch.stack([right.new_tensor(len(labels)), right, loss, plain_right, plain_loss])
    masked, right, loss, plain_right, plain_loss = losses.over_processes(found)
    return {
        "accuracy": percent(right, masked),
        "perplexity": perplexity(loss, masked),
        "unigram accuracy": percent(plain_right, masked),
        "unigram perplexity": perplexity(plain_loss, masked),
        "masked": round(masked),
    }
