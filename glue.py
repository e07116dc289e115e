"""GLUE: eight tasks on texts, for the text encoder only (seven of them in MoMo's Table 2): files, head,
loss, metrics and submissions.

    python finetune.py --task rte --init runs/vl/last.pt                # the built-in world
    python finetune.py --task mnli --init runs/vl/last.pt --data glue   # the folder of all tasks

Shape letters: b local batch, T text tokens, D dim, C classes.
"""

import csv
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import checkpoint
import data
import losses
import shapes
import texts
from data import Absent
from loader import to_device, with_counts
from mome import initialise
from reading import print_left_out, read_text
from records import Records
from runtime import UserError
from sources import read_splits, task_folder
from stage import Task, task_flags

# ---- Metrics: of predicted and right numbers, in percent -----------------------------------------


def accuracy(predicted, right):
    return 100 * float(np.mean(np.equal(predicted, right)))


def f1(predicted, right):
    """The harmonic mean of precision and recall of class 1."""
    predicted, right = np.equal(predicted, 1), np.equal(right, 1)
    return 100 * 2 * float(np.sum(predicted & right)) / max(1, int(predicted.sum() + right.sum()))


def pearson(predicted, right):
    """The correlation; 0 if one side is constant, or not finite. Of two classes it is Matthews' coefficient."""
    x, y = (np.subtract(values, np.mean(values)) for values in (predicted, right))
    scale = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return 100 * float(np.sum(x * y) / scale) if scale > 0 else 0.0


def spearman(predicted, right):
    """The correlation of ranks."""
    return pearson(ranks(predicted), ranks(right))


def ranks(values):
    """Ranks from 1; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


# ---- The tasks -----------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a task has of its own."""

    folder: str  # in the folder of --data
    columns: list = ["sentence1", "sentence2"]  # of the texts
    label: str = "label"  # the column of the answer
    labels: list = ["0", "1"]  # the classes; [] for a task that predicts a number
    metrics: dict = {"accuracy": accuracy}  # by the first the best step is chosen
    header: list | None = None  # the columns of train and val, where their first line does not name them
    files: dict = {"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"}


FOLLOWS = ["entailment", "not_entailment"]
COLA = ["source", "label", "mark", "sentence"]
MNLI = {
    "train": "train.tsv",
    "val": "dev_matched.tsv",
    "val-mismatched": "dev_mismatched.tsv",
    "test": "test_matched.tsv",
    "test-mismatched": "test_mismatched.tsv",
}
TASKS = {
    # Is a sentence acceptable?
    "cola": Kind("CoLA", ["sentence"], metrics={"matthews": pearson, "accuracy": accuracy}, header=COLA),
    # Is a sentence about a film positive?
    "sst-2": Kind("SST-2", ["sentence"]),
    # Do two sentences say the same? Do two questions ask the same?
    "mrpc": Kind("MRPC", ["#1 String", "#2 String"], "Quality", metrics={"accuracy": accuracy, "f1": f1}),
    "qqp": Kind("QQP", ["question1", "question2"], "is_duplicate", metrics={"accuracy": accuracy, "f1": f1}),
    # How similar are two sentences, from 0 to 5?
    "sts-b": Kind("STS-B", label="score", labels=[], metrics={"pearson": pearson, "spearman": spearman}),
    # Does the second sentence follow from the first, contradict it, or neither?
    "mnli": Kind("MNLI", label="gold_label", labels=["contradiction", "entailment", "neutral"], files=MNLI),
    # Does a sentence answer a question?
    "qnli": Kind("QNLI", ["question", "sentence"], labels=FOLLOWS),
    # Does the second sentence follow from the first? In the built-in world: one caption from another
    "rte": Kind("RTE", labels=FOLLOWS),
}


class GLUE(Task):
    """A linear layer on [T_CLS] of one text, or of two with a [SEP] in between."""

    unit = "texts"
    submitted = "TSV for GLUE's server"
    recipe = {  # BERT's; its grid: lr 5e-5, 4e-5, 3e-5, 2e-5, batch_size 16, 32, epochs 2 to 4
        "tiny": dict(epochs=0.32, batch_size=64, lr=5e-4, clip=1.0, save_every=100, max_text_len=40),
        "base": dict(epochs=3, batch_size=32, lr=2e-5, clip=1.0, max_text_len=128, drop_path=0.1),
    }

    @staticmethod
    def flags(parser, base):
        task_flags(parser, base, images=None)

    def __init__(self, args, config, start, run):
        super().__init__(args, start)
        self.task = TASKS[args.stage]
        self.best = next(iter(self.task.metrics))
        splits = args.splits
        if args.training and not shapes.asked(args.data):
            splits = ["train", "val"]  # the answers of test are not published
        self.sources = read_splits(splits, lambda split: read(self.task, args.data, split))
        self.words, config = texts.vocabulary(args, config, start, run, self.corpus)
        self.tokenizer = self.words.tokenizer
        self.model, self.origin = checkpoint.begin(config, start, args.seed)
        self.set_choices(self.task.labels)
        self.set_head(initialise(nn.Linear(config.dim, max(1, len(self.choices))), config))
        if args.training:
            self.samples = [Sentences(self.sources["train"], self.words, self.target)]

    def target(self, record):
        if self.choices:
            return torch.tensor(self.choices.index(record.label))
        return torch.tensor(float(record.label))

    def forward(self, batch):
        """batch: text, mask (b, T); target (b,)."""
        logits = self.predict(batch)
        if self.choices:
            return {"loss": F.cross_entropy(logits, batch["target"])}
        return {"loss": F.mse_loss(logits[:, 0].float(), batch["target"])}

    def predict(self, batch):
        """→ logits (b, C); (b, 1) for a number."""
        states = self.model.encode_text(batch["text"], batch["mask"], rows=1)
        return self.head(states[:, 0])

    @torch.no_grad()
    def answers(self, source, device, batch=64):
        """The predicted class or number of each sample, on every process, which share the work."""
        self.eval()
        out = []
        for numbers in data.shard(len(source), batch):
            pairs = [self.words.encode(*source[i].texts) for i in numbers]
            ids, mask = map(torch.stack, zip(*pairs))
            [batch] = with_counts([{"text": ids, "mask": mask}])
            logits = self.predict(to_device(batch, device))
            out.append(logits.argmax(1) if self.choices else logits[:, 0].float())
        return losses.gather(torch.cat(out))[: len(source)].tolist()

    def published(self, source):
        return source[0].label is not None

    def results(self, predicted, source):
        right = [self.target(source[i]).item() for i in range(len(source))]
        return {name: metric(predicted, right) for name, metric in self.task.metrics.items()}

    def submission(self, predicted, source):
        """Lines of number and answer, below a header."""
        if self.choices:
            answers = [self.choices[k] for k in predicted]
        else:
            answers = [min(max(score, 0.0), 5.0) for score in predicted]  # the server refuses others
        return "index\tprediction\n" + "".join(f"{i}\t{answer}\n" for i, answer in enumerate(answers))


def read(task, paths, split):
    """The source of a split of --data. Absent if there is none of that name."""
    if shapes.asked(paths) and task.folder == "RTE":
        return WorldEntailment.read(paths, split, 1)
    if shapes.asked(paths):
        raise Absent("of GLUE's tasks, the built-in world has rte only: name a folder with --data")
    if split not in task.files:
        raise Absent(f"{task.folder} has no split {split}, but {', '.join(task.files)}")
    path = task_folder(paths) / task.folder / task.files[split]
    if not path.exists():
        raise Absent(f"{path}: no such file; --data takes the folder of GLUE's unpacked archives")
    source = Records(Sample, samples_of(task, path, split))
    if not len(source):
        raise UserError(f"{path} has no line with the columns {', '.join(task.columns)}")
    return source


def samples_of(task, path, split):
    """Records of a file. Lines without all columns are left out, as usual (QQP has a few), but of
    test, whose lines are numbered."""
    header = None if split.startswith("test") else task.header
    rows = csv.DictReader(read_text(path).split("\n"), header, delimiter="\t", quoting=csv.QUOTE_NONE)
    count, left_out = 0, []
    try:
        if absent := [column for column in task.columns if column not in (rows.fieldnames or [])]:
            raise UserError(f"{path} has no column {', '.join(absent)}")
        for count, row in enumerate(rows, start=1):
            sentences = [row.get(column) or "" for column in task.columns]
            label = row.get(task.label)
            is_number = not task.labels and label and math.isfinite(float(label))
            has_label = label in task.labels or is_number
            if split.startswith("test"):
                yield Sample(sentences, None)
            elif all(sentences) and has_label:
                yield Sample(sentences, label)
            else:
                left_out.append(f"line {rows.line_num}")
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from None
    print_left_out(path, left_out, count, "a text or an answer of the task")


# ---- Samples -------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A record of GLUE."""

    texts: list  # one or two
    label: str | None  # None where it is not published

    @property
    def text(self):
        return " ".join(self.texts)


class Sentences(Dataset):
    """Training samples, indexed by (epoch, index): text, mask (T,); target, a tensor."""

    def __init__(self, source, words, target):
        self.source, self.words, self.target = source, words, target
        if not source.drawn:
            data.print_not_read_whole(source.corpus(), words, special=1 + len(source[0].texts))

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        record = self.source[key[1]]
        text, mask = self.words.encode(*record.texts)
        target = self.target(record)
        return {"text": text, "mask": mask, "target": target}


class WorldEntailment(shapes.World):
    """A caption of a scene, and a caption of two things. Half of them follow; of the others half
    name a thing that the scene does not have, half name its things in the wrong order."""

    def __getitem__(self, i):
        scene, rng = self.scene(i), self.rng("entailment", i)
        pairs = list(map(list, itertools.combinations(scene["things"], 2)))  # in their order
        pair, label = list(rng.choice(pairs)), "entailment"
        if rng.random() < 0.5:
            label = "not_entailment"
            if pair[::-1] in pairs or rng.random() < 0.5:  # the reverse would follow, too; else by chance
                while pair[0] in scene["things"]:
                    pair[0] = shapes.make_thing(rng)
            else:
                pair.reverse()
        claim = rng.choice(shapes.describe({"layout": scene["layout"], "things": pair}))
        return Sample([rng.choice(shapes.describe(scene)), claim], label)
