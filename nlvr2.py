"""NLVR2: its files, head, loss, metric and predictions (Section 4.3, Appendix C).

A sample is a statement with two images. Shape letters: b local batch, T text tokens, D dim.
"""

import collections
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import checkpoint
import shapes
import texts
from data import Absent, Examples
from mome import classifier
from reading import checked_text, fields, json_lines, malformed, path_below
from runtime import UserError
from sources import read_splits, task_folder, task_records
from stage import Task, task_flags


class NLVR2(Task):
    """Two pairs, the statement with the left and with the right image, and a classifier of both
    [T_CLS] (Figure 3)."""

    unit = "statements"
    recipe = {  # Appendix C; drop-path and base_plus: released code
        "tiny": dict(epochs=0.16, batch_size=64, lr=2.5e-4, clip=1.0, save_every=100, fresh_pooler=True),
        "base": dict(epochs=10, batch_size=128, lr=5e-5, image_size=384, drop_path=0.1),
    }
    recipe["base_plus"] = recipe["base"] | dict(lr=3e-5, drop_path=0.2)
    recipe["large"] = recipe["base"] | dict(lr=3e-5, drop_path=0.15)

    flags = staticmethod(task_flags)
    submitted = "CSV for NLVR2's metrics.py"

    def __init__(self, args, config, start, run):
        super().__init__(args, start)
        self.sources = read_splits(args.splits, lambda split: read(args.data, split, config.image_size))
        self.words, config = texts.vocabulary(args, config, start, run, self.corpus)
        self.tokenizer = self.words.tokenizer
        self.model, self.origin = checkpoint.begin(config, start, args.seed, self.fresh(args))
        if not self.trained:  # the second image's type starts from the first's, as released
            self.model.types.data[2] = self.model.types.data[1]
        self.set_head(classifier(config, 2 * config.dim, 2))
        if args.training:
            train = self.sources["train"]
            self.samples = [Examples(train, self.words, self.target, config.image_size, args)]

    def target(self, statement):
        return torch.tensor(int(statement.label))

    def forward(self, batch):
        """batch: image (b, 2, 3, S, S); text, mask (b, T); target (b,), 1 = true."""
        return {"loss": F.cross_entropy(self.predict(batch), batch["target"])}

    def predict(self, batch):
        """→ logits (b, 2), class 1 = true."""
        text, mask, pooled = batch["text"], batch["mask"], []
        for image_type, image in enumerate(batch["image"].unbind(1), start=1):
            states = self.model.encode_pair(text, mask, image, image_type, rows=1)  # (b, 1, D)
            pooled.append(self.model.pool(states))  # (b, D)
        return self.head(torch.cat(pooled, dim=1))

    def say(self, logits):
        """logits (2,) → whether the statement is true, and how probable that is."""
        true = logits.softmax(0)[1]
        return f"{true:.1%} true" if true > 0.5 else f"{1 - true:.1%} false"

    def results(self, predicted, source):
        return accuracies(predicted, [source[i] for i in range(len(source))])

    def submission(self, predicted, source):
        """Lines "identifier,True"."""
        return "".join(f"{source[i].id},{bool(value)}\n" for i, value in enumerate(predicted))


# ---- Files ---------------------------------------------------------------------------------------


class Statement(NamedTuple):
    """A record of NLVR2."""

    image: tuple  # left and right
    text: str
    id: str  # split-set-pair-sentence
    label: bool


class WorldStatements(shapes.World):
    """Statements on two scenes of the built-in world: each comes with four pairs of images, and is
    true of two of them."""

    per_scene = shapes.TIMES

    def __getitem__(self, i):
        text, _, label = self.statement(i)
        return Statement(None, text, f"{self.split}-{i // shapes.TIMES}-{i % shapes.TIMES}-0", label)

    def image(self, i, view=None):
        return self.image_pair(i)


def read(paths, split, image_size):
    """The source of a split. Absent if there is none of that name."""
    if world := WorldStatements.read(paths, split, image_size):
        return world
    return task_records(Statement, statements(task_folder(paths), split), split)


FILES = {"train": "train", "val": "dev", "dev": "dev", "test": "test1", "test1": "test1"}


def statements(folder, split):
    """Records of a split, in the layout of NLVR2's release: the images of train in numbered
    folders, those of dev and test1 in one folder each."""
    if split not in FILES:
        raise Absent(f"NLVR2 has no split {split}, but {', '.join(FILES)}")
    name = FILES[split]
    path = first_that_exists([folder / below / f"{name}.json" for below in ("", "data", "nlvr2/data")])
    manifest = folder / f"{split}.jsonl"
    if manifest.exists():
        yield from own_statements(manifest)
        return
    if not path.exists():
        raise Absent(f"{path}: no such file; --data takes NLVR2's JSON lines and images, or {manifest.name}")
    root = first_that_exists([folder / name, folder / "images" / name])
    for where, entry in json_lines(path):
        with malformed(where):
            id, text, label = entry["identifier"], entry["sentence"], entry["label"]
            assert isinstance(text, str), "sentence"
            assert label in ("True", "False"), "label"
            pair, sentence = id.rsplit("-", 1)
            assert pair.count("-") >= 2 and sentence, "identifier"
        stem = f"{entry['directory']}/{pair}" if "directory" in entry else pair
        images = [path_below(root, f"{stem}-img{k}.png", where) for k in (0, 1)]
        yield Statement(images, checked_text(text, where), id, label == "True")


def own_statements(path):
    """Records of a manifest: {"images": [left, right], paths below its folder, "sentence", "label":
    true or false}, one per line."""
    numbers = {}  # of the sentences
    for number, (where, entry) in enumerate(json_lines(path)):
        images, text, label = fields(where, entry, images=list, sentence=str, label=bool)
        if len(images) != 2 or not all(isinstance(image, str) for image in images):
            raise UserError(f"{where}: images must be two paths, left and right")
        sentence = numbers.setdefault(text, len(numbers))
        images = [path_below(path.parent, image, where) for image in images]
        yield Statement(images, checked_text(text, where), f"{path.stem}-{sentence}-{number}-0", label)


def first_that_exists(paths: list[Path]):
    """The first of the paths that exists, else the first."""
    return next((path for path in paths if path.exists()), paths[0])


# ---- The metric ----------------------------------------------------------------------------------


def accuracies(predicted, statements):
    """Truth values of a list of Statement → {"accuracy": percent of pairs, "consistency": percent
    of sentences all of whose pairs are right}. An identifier without its pair names the
    sentence."""
    right = collections.defaultdict(list)
    for value, statement in zip(predicted, statements):
        split, images, _, sentence = statement.id.split("-", 3)
        right[split, images, sentence].append(bool(value) == statement.label)
    pairs = [value for values in right.values() for value in values]
    sentences = [all(values) for values in right.values()]
    return {
        "accuracy": 100 * sum(pairs) / len(pairs),
        "consistency": 100 * sum(sentences) / len(sentences),
    }
