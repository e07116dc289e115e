"""Image classification with the vision experts only (Section 4.5, Table 3), and the linear probe of
MoMo's Table 2.

Shape letters: b local batch, N patches, D dim, C classes.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import losses
import shapes
from data import SPLITS, Examples
from loader import Loader
from mome import initialise, unit
from records import Records
from runtime import UserError
from sources import absent, has_split_folders, image_files, read_splits, task_folder
from stage import Task, task_flags
from texts import read_lines, vocabulary


class Classify(Task):
    """A linear layer on the mean of the patches."""

    unit = "images"
    recipe = {  # the paper gives none
        "tiny": dict(epochs=0.64, batch_size=64, lr=2.5e-4, clip=1.0, save_every=100),
        "base": dict(epochs=100, batch_size=1024, lr=5e-4, image_size=224, drop_path=0.1),
    }

    @staticmethod
    def flags(parser, base):
        task_flags(parser, base, images="crop", text=False)

    @staticmethod
    def evaluation_flags(parser):
        zero_shot = "needs no head: the class whose captions the dual encoder finds nearest"
        parser.add_argument("--zero-shot", action="store_true", help=zero_shot)
        captions = "captions of a class, of which the mean counts; {} is its name (default: a {})"
        parser.add_argument("--templates", nargs="+", metavar="TEXT", help=captions)
        names = "FOLDER NAME, … per line, as in ImageNet's LOC_synset_mapping.txt: the classes to choose from "
        names += "(default: the folders of the split; of all splits if a hash makes them)"
        parser.add_argument("--class-names", metavar="FILE", help=names)

    @staticmethod
    def check(start, args):
        if not args.zero_shot:
            if args.templates or args.class_names or args.vocab:
                raise UserError("--templates, --class-names and --vocab need --zero-shot")
            return Task.check(start, args)
        start.require(["itc_image", "itc_text"])
        for template in args.templates or []:
            if "{}" not in template:
                raise UserError(f'--templates: "{template}" has no {{}}, the place of a name')

    def __init__(self, args, config, start, run):
        super().__init__(args, start)
        splits = args.splits
        by_hash = not has_split_folders(args.data[0])
        if not args.training and args.zero_shot and by_hash and not args.class_names:  # a split may lack some
            splits = list(dict.fromkeys([args.split, *SPLITS]))
        self.sources = read_splits(splits, lambda split: read(args.data, split, config.image_size))
        if not args.training and args.zero_shot:
            self.set_zero_shot(args, config, start, run)
            return
        self.model, self.origin = checkpoint.begin(config, start, args.seed)
        self.tokenizer = start.tokenizer if start else None  # of an earlier stage with text

        train = self.sources["train"] if args.training else None
        # A split by a hash may leave no image of a small class for training
        known = self.sources.values() if by_hash else [train]
        self.set_choices(sorted(set().union(*map(labels, known))) if train else None)
        for source in self.sources.values():
            if unknown := labels(source).difference(self.choices):
                raise UserError(f"class {min(unknown)} is none of those that the model is trained on")
        layer = initialise(nn.Linear(config.dim, len(self.choices)), config)
        self.set_head(nn.Sequential(Standardise(config.dim), layer))
        if train:
            self.samples = [Examples(train, None, self.target, config.image_size, args, "crop")]

    @torch.no_grad()
    def set_zero_shot(self, args, config, start, run):
        """A head that nobody trained: its weights are the vectors of the classes' captions."""
        self.model, _ = checkpoint.begin(config, start, args.seed)
        self.model.to(run.device).eval()
        self.features = self.model.embed_image
        words, _ = vocabulary(args, config, start, run, corpus=None)
        known = set().union(*map(labels, self.sources.values()))
        names = read_names(args.class_names) if args.class_names else {one: one.replace("_", " ") for one in known}
        self.choices = sorted(names.keys() | known)
        run.print(f"{len(self.choices)} classes to choose from")
        templates, vectors = args.templates or ["a {}"], []
        for choice in self.choices:
            if not names.get(choice):
                raise UserError(f"--class-names {args.class_names} has no name of class {choice}")
            ids, mask = words.encode_all([template.replace("{}", names[choice]) for template in templates])
            mean = self.model.embed_text(ids.to(run.device), mask.to(run.device)).mean(0)  # (D,)
            vectors.append(unit(mean))
        self.head = nn.Linear(config.dim, len(self.choices), bias=False)
        self.head.weight.data = torch.stack(vectors)  # (C, D)

    def target(self, picture):
        return torch.tensor(self.choices.index(picture.label))

    def forward(self, batch):
        """batch: image (b, 3, S, S); target (b,)."""
        return {"loss": F.cross_entropy(self.predict(batch), batch["target"])}

    def predict(self, batch):
        """→ logits (b, C), in full precision: rounded ones would tie."""
        x = self.features(batch["image"])
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.to(torch.promote_types(x.dtype, torch.float32)))

    def features(self, image):
        """image (b, 3, S, S) → (b, D), the mean of the patches."""
        return self.model.encode_image(image)[:, 1:].mean(1)

    def results(self, predicted, source):
        right = [self.choices[k] == source[i].label for i, k in enumerate(predicted)]
        return {"accuracy": 100 * sum(right) / len(right)}


class Probe(Classify):
    """The linear probe: only the head learns, on standardised features of a frozen encoder."""

    architecture = dict(drop_path=0.0)
    recipe = {  # MAE's epochs; MoMo's paper follows FLAVA (Section 4.1)
        "tiny": dict(epochs=0.64, batch_size=64, lr=1e-2, clip=1.0, save_every=100),
        "base": dict(epochs=90, batch_size=1024, lr=1e-3, image_size=224),
    }

    @staticmethod
    def evaluation_flags(parser):
        parser.set_defaults(zero_shot=False, templates=None, class_names=None)

    def __init__(self, args, config, start, run):
        super().__init__(args, config, start, run)
        if args.training and not self.trained:
            self.standardise(args, run)

    def features(self, image):
        with torch.no_grad():
            return super().features(image)

    @torch.no_grad()
    def standardise(self, args, run):
        """Standardises each feature over the first PICTURES; in MAE a BatchNorm does it."""
        self.to(run.device).eval()
        sums = 0.0
        for parts in Loader(self.samples, args, run):
            x = torch.cat([self.features(batch["image"]) for (batch,) in parts]).double()  # (b, D)
            sums = sums + torch.stack([torch.ones_like(x), x, x.square()]).sum(1)  # (3, D)
            count, total, squares = losses.gather(sums[None]).sum(0)  # (D,) each
            if count[0] >= PICTURES:
                break
        mean = total / count
        self.head[0].mean.copy_(mean)
        self.head[0].deviation.copy_((squares / count - mean.square()).clamp(min=1e-12).sqrt())


PICTURES = 4096  # enough for mean and deviation


class Standardise(nn.Module):
    """(x − mean) / deviation of features (b, D); 0 and 1 until they are set, once."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))

    def forward(self, x):
        return (x - self.mean) / self.deviation


class Labelled(NamedTuple):
    """A record of a picture and its class."""

    image: str
    label: str


class WorldClasses(shapes.World):
    """Color and shape of the first thing of a scene, from the left or the top."""

    def __getitem__(self, i):
        first = self.scene(i)["things"][0]
        return Labelled(None, f"{first['color']} {first['shape']}")


def read(paths, split, image_size):
    """The source of a split: a folder per class, in `train`, `val`, `test` or split by a hash."""
    if world := WorldClasses.read(paths, split, image_size):
        return world
    folder = task_folder(paths)
    below = folder / split if has_split_folders(folder) else folder
    source = Records(Labelled, (Labelled(path, class_of(path, below)) for path in image_files(folder, split)))
    if not len(source):
        raise absent(paths, split, captions=False)
    return source


def class_of(path, folder):
    """The name of the folder of a class, in which an image is."""
    name, *rest = Path(path).relative_to(folder).parts
    if not rest:
        raise UserError(f"{path} is in no folder of a class")
    return name


def read_names(path):
    """{folder: the first of its class's names}."""
    names = {}
    for line in filter(None, read_lines(path)):
        folder, *known = line.split(maxsplit=1)
        names[folder] = " ".join(known).split(",")[0].strip()
    return names


def labels(source):
    """The classes of a source; all 48 of the built-in world, whichever of its scenes it has."""
    if isinstance(source, WorldClasses):
        return {f"{color} {shape}" for color in shapes.COLORS for shape in shapes.SHAPES}
    return {source[i].label for i in range(len(source))}
