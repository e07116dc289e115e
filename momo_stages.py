"""MoMo's stages of pre-training (Sections 3.2, 3.5, 3.6), as their differences from VLMo's.

Shape letters as in momo.py.
"""

import functools
import itertools
import random

import torch
from torch import nn

import checkpoint
import data
import losses
import shapes
import sources
import texts
from loader import to_device, with_counts
from momo import DECODERS, RATIO, Decoder, HiddenWords, hide_patches, mim_loss, patch_values, reconstruct
from runtime import UserError
from stage import FIELDS, Stage, config_flags, masked_words, weight_flag
from stages import VL


class MoMo:
    """What the three stages share: the optimizer (MAE's; the paper names only the schedule), the
    encoder, decoders, and the losses of one modality."""

    betas, weight_decay, decay = (0.9, 0.95), 0.05, "cosine"
    architecture = dict(experts="shared", drop_path=0.0)  # MAE has no drop-path here
    pictures = texts = {}  # {split: what its hidden patches and hidden words are measured on}

    def set_up(self, args, config, start, modalities):
        """Builds the encoder, and a new decoder per modality, unless a run of this stage is
        resumed. UserError if a checkpoint's encoder cannot be MoMo's."""
        if (config.attention, config.position) != ("shared", "absolute"):
            raise UserError(f"{start.path}: MoMo has shared attention, and absolute positions")
        self.normalised = args.normalise_pixels
        self.model, self.origin = checkpoint.begin(config, start, args.seed)
        if args.shared_decoder:
            modalities = ["pair"]  # its decoder has all positions and outputs
        shape = DECODERS[args.config]
        self.head = nn.ModuleDict({name: Decoder(config, shape, name) for name in modalities})
        if start and start.resumed:
            checkpoint.load_exactly(self.head, start.head, start.path)
        self.takes_turns = args.stage != "momo-image" and args.no_cmga

    def trains(self, number):
        """Whether this step trains modality 0, 1 or 2: all in every step with CMGA, else in turn."""
        return not self.takes_turns or self.step == 0 or self.step % len(self.samples) == number

    def decoder(self, modality):
        """The modality's own decoder, or the one that all share."""
        return self.head[modality if modality in self.head else "pair"]

    def mim(self, images):
        """Eq. (1)."""
        pixels, _ = reconstruct(self.model, self.decoder("image"), images)
        return mim_loss(pixels, self.targets(images), images["hidden_count"])

    def targets(self, batch):
        """→ (M, P), of the hidden patches."""
        size = self.model.config.patch_size
        return patch_values(batch["image"], batch["hidden_at"], size, self.normalised)

    def mlm(self, batch):
        """Eq. (2)."""
        return losses.masked_token_loss(self.predict(batch), batch["masked_labels"], batch["masked_count"])

    def predict(self, batch):
        """→ logits (M, V) of the hidden tokens of a text."""
        return reconstruct(self.model, self.decoder("text"), batch)[1]

    def measure(self, split, device):
        """Hidden patches of pictures and hidden words of texts, where the split has them."""
        self.eval()
        results = {}
        if split in self.pictures:
            results |= masked_pixels(self, self.pictures[split], device)
        if split in self.texts:
            results |= masked_words(self.predict, self.texts[split], self.texts["train"], device)
        return results


NOT_HERE = ("experts", "vl_layers", "attention", "position", "text_reach")
ENCODER = [name for name in FIELDS if name not in NOT_HERE]


def momo_flags(parser, base, two=True, images="crop"):
    """Adds the flags of a stage. two: it learns two modalities."""
    group = parser.add_argument_group("MoMo")
    group.add_argument("--normalise-pixels", action="store_true", help="of each target patch, as in MAE")
    if two:
        plain = "plain text; shapes: that of the built-in world"
        group.add_argument("--texts", nargs="+", default=["shapes"], metavar="PATH", help=plain)
        shared = "one decoder for all modalities (Table 6)"
        group.add_argument("--shared-decoder", action="store_true", help=shared)
        turns = "the modalities take turns, an update for each (Table 6)"
        group = group.add_mutually_exclusive_group()
        group.add_argument("--no-simultaneous", action="store_true", help="only texts or pairs (Table 6)")
        group.add_argument("--no-cmga", action="store_true", help=turns)
    data.flags(parser, images, text=two)
    config_flags(parser, base, ENCODER)


def check_two(args, unused):
    """UserError for flags that contradict each other. unused: what --no-simultaneous leaves out."""
    if args.no_simultaneous and not shapes.asked(unused):
        raise UserError(f"--no-simultaneous trains one modality only: leave out {' '.join(unused)}")
    if not args.no_simultaneous:
        check_one_world("data", args.data, "texts", args.texts)


def check_one_world(flag, paths, other, others):
    """UserError if one of two flags names files, and the other the built-in world."""
    if shapes.asked(paths) != shapes.asked(others):
        raise UserError(f"--{flag} and --{other}: name both, or leave both to the built-in world")


class MoMoImage(MoMo, Stage):
    """Stage 1: reconstructs hidden patches of images (Eq. 1)."""

    unit = "images"
    recipe = {
        "tiny": dict(batch_size=64, steps=600, warmup=60, lr=1e-3, clip=1.0, save_every=100),
        # 1600 epochs of ImageNet-1k, batch 64 × 64 devices, MAE's rate of 1.5e-4 per 256
        "base": dict(batch_size=4096, steps=500_000, warmup=12_500, lr=2.4e-3),
    }

    @staticmethod
    def flags(parser, base):
        momo_flags(parser, base, two=False)
        parser.set_defaults(shared_decoder=False)

    def __init__(self, args, config, start, run):
        super().__init__()
        self.loss_weights = {"mim": 1.0}
        self.sources = self.pictures = sources.read_pictures(args, config.image_size)
        self.tokenizer = start.tokenizer if start else None
        self.set_up(args, config, start, ["image"])
        self.samples = [image_samples(self.sources, args, config)]

    def forward(self, images):
        """images: image (b, 3, S, S), hidden (b, N) bool, and what loader.with_counts adds."""
        return {"mim": self.mim(images)}


class MoMoText(MoMo, Stage):
    """Stage 2: hidden tokens of texts (Eq. 2) and patches of images (Eq. 1) in every step."""

    unit = "texts"
    recipe = {
        "tiny": dict(batch_size=64, steps=1000, warmup=75, lr=1e-3, clip=1.0, save_every=100),
        # 100 epochs of 6.6 M samples
        "base": dict(batch_size=4096, steps=161_000, warmup=16_100, lr=5e-5, max_text_len=196),
    }

    flags = staticmethod(momo_flags)

    def __init__(self, args, config, start, run):
        super().__init__()
        check_two(args, unused=args.data)
        modalities = ["text"] if args.no_simultaneous else ["text", "image"]
        self.loss_weights = {"mlm": 1.0} if args.no_simultaneous else {"mlm": 1.0, "mim": 1.0}
        self.pictures = {} if args.no_simultaneous else sources.read_pictures(args, config.image_size)
        corpus = functools.partial(texts.corpus, args.texts)
        words, config = texts.vocabulary(args, config, start, run, corpus)
        self.tokenizer = words.tokenizer
        self.texts = hidden_texts(args, words)
        self.set_up(args, config, start, modalities)
        self.sources = self.texts | self.pictures  # its splits are those of both
        self.samples = [self.texts["train"]]
        if self.pictures:
            self.samples.append(image_samples(self.pictures, args, config))

    def forward(self, texts, images=None):
        """texts: masked, labels (b, T), mask (b, T) bool; images: image, hidden; and what
        loader.with_counts adds. Two data sets, two batches, one gradient: cross-modality gradient
        accumulation (CMGA, Section 3.5)."""
        out = {}
        if self.trains(0):
            out["mlm"] = self.mlm(texts)
        if images and self.trains(1):
            out["mim"] = self.mim(images)
        return out


class MoMoVL(MoMo, VL):
    """Stage 3: contrast, matching (VLMo's, on whole pairs) and cross-modal masking (Eq. 3) on
    pairs, and hidden tokens of texts (Eq. 2) in every step."""

    modalities = ["pair", "text"]
    of_pairs = {"itc", "itm"}
    recipe = {
        "tiny": dict(batch_size=64, steps=750, warmup=75, lr=1e-3, clip=1.0, save_every=100),
        "base": dict(batch_size=4096, steps=161_000, warmup=16_100, lr=1e-4, max_text_len=196),
    }

    @staticmethod
    def flags(parser, base):
        group = parser.add_argument_group("stage momo-vl")
        weight_flag(group, "itc", 1.0)
        weight_flag(group, "itm", 1.0)
        negatives = "where hard negatives come from: all processes, or this one (VLMo's Table 6)"
        group.add_argument("--negatives", choices=["global", "local"], default="global", help=negatives)
        momo_flags(parser, base, images="randaugment")

    def __init__(self, args, config, start, run):
        Stage.__init__(self)
        check_two(args, unused=args.texts)
        modalities = ["pair"] if args.no_simultaneous else self.modalities
        self.negatives = args.negatives
        weights = {"cmm mim": 1.0, "cmm mlm": 1.0, "itc": args.itc_weight, "itm": args.itm_weight}
        if not args.no_simultaneous:
            weights["mlm"] = 1.0
        self.loss_weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.sources = sources.read_pictures(args, config.image_size, captions=True)
        self.words, config = texts.vocabulary(args, config, start, run, functools.partial(self.both_corpora, args))
        self.tokenizer = self.words.tokenizer
        self.set_up(args, config, start, modalities)
        words = HiddenWords(self.tokenizer, config.max_text_len, RATIO["pair"])
        train = self.sources["train"]
        self.samples = [data.Pairs(train, words, config.image_size, args, hiding("pair", config))]
        self.texts = {} if args.no_simultaneous else hidden_texts(args, words)
        if self.texts:
            self.samples.append(self.texts["train"])

    def both_corpora(self, args):
        """Captions, and the plain texts if there are any."""
        plain = [] if args.no_simultaneous else texts.corpus(args.texts)
        return itertools.chain(self.corpus(), plain)

    def forward(self, pairs, texts=None):
        """pairs: as stage vl, and hidden (b, N) bool; texts: masked, labels (b, T), mask (b, T);
        and what loader.with_counts adds."""
        out = {}
        if self.trains(0):
            # Eq. (4), and matching; first, because look_ahead begins with the same random numbers
            out |= super().forward(pairs)
            # Eq. (3) is the sum of these two
            pixels, logits = reconstruct(self.model, self.decoder("pair"), pairs)
            out["cmm mim"] = mim_loss(pixels, self.targets(pairs), pairs["hidden_count"])
            out["cmm mlm"] = losses.masked_token_loss(logits, pairs["masked_labels"], pairs["masked_count"])
        if texts and self.trains(1):
            out["mlm"] = self.mlm(texts)
        return out

    def look_ahead(self, parts):
        return super().look_ahead(parts) if self.trains(0) else parts

    def measure(self, split, device):
        return VL.measure(self, split, device) | super().measure(split, device)


class MoMoAll(MoMoVL):
    """Stages 2 and 3 in one (Table 5), or stage 3 with images: its losses, and hidden patches of
    images (Eq. 1) in every step."""

    modalities = ["pair", "text", "image"]

    @staticmethod
    def flags(parser, base):
        images = "pictures; shapes: those of the built-in world"
        group = parser.add_argument_group("stage momo-all")
        group.add_argument("--images", nargs="+", default=["shapes"], metavar="PATH", help=images)
        MoMoVL.flags(parser, base)

    def __init__(self, args, config, start, run):
        if args.no_simultaneous:
            raise UserError("stage momo-all is simultaneous")
        check_one_world("data", args.data, "images", args.images)
        super().__init__(args, config, start, run)
        self.loss_weights["mim"] = 1.0
        self.pictures = sources.read_pictures(args, config.image_size, paths=args.images)
        self.samples.append(image_samples(self.pictures, args, config))

    def forward(self, pairs, texts, images):
        """Batches as in stages momo-vl and momo-text."""
        out = super().forward(pairs, texts)
        if self.trains(2):
            out["mim"] = self.mim(images)
        return out


def hiding(modality, config):
    """(rng) → which patches are hidden."""
    patches = (config.image_size // config.patch_size) ** 2
    return functools.partial(hide_patches, RATIO[modality], patches)


def hidden_texts(args, words):
    """{split: packed texts} of --texts."""
    hidden = HiddenWords(words.tokenizer, words.length, RATIO["text"])
    return texts.packed(args.texts, hidden, args.seed)


def image_samples(pictures, args, config):
    return data.Images(pictures["train"], config.image_size, args, hide=hiding("image", config))


@torch.no_grad()
def masked_pixels(stage, source, device):
    """The mean squared error of hidden patches of a source's pictures, in the units of training,
    and that of guessing the mean of a picture's visible patches."""
    stage.eval()
    config, found = stage.model.config, torch.zeros(3, dtype=torch.float64, device=device)
    shares, hide = data.sample_batches(len(source)), hiding("image", config)
    for numbers, image in zip(shares, data.pictures(source, shares, config.image_size, device)):
        hidden = torch.stack([hide(random.Random(f"mask {i}")) for i in numbers])  # (n, N)
        [batch] = with_counts([{"hidden": hidden}])
        batch = to_device(batch, device) | {"image": image}
        wanted = stage.targets(batch)  # (M, P)
        visible = (~batch["hidden"]).flatten().nonzero()[:, 0]
        seen = patch_values(image, visible, config.patch_size, stage.normalised)
        mean = seen.unflatten(0, (len(image), -1)).mean(1)  # (n, P)
        guess = mean.repeat_interleave(len(wanted) // len(image), 0)  # (M, P)
        pixels, _ = reconstruct(stage.model, stage.decoder("image"), batch)
        errors = [(one - wanted).float().square().mean(1).sum() for one in (pixels, guess)]
        found += torch.stack([*errors, errors[0].new_tensor(len(wanted))])
    error, guess, count = losses.over_processes(found)
    return {"error": error / count, "mean patch's error": guess / count, "masked patches": round(count)}
