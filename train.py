"""The stages of pre-training: on images, on text, on image-text pairs (Sections 3.3 and 3.4, Appendix B).

    python train.py                                          # stage vl: tiny model, built-in world, any machine
    python train.py --stage image                            # the three stages, each from the one before
    python train.py --stage text --init runs/image/last.pt
    python train.py --stage vl --init runs/text/last.pt
    torchrun --nproc_per_node=8 train.py --stage vl --config base --data coco vg sbu cc --vocab vocab.txt --amp bf16

Shape letters: b local batch, W processes, B = W·b, T text tokens, N patches, D dim, M masked tokens.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import math
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import dvae
import evaluate
import losses
import momo
import runtime
import weights
from mome import CONFIGS, Block, Config, MIMHead, VLMo

# Per stage and config: what the papers publish (Section 4.1, Appendix B; stage image: BEiT's 800 epochs of ImageNet-1k;
# for a small dVAE nothing is), and what suits the tiny one on two CPU cores.
PAPER = {
    "dvae": {
        "batch_size": 512,
        "steps": 20_000,
        "warmup": 1000,
        "lr": 1e-3,
        "clip": 1.0,
        "codes": 8192,
        "kl_weight": 0.002,
    },
    "image": {"batch_size": 2048, "steps": 500_000, "warmup": 10_000, "lr": 1.5e-3, "clip": 3.0},
    "text": {"batch_size": 1024, "steps": 500_000, "warmup": 2500, "lr": 2e-4, "clip": 0.0, "max_text_len": 196},
    "vl": {"batch_size": 1024, "steps": 200_000, "warmup": 2500, "lr": 2e-4, "clip": 0.0},
}
LARGE = {"text": {"steps": 200_000}, "vl": {"lr": 5e-5}}
TINY = {
    "dvae": {"batch_size": 32, "steps": 400, "warmup": 50, "lr": 3e-3, "codes": 256, "kl_weight": 0.002},
    "image": {"batch_size": 64, "steps": 600, "warmup": 60, "lr": 1e-3},
    "text": {"batch_size": 64, "steps": 1000, "warmup": 75, "lr": 1e-3, "max_text_len": 48},
    "vl": {"batch_size": 64, "steps": 750, "warmup": 75, "lr": 1e-3},
}
# MoMo (its Section 3.6): 64 a device on 64 devices; 1600 epochs of ImageNet, at MAE's rate of 1.5e-4 for each 256 of a
# batch; then twice 100 times 6.6 M samples, as many as it has documents.
MOMO = {
    "image": {"batch_size": 4096, "steps": 500_000, "warmup": 12_500, "lr": 2.4e-3, "clip": 0.0},
    "text": {"batch_size": 4096, "steps": 161_000, "warmup": 16_100, "lr": 5e-5, "clip": 0.0, "max_text_len": 196},
    "vl": {"batch_size": 4096, "steps": 161_000, "warmup": 16_100, "lr": 1e-4, "clip": 0.0},
}


def recipe(stage, config, model="vlmo"):
    """The default of every flag that follows stage, config and model."""
    length = {"max_text_len": CONFIGS[config].max_text_len}
    if config == "tiny":
        return length | {"clip": 1.0, "save_every": 100} | TINY[stage] | (length if model == "momo" else {})
    if model == "momo":
        return length | {"save_every": 1000} | MOMO[stage]
    return length | {"save_every": 1000} | PAPER[stage] | (LARGE.get(stage, {}) if config == "large" else {})


# Betas, weight decay, decay of the learning rate; those of stages text and vl serve for fine-tuning, too.
OPTIMIZER = ((0.9, 0.98), 0.01, "linear")
DVAE_OPTIMIZER = ((0.9, 0.99), 0.0, "cosine")
IMAGE_OPTIMIZER = ((0.9, 0.999), 0.05, "cosine")
MOMO_OPTIMIZER = ((0.9, 0.95), 0.05, "cosine")  # MAE's, for all its stages: Section 3.6 names the cosine


# ---- The stages ------------------------------------------------------------------------------------------------------
# A stage holds a model, a head that later stages leave behind (or an empty module) and the weights of its losses; its
# forward takes a batch → {name: scalar}: the losses, each as losses.py defines its mean, and what else is to be logged.
# The loop keeps its `progress`: the share of training that is done.


class DVAEStage(nn.Module):
    """The tokenizer of stage image: reconstruction, and the use of the codebook (dvae.py)."""

    progress = 0.0  # the temperature follows it

    def __init__(self, model, kl_weight):
        super().__init__()
        self.model, self.head, self.weights = model, nn.Module(), {"reconstruction": 1.0, "kl": kl_weight}

    def forward(self, batch):
        """batch: image (b, 3, S, S)."""
        pixels, reconstruction, logits = self.model(batch["image"], dvae.temperature(self.progress))
        out = dvae.dvae_losses(pixels, reconstruction, logits)
        codes = torch.bincount(logits.detach().argmax(-1).flatten(), minlength=logits.shape[-1])
        return out | {"codes": (losses.gather(codes[None]).sum(0) > 0).sum().float()}  # that serve in this batch


class ImageStage(nn.Module):
    """Masked image modeling: the visual tokens of hidden patches (Section 3.4, as in BEiT). What an image passes
    through learns: the patch embedding, the attention, the vision experts."""

    def __init__(self, model, head, tokenizer):
        super().__init__()
        self.model, self.head, self.tokenizer, self.weights = model, head, tokenizer, {"mim": 1.0}
        model.requires_grad_(False)
        tokenizer.requires_grad_(False)
        for module in image_path(model):
            module.requires_grad_(True)

    def forward(self, batch):
        """batch: image (b, 3, S, S), hidden (b, N) bool."""
        hidden, codes = batch["hidden"], self.tokenizer.encode(batch["image"])  # (b, N)
        out = self.model.encode_image(batch["image"], masked=hidden, mask_embedding=self.head.mask_embedding)
        at = hidden.nonzero(as_tuple=True)
        return {"mim": losses.masked_token_loss(self.head(out[:, 1:][at]), codes[at])}  # of (M, K), (M,)


def image_path(model):
    """What an image-only pass reads."""
    yield from (model.patches, model.image_cls, model.types, model.norm)
    yield model.image_position if model.config.position == "absolute" else model.relative_table
    for block in model.blocks:
        attention = block.attention
        yield from (block.norm, block.attention_branch, block.expert_branch)
        for router in (attention.query, attention.key, attention.value, attention.out, block.experts):
            yield router["vision" if "vision" in router else "shared"]


class TextStage(nn.Module):
    """Masked language modeling on text alone: the language experts learn, the attention and the vision experts of stage
    image stay as they are (Section 3.4)."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head, self.weights = model, nn.Module(), {"mlm": 1.0}
        model.requires_grad_(False)
        for module in language_part(model):
            module.requires_grad_(True)

    def forward(self, batch):
        """batch: masked, labels (b, T) int64, mask (b, T) bool."""
        labels = batch["labels"][batch["labels"] != data.IGNORE]  # (M,)
        return {"mlm": losses.masked_token_loss(self.logits(batch), labels)}

    def logits(self, batch):
        """(M, V): of the masked tokens."""
        out = self.model.encode_text(batch["masked"], batch["mask"])  # (b, T, D)
        return self.model.mlm_head(out[batch["labels"] != data.IGNORE])


def language_part(model):
    """What stage text trains, as released: image rows of types and table get no gradient, so they stay."""
    yield from (model.words, model.text_norm, model.types, model.norm, model.mlm_head)
    yield model.text_position if model.config.position == "absolute" else model.relative_table
    yield from (block.experts["language"] for block in model.blocks)


class VisionLanguageStage(nn.Module):
    """All losses of a batch of pairs: encode → gather → draw → exchange → fuse → losses (Section 3.3)."""

    def __init__(self, model, losses_used, negatives="global"):
        """losses_used: {"itc", "itm", "mlm": weight}; what only those that are absent would train is frozen."""
        super().__init__()
        self.model, self.head, self.weights, self.negatives = model, nn.Module(), losses_used, negatives
        for module in untrained(model, *losses_used):
            module.requires_grad_(False)

    def forward(self, batch):
        """batch of data.collate, b pairs → {loss's name: scalar}, each as losses.py defines its mean."""
        same, out = losses.same_pairs(batch["ids"]), {}  # (b, B)
        i2t = t2i = torch.zeros(same.shape, device=same.device)  # without ITC all candidates are alike
        if "itc" in self.weights:
            T = data.cut(batch["mask"])
            image = self.model.embed_image(batch["image"])  # (b, D)
            text = self.model.embed_text(batch["text"][:, :T], batch["mask"][:, :T])  # (b, D)
            i2t, t2i = losses.similarities(image, text, self.model.scale())
            out["itc"] = losses.itc_loss(i2t, t2i, same)
        if "itm" in self.weights or "mlm" in self.weights:
            out |= self.fuse(batch, i2t, t2i, losses.candidates(same, self.negatives))
        return out | {"scale": self.model.scale().detach()}

    def fuse(self, batch, i2t, t2i, candidate):
        """MLM and ITM from one pass over up to 4b pairs: masked; matched; with a wrong image; with a wrong text."""
        b, image, text, mask = len(batch["image"]), batch["image"], batch["text"], batch["mask"]
        texts, masks, images = [], [], []
        if "mlm" in self.weights:
            texts, masks, images = [batch["masked"]], [mask], [image]
        if "itm" in self.weights:
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
        if "mlm" in self.weights:
            labels = batch["labels"][:, :T]  # (b, T)
            at = (labels != data.IGNORE).nonzero(as_tuple=True)
            out["mlm"] = losses.masked_token_loss(self.model.mlm_head(hidden[:b][at]), labels[at])  # of (M, V), (M,)
        if "itm" in self.weights:
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


# ---- Setting a stage up ----------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """The checkpoint that a run begins from (--init) or goes on with (--resume)."""

    path: Path
    content: dict
    config: Config
    tokenizer: object  # None: of a stage without text
    resumed: bool


class Job(NamedTuple):
    """What the loop needs to know of a stage."""

    stage: nn.Module
    samples: Dataset
    unit: str  # what a sample is
    config: object
    tokenizer: object
    taken: dict  # {group of the model: how it came from a checkpoint}
    splits: list  # those of val and test that --data has
    measure: Callable  # split → {name: number}
    note: str = ""
    kept: dict = {}  # goes into the checkpoint as it is
    best: str = ""  # the number by which the best checkpoint on split val is kept, too
    factor: float = 1.0  # of the head's learning rate
    optimizer: tuple = OPTIMIZER
    beside: Dataset = None  # MoMo: of the second modality; its names in a batch come after momo.BESIDE
    updates: tuple = ((),)  # of a step: what the stage's forward takes after the batch, for each


def set_up_dvae(args, here, config, start):
    image_size, grid = config.image_size, config.image_size // config.patch_size
    sources = read_splits(args, image_size, captions=False)
    runtime.seed_all(args.seed)
    model = dvae.DVAE(dvae.DVAEConfig(grid, args.codes, width=128 if args.config == "tiny" else 256))
    if start:
        weights.load_exactly(model, start.content["model"], start.path)

    def measure(split):
        if here.main:
            sheet = evaluate.reconstruction_sheet(model, sources[split], image_size, here.device)
            sheet.save(Path(args.out, f"reconstructions-{split}.png"))
        return evaluate.codebook(model, sources[split], image_size, here.device)

    samples, stage = images(args, sources["train"], image_size), DVAEStage(model, args.kl_weight)
    splits = measured(sources)
    return Job(stage, samples, "images", model.config, None, {}, splits, measure, optimizer=DVAE_OPTIMIZER)


def set_up_image(args, here, config, start):
    sources, side = read_splits(args, config.image_size, captions=False), config.image_size // config.patch_size
    model, taken = build(args, here, config, start)
    tokenizer, known = image_tokenizer(args, here, config, start)
    if tokenizer.config.grid != side:
        grids = f"{tokenizer.config.grid} × {tokenizer.config.grid} codes an image, the model {side} × {side} patches"
        raise runtime.UserError(
            f"--dvae {args.dvae} has {grids}: train one with the same --image-size and --patch-size"
        )
    runtime.seed_all(args.seed, 1)  # the same head, whether a dVAE was trained just now or not
    head = MIMHead(config, tokenizer.config.codes)
    if known:
        weights.load_exactly(head, start.content["head"], start.path)
    stage = ImageStage(model, head, tokenizer)
    samples = images(args, sources["train"], config.image_size, functools.partial(data.mask_blocks, side))
    measure = lambda split: evaluate.masked_patches(model, head, tokenizer, sources[split], here.device)
    kept = {"dvae": {"config": dataclasses.asdict(tokenizer.config), "model": tokenizer.state_dict()}}
    text = start and start.tokenizer
    splits = measured(sources)
    return Job(
        stage, samples, "images", config, text, taken, splits, measure, kept=kept, optimizer=IMAGE_OPTIMIZER
    )  # fmt: skip


def image_tokenizer(args, here, config, start):
    """The dVAE of stage image, and whether the checkpoint's head is for its codes: that of --dvae, that which the
    checkpoint was trained with, or one that is trained now."""
    own = start and start.content.get("dvae")
    path = args.dvae or (None if own else small_dvae(args, here, config))
    content = evaluate.read_checkpoint(path, dvae.DVAEConfig)[0] if path else own
    known = bool(own) and all(torch.equal(t, own["model"][name]) for name, t in content["model"].items())
    if known and args.codes not in (None, own["config"]["codes"]):
        raise runtime.UserError(f"--codes: {start.path} was trained with {own['config']['codes']}")
    if own and start.resumed and not known:
        raise runtime.UserError(f"--dvae {path} is not the one that {start.path} was trained with: leave --dvae away")
    tokenizer = dvae.DVAE(dvae.DVAEConfig(**content["config"]))
    weights.load_exactly(tokenizer, content["model"], path or start.path)
    return tokenizer, known


def set_up_text(args, here, config, start):
    if not start:
        raise runtime.UserError("stage text keeps the attention of stage image: name its checkpoint with --init")
    if config.experts == "shared":
        raise runtime.UserError("stage text trains language experts alone: a model with --experts shared has none")
    if args.data != ["shapes"]:
        data.text_files(args.data)
    config, words = vocabulary(args, here, config, start, lambda: data.text_corpus(args.data))
    model, taken = build(args, here, config, start)
    stage, texts = TextStage(model), packed(args, here, words, args.data)
    measure = lambda split: evaluate.masked_words(stage, texts[split], texts["train"], here.device)
    note = f", {len(texts['train'].tokens) / 1e6:.1f} M tokens"
    check_val(args, measured(texts))
    return Job(stage, texts["train"], "texts", config, words.tokenizer, taken, measured(texts), measure, note)


def packed(args, here, words, paths):
    """{split: data.Texts}. The tokens lie in files in the node's folder for temporary files, whose names go when all
    processes have them open."""
    if words.length < 3:
        raise runtime.UserError("--max-text-len must be at least 3: [T_CLS], a token, [T_SEP]")
    folder = Path(tempfile.gettempdir(), here.from_main(lambda: f"vlmo-{uuid.uuid4().hex}"))
    try:
        here.once_a_node(lambda: (folder.mkdir(), data.pack(data.read_documents(paths), words, folder)))
        texts = {split: data.Texts(folder / split, words, args.seed) for split in data.SPLITS}
        here.meet()
    finally:
        if here.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if not len(texts["train"]):
        raise data.DataError(f"{' '.join(paths)}: no text to train on")
    return texts


def set_up_vl(args, here, config, start):
    sources = read_splits(args, config.image_size, captions=True)
    config, words = vocabulary(args, here, config, start, sources["train"].corpus)
    model, taken = build(args, here, config, start)
    used = {"itc": args.itc_weight, "itm": args.itm_weight, "mlm": args.mlm_weight}
    stage = VisionLanguageStage(model, {name: weight for name, weight in used.items() if weight > 0}, args.negatives)

    measure = lambda split: evaluate.retrieval(model, sources[split], words, here.device)
    samples = pairs(args, sources["train"], config.image_size, words)
    splits = measured(sources) if "itc" in stage.weights else []  # nothing else makes retrieval work
    check_val(args, splits)
    note = candidates(args, here, stage)
    return Job(stage, samples, "pairs", config, words.tokenizer, taken, splits, measure, note)


def candidates(args, here, stage):
    """A note: from how many samples a VisionLanguageStage tells its pairs apart."""
    count = args.batch_size // args.accumulate
    hard = count if stage.negatives == "global" else count // here.world
    note = f", {count} candidates for contrast" if "itc" in stage.weights else ""
    return note + (f", {hard} for hard negatives" if "itm" in stage.weights else "")


def set_up_momo(args, here, config, start):
    """Any stage of MoMo: it learns one modality, and another beside it."""
    if reason := momo.misfit(config):
        raise runtime.UserError(f"{start.path}: {reason}" if start else reason)
    modalities = momo.MODALITIES[args.stage][: 1 if args.no_simultaneous else 2]
    sources, texts, tokenizer = {}, {}, start and start.tokenizer
    if modalities != ("text",):
        sources = read_splits(args, config.image_size, captions="pair" in modalities)
    if sources and "text" in modalities and (args.data == ["shapes"]) != (args.texts == ["shapes"]):
        raise runtime.UserError("--data and --texts: name both, or leave both to the built-in world")

    def corpus():
        captions = sources["train"].corpus() if "pair" in modalities else []
        return [*captions, *(data.text_corpus(args.texts) if "text" in modalities else [])]

    if args.stage != "image":
        config, words = vocabulary(args, here, config, start, corpus)
        tokenizer = words.tokenizer
    if "text" in modalities:
        hidden_words = momo.HiddenWords(tokenizer, config.max_text_len, momo.RATIO["text"])
        texts = packed(args, here, hidden_words, args.texts)
    first, *others = (momo_samples(args, name, sources, texts, config, tokenizer) for name in modalities)
    model, taken = build(args, here, config, start)
    factors = {"itc": args.itc_weight, "itm": args.itm_weight} if args.stage == "vl" else {}
    aligned = VisionLanguageStage(model, {name: w for name, w in factors.items() if w > 0}, args.negatives)
    stage = momo.Stage(model, modalities, momo.DECODERS[args.config], aligned, args.normalise_pixels)
    if start and start.resumed:
        weights.load_exactly(stage.head, start.content["head"], start.path)

    def measure(split):
        results = {}
        if "itc" in stage.weights:
            results = evaluate.retrieval(model, sources[split], words, here.device)
        if "mim" in stage.weights:
            results = evaluate.masked_pixels(stage, sources[split], here.device)
        if texts and texts[split]:
            results |= evaluate.masked_words(stage, texts[split], texts["train"], here.device)
        return results

    splits = measured(sources if stage.weights.keys() & {"itc", "mim"} else texts)
    check_val(args, splits)
    note = candidates(args, here, aligned) + (f", beside {len(others[0])} {modalities[1]}s" if others else "")
    updates = tuple((modality,) for modality in modalities) if args.no_cmga else ((),)
    return Job(
        stage, first, f"{modalities[0]}s", config, tokenizer, taken, splits, measure, note, optimizer=MOMO_OPTIMIZER,
        beside=others[0] if others else None, updates=updates,
    )  # fmt: skip


def momo_samples(args, modality, sources, texts, config, tokenizer):
    """The training samples of a modality, with what is hidden of them."""
    if modality == "text":
        return texts["train"]
    ratio, patches = momo.RATIO[modality], (config.image_size // config.patch_size) ** 2
    hide = functools.partial(momo.hide_patches, ratio, patches)
    if modality == "image":
        return images(args, sources["train"], config.image_size, hide)
    hidden_words = momo.HiddenWords(tokenizer, config.max_text_len, ratio)
    return pairs(args, sources["train"], config.image_size, hidden_words, hide)


STAGES = {
    "vlmo": {"dvae": set_up_dvae, "image": set_up_image, "text": set_up_text, "vl": set_up_vl},
    "momo": {"image": set_up_momo, "text": set_up_momo, "vl": set_up_momo},
}


def small_dvae(args, here, config):
    """Without --dvae: the path of one trained for this run, beside --out. With --resume it is finished, or kept."""
    folder = Path(f"{args.out}-dvae")
    here.print(f"no --dvae: one is trained first, in {folder}")
    defaults = {name: value for name, value in recipe("dvae", args.config).items() if name != "save_every"}
    batch = -(-defaults["batch_size"] // here.world) * here.world
    own = {
        "stage": "dvae",
        "out": folder,
        "init": None,
        "eval_every": 0,
        "accumulate": 1,
        "compile": False,
        "recompute": False,
    }
    own |= {"image_size": config.image_size, "patch_size": config.patch_size}
    own |= {flag: vars(args)[flag] for flag in ("codes", "kl_weight") if vars(args)[flag] is not None}
    return train(argparse.Namespace(**vars(args) | defaults | own | {"batch_size": batch}), here)


def build(args, here, config, start, anew=()):
    """The model, and what of it comes from the checkpoint: {group: how}. Groups in `anew` do not."""
    runtime.seed_all(args.seed)
    model = VLMo(config)
    if not start:
        return model, {}
    tensors = {name: t for name, t in start.content["model"].items() if weights.group(name) not in anew}
    how = weights.fit(model, tensors, start.config, start.path)
    if not start.resumed:
        here.print(f"{start.path} (stage {start.content['stage']}, step {start.content['step']}):")
        here.print(weights.report(weights.describe(how, model)))
    return model, how


def read_splits(args, image_size, captions):
    """{split: source}: train, test if --data has it, and val if it is asked for."""
    splits = ["train", "test"] + ["val"] * bool(args.eval_every)
    read = lambda split: data.read_sources(args.data, split, image_size, needed=split == "train", captions=captions)
    sources = {split: read(split) for split in splits}
    check_val(args, measured(sources))
    return sources


def check_val(args, splits):
    """UserError if --eval-every finds nothing that it could measure."""
    if args.eval_every and "val" not in splits:
        raise runtime.UserError("--eval-every needs a val split, and something that this run learns to measure on it")


def measured(sources):
    return [split for split in ("val", "test") if sources.get(split)]


def augmentation(args, usual):
    return args.augment or ("none" if args.data == ["shapes"] else usual)


def images(args, source, image_size, hide=None):
    return data.Images(source, image_size, args.seed, augmentation(args, "crop"), args.flip, hide)


def pairs(args, source, image_size, words, hide=None):
    return data.Pairs(source, words, image_size, args.seed, augmentation(args, "randaugment"), args.flip, hide)


def vocabulary(args, here, config, start, corpus):
    """The Config with the size of the vocabulary, and the words."""
    words = data.Words(make_tokenizer(args, here, start, corpus, config.vocab_size), config.max_text_len)
    return dataclasses.replace(config, vocab_size=words.size), words


def make_tokenizer(args, here, start, corpus, size):
    """That of the checkpoint, that of --vocab (the same, where both have one), or one trained on the corpus."""
    known = start and start.tokenizer
    if known and args.vocab_size not in (None, known.get_vocab_size()):
        raise runtime.UserError(f"--vocab-size: {start.path} has a vocabulary of {known.get_vocab_size()}, which stays")
    if start:
        tokenizer = weights.vocabulary(start.path, start.content["model"], known, args.vocab)
    else:
        tokenizer = args.vocab and data.load_tokenizer(args.vocab)
    if tokenizer:
        return tokenizer
    text = here.from_main(lambda: data.train_tokenizer(corpus(), size).to_str())
    return data.tokenizer_from_json(text, "the new tokenizer")


# ---- The command -----------------------------------------------------------------------------------------------------

# Flags that only some stages read.
MODELS, TEXT, PAIRS = ("image", "text", "vl"), ("text", "vl"), ("vl",)
ONLY = {
    "dvae": ("image",),
    "codes": ("dvae", "image"),
    "kl_weight": ("dvae", "image"),
    "vocab": TEXT,
    "vocab_size": TEXT,
    "max_text_len": TEXT,
}
ONLY |= dict.fromkeys(("texts", "no_simultaneous", "no_cmga"), TEXT)
ONLY |= dict.fromkeys(("init", "compile", "recompute", "normalise_pixels"), MODELS)
ONLY |= dict.fromkeys(("itc_weight", "itm_weight", "mlm_weight", "negatives"), PAIRS)
ONLY |= {
    field.name: MODELS for field in dataclasses.fields(Config) if field.name not in (*ONLY, "image_size", "patch_size")
}


def run_flags(group, name):
    """Flags of every run, here and in finetune.py."""
    group.add_argument("--out", metavar="DIR", help=f"for last.pt, metrics.jsonl, config.json [runs/{name}]")
    group.add_argument("--init", metavar="FILE", help="start from this checkpoint: of the stage before, or any")
    group.add_argument("--resume", action="store_true", help="continue the run in --out if there is one, else start it")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--save-every", type=int, metavar="STEPS", help="[1000; for tiny 100]")
    group.add_argument("--log-every", type=int, default=20, metavar="STEPS", help="[%(default)s]")


def data_flags(group, augmentation):
    group.add_argument("--vocab", metavar="FILE", help="vocab.txt or tokenizer.json [that of --init, or a new one]")
    group.add_argument("--augment", choices=data.AUGMENTATIONS, help=augmentation)
    group.add_argument("--flip", action="store_true", help="mirror half the images: not where texts say left and right")
    group.add_argument("--workers", type=int, metavar="N", help="loader processes per training process [by the cores]")


def optimization_flags(group, clip):
    group.add_argument(
        "--accumulate", type=int, default=1, metavar="A", help="split a step into A passes; negatives come from one"
    )
    group.add_argument("--clip", type=float, metavar="NORM", help=f"clip the gradient's norm; 0 = off {clip}")


def speed_flags(parser):
    group = parser.add_argument_group("speed")
    group.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision [off]")
    group.add_argument("--compile", action="store_true", help="compile the blocks")
    group.add_argument("--recompute", action="store_true", help="activation checkpointing: less memory, more time")


CHOICES = {"position": "{absolute,relative}", "experts": "{mome,shared}", "attention": "{shared,separate}"}


def parse():
    parser = runtime.Parser(__doc__)
    group = parser.add_argument_group("run")
    group.add_argument("--stage", choices=list(STAGES["vlmo"]), default="vl", help="[vl]")
    group.add_argument("--model", choices=list(STAGES), help="MoMo: momo.py [that of --init, or vlmo]")
    run_flags(group, "STAGE")
    group.add_argument("--eval-every", type=int, default=0, metavar="STEPS", help="measure on split val [0: never]")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", nargs="+", default=["shapes"], metavar="PATH", help="the built-in world [shapes]; folders of pairs "
        "(stage vl), of pairs or images (dvae, image, MoMo's text), text files or folders of them (VLMo's text)"
    )  # fmt: skip
    group.add_argument(
        "--dvae", metavar="FILE", help="stage image: the tokenizer, of --stage dvae [one is trained first]"
    )
    group.add_argument("--codes", type=int, metavar="K", help="of a new dVAE's codebook [8192; tiny 256]")
    data_flags(group, "[vl: randaugment, the paper's; dvae, image: crop; shapes: none]")

    group = parser.add_argument_group(
        "optimization",
        "defaults follow --stage, --config and --model (train.py: PAPER, TINY, MOMO); in brackets those of VLMo's "
        "base, the paper's, for stages image · text · vl",
    )
    group.add_argument("--batch-size", type=int, metavar="B", help="of a step, over all processes [2048 · 1024 · 1024]")
    group.add_argument("--steps", type=int, help="[500000 · 500000, large 200000 · 200000]")
    group.add_argument("--warmup", type=int, metavar="STEPS", help="[10000 · 2500 · 2500]")
    group.add_argument("--lr", type=float, help="peak learning rate [1.5e-3 · 2e-4 · 2e-4, large 5e-5]")
    optimization_flags(group, "[3 · off · off]")
    group.add_argument("--itc-weight", type=float, default=1.0, metavar="W", help="0 drops the loss (default 1)")
    group.add_argument("--itm-weight", type=float, default=1.0, metavar="W", help="(default 1)")
    group.add_argument("--mlm-weight", type=float, default=0.25, metavar="W", help="(default 0.25)")
    group.add_argument("--kl-weight", type=float, metavar="W", help="of a new dVAE (default 0.002)")
    group.add_argument("--negatives", choices=["global", "local"], default="global", help="hard negatives: Table 6")

    group = parser.add_argument_group("MoMo", "of --model momo alone")
    group.add_argument(
        "--texts", nargs="+", default=["shapes"], metavar="PATH", help="stages text, vl: plain text [shapes]"
    )
    group.add_argument("--no-simultaneous", action="store_true", help="stage text on text alone, vl on pairs: Table 6")
    group.add_argument("--no-cmga", action="store_true", help="two updates a step, one a modality: Table 6")
    group.add_argument("--normalise-pixels", action="store_true", help="targets of a patch with mean 0 and variance 1")

    speed_flags(parser)

    group = parser.add_argument_group("architecture", "--config, and any field of it; in brackets each config's value")
    group.add_argument("--config", choices=list(CONFIGS), help="[tiny, or that of --init]")
    for field in dataclasses.fields(Config):
        values = ", ".join(f"{name} {vars(config)[field.name]}" for name, config in CONFIGS.items())
        flag, kind = "--" + field.name.replace("_", "-"), field.type
        group.add_argument(flag, type=kind, metavar=CHOICES.get(field.name, kind.__name__.upper()), help=f"[{values}]")
    args = parser.parse_args()
    parser.refuse(args, ONLY, "stage")
    args.out = args.out or f"runs/{args.stage}"
    return args


def resolve(args, here, start):
    """Fills in what follows stage and config → the Config: that of --config, or of the checkpoint, with the flags on
    top. UserError where its fields do not fit together."""
    name = args.config or (start.content["args"]["config"] if start else "tiny")
    args.model = args.model or (start.content["args"].get("model") if start else None) or "vlmo"
    check_model(args)
    defaults = recipe(args.stage, name, args.model)
    base = start.config if start and not args.config and args.stage != "dvae" else CONFIGS[name]
    if args.model == "momo" and base is CONFIGS[name]:
        base = dataclasses.replace(base, experts="shared", drop_path=0.0)  # MAE has none in pre-training
    if start and args.stage == "dvae":  # --resume
        defaults |= {flag: start.content["args"][flag] for flag in ("image_size", "patch_size", "codes")}
    elif start and (args.stage in ("image", start.content["stage"]) or args.model == "momo" and start.tokenizer):
        defaults["max_text_len"] = start.config.max_text_len
    for flag, value in ({"config": name} | defaults).items():
        if vars(args)[flag] is None:
            vars(args)[flag] = value
    flags = {field.name: vars(args)[field.name] for field in dataclasses.fields(Config)}
    try:
        return dataclasses.replace(base, **{name: value for name, value in flags.items() if value is not None})
    except ValueError as error:
        raise runtime.UserError(str(error)) from None


def check_model(args):
    """UserError for a stage or a flag that the model does not have."""
    if args.stage not in STAGES[args.model]:
        raise runtime.UserError(f"--model {args.model} has no stage {args.stage}: its targets are pixels")
    foreign = {"vlmo": {"texts": ["shapes"], "no_simultaneous": False, "no_cmga": False, "normalise_pixels": False},
               "momo": {"dvae": None, "codes": None, "kl_weight": None, "mlm_weight": 0.25}}[args.model]  # fmt: skip
    for flag, default in foreign.items():
        if vars(args)[flag] != default:
            raise runtime.UserError(f"--{flag.replace('_', '-')} is not of --model {args.model}")
    alone, no_pictures = args.no_simultaneous, args.stage == "text" and (args.model == "vlmo" or args.no_simultaneous)
    unread = {  # by this run
        "no_cmga": alone,
        "texts": alone and args.stage == "vl",
        "data": alone and args.stage == "text",
        "normalise_pixels": alone and args.stage == "text",
        "augment": no_pictures,
        "flip": no_pictures,
    }
    for flag, never in unread.items():
        if never and vars(args)[flag] not in (None, False, ["shapes"]):
            raise runtime.UserError(f"--{flag.replace('_', '-')}: this run has nothing that it could apply to")


def check(args, here):
    """UserError for numbers of a stage that do not fit."""
    check_run(args, here)
    if args.steps < 1 or args.warmup < 0:
        raise runtime.UserError("--steps must be at least 1, --warmup not negative")
    if args.dvae and (args.codes, args.kl_weight) != (None, None):
        raise runtime.UserError("--codes and --kl-weight are of a new dVAE: they do not go with --dvae")
    if args.codes is not None and args.codes < 2:
        raise runtime.UserError("--codes must be at least 2")
    factors = (args.itc_weight, args.itm_weight, args.mlm_weight)
    if not all(math.isfinite(value) and value >= 0 for value in (args.kl_weight or 0, *factors)):
        raise runtime.UserError("the losses' weights must be finite and not negative")
    if not any(factors):
        raise runtime.UserError("the losses' weights must not all be 0")


def check_run(args, here):
    """UserError for numbers of any run that do not fit."""
    if min(args.batch_size, args.accumulate, args.save_every, args.log_every) < 1:
        raise runtime.UserError("--batch-size, --accumulate, --save-every and --log-every must be at least 1")
    if min(args.seed, args.eval_every or 0, args.workers or 0) < 0:
        raise runtime.UserError("--seed, --eval-every and --workers must not be negative")
    if not all(math.isfinite(value) and value >= 0 for value in (args.lr, args.clip)):
        raise runtime.UserError("--lr and --clip must be finite and not negative")
    if args.batch_size % (here.world * args.accumulate):
        parts = f"{here.world} processes × {args.accumulate} passes (--accumulate)"
        raise runtime.UserError(f"--batch-size {args.batch_size} is not divisible by {parts}")


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


def loader(args, here, samples, start):
    """Endless batches of this process from pass `start` on."""
    local = args.batch_size // here.world // args.accumulate
    order = data.Order(len(samples), local, here.rank, here.world, args.seed, start)
    workers, gpu = args.workers, here.device.type == "cuda"
    workers = runtime.workers(here.device) if workers is None else workers
    return iter(DataLoader(samples, batch_sampler=order, num_workers=workers, collate_fn=data.collate, pin_memory=gpu))


class Unreadable:
    """Image files that this process could not read: each named once and counted; too many end the run."""

    def __init__(self, images):
        self.files, self.limit = set(), max(10, images // 100)

    def check(self, batch):
        """Takes the list of files out of a batch."""
        files = batch.pop("unreadable")
        for file in sorted(set(files) - self.files):
            tqdm.write(f"{file}; another stands in")
            self.files.add(file)
        if len(self.files) > self.limit or not batch:
            reason = f"more than {self.limit}" if batch else f"{data.IN_A_ROW} in a row"
            raise data.DataError(f"{len(self.files)} images could not be read, {reason}: {files[0]}, …")


def check_finite(stage, names, first, rows):
    """rows (steps, names) from step `first` on. UserError that names the first value that is not finite."""
    for step, row in enumerate(rows, start=first):
        for name, value in zip(names, row):
            if not math.isfinite(value):
                advice = "the last checkpoint is from before; try a lower --lr, or --resume with another --seed"
                raise runtime.UserError(f"stage {stage}, step {step}: {name} is {value}: {advice}")


def continue_from(start, job, described, here, optimizer, scaler):
    """Puts optimizer and scaler where a checkpoint left them → the number of steps done."""
    content, trains = start.content, [n for n, p in job.stage.model.named_parameters() if p.requires_grad]
    try:
        if any(job.taken.get(name, "taken") != "taken" for name in weights.groups(trains)):
            raise ValueError
        done, then = content["step"], content["args"] | {"processes": content["processes"]}
        factors = [group["factor"] for group in optimizer.param_groups]
        optimizer.load_state_dict(content["optimizer"])
        for group, factor in zip(optimizer.param_groups, factors):
            group["factor"] = factor
        if content["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(content["scaler"])
    except (KeyError, ValueError):
        advice = "resume with the flags that it was trained with, or start from it with --init"
        raise runtime.UserError(f"{start.path} holds no run that can be continued like this: {advice}") from None
    if described["args"]["steps"] < done:
        raise runtime.UserError(f"{start.path} is of step {done}: --steps {described['args']['steps']} lies behind it")
    now = described["args"] | {"processes": described["processes"], "resume": then.get("resume")}
    changed = [f"{name} {then.get(name)} → {value}" for name, value in now.items() if value != then.get(name)]
    here.print(f"resuming after step {done}" + (f" with other flags: {', '.join(changed)}" if changed else ""))
    return done


def read_start(args, here, kind=Config):
    """The checkpoint that a run goes on with (--resume) or begins from (--init), or None."""
    last = Path(args.out, "last.pt")
    resumed = here.from_main(lambda: args.resume and last.exists())
    path = last if resumed else args.init
    if not path:
        return None
    start = Start(Path(path), *evaluate.read_checkpoint(path, kind), resumed)
    if resumed and start.content["stage"] != args.stage:
        raise runtime.UserError(f"{last} is of stage {start.content['stage']}: give stage {args.stage} another --out")
    if resumed and vars(args).get("model") not in (None, start.content["args"].get("model", "vlmo")):
        raise runtime.UserError(f"{last} is not of --model {args.model}: give this run another --out")
    return start


def train(args, here):
    """Runs one stage → the path of its last checkpoint."""
    start = read_start(args, here, dvae.DVAEConfig if args.stage == "dvae" else Config)
    config = resolve(args, here, start)
    check(args, here)
    return run(args, here, STAGES[args.model][args.stage](args, here, config, start), start)


def blocks(stage):
    """Those of the model, and of MoMo's decoders."""
    return [module for module in stage.modules() if isinstance(module, Block)]


def recompute(stage):
    """Activation checkpointing: a block keeps its input alone, and computes the rest once more in the backward pass."""
    for block in blocks(stage):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def no_compiler(here):
    """Why torch.compile does not work here, or None."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=here.device))
    except torch._dynamo.exc.TorchDynamoException as error:
        return f"there is no compiler ({runtime.first_line(error)})"


def compile_blocks(stage, here):
    """Compiles the blocks, or says why not."""
    reason = no_compiler(here)
    if reason:
        here.print(f"--compile: {reason}, the blocks run as they are")
        return
    # All blocks share their code, which is compiled for each kind of input, of block (lower, last, fusing) and of mode.
    torch._dynamo.config.recompile_limit = 64
    for block in blocks(stage):
        block.compile()


def run(args, here, job, start):
    """The loop of every stage and task → the path of the last checkpoint."""
    out, last, best = Path(args.out), Path(args.out, "last.pt"), Path(args.out, "best.pt")
    resumed = bool(start and start.resumed)

    # Model, optimizer
    stage, model = job.stage.to(here.device), job.stage.model
    betas, weight_decay, decay = job.optimizer
    optimizer = runtime.optimizer(stage, weight_decay, betas, stage.head, job.factor)
    scaler, done, record = here.scaler(), 0, -math.inf
    described = {"stage": args.stage, "args": vars(args) | {"out": str(out)}, "processes": here.world}
    described["config"] = dataclasses.asdict(job.config)
    if resumed:
        done = continue_from(start, job, described, here, optimizer, scaler)
        record = runtime.load(best)["record"] if here.from_main(best.exists) else record
    if start:
        start.content.clear()  # a second copy of everything
    if args.recompute:
        recompute(stage)
    if args.compile:
        compile_blocks(stage, here)
    wrapped = here.wrap(stage, parts=len(job.updates) > 1)
    parameters = [p for p in stage.parameters() if p.requires_grad]
    taken = [group for group, how in job.taken.items() if how in ("taken", "resampled")]

    # The folder of the run, and what is written there
    prepare_folder(out, resumed, here)
    metrics = runtime.Metrics(out, here.main, done)
    if here.main:
        (out / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    here.print(
        f"stage {args.stage}, {args.config}: {sum(p.numel() for p in parameters) / 1e6:.1f} M trainable parameters, "
        f"{len(job.samples)} {job.unit}, {here.world} × {here.device}, {args.batch_size} {job.unit} a step{job.note}, "
        f"measured on {' and '.join(job.splits) or 'nothing'}\n"
        f"  learns: {', '.join(weights.groups(n for n, p in model.named_parameters() if p.requires_grad))}"
    )
    names, history = [], []
    clock = time.perf_counter()

    def log(step):
        """Averages since the last log, over steps and processes; on all processes, which stop together if need be."""
        nonlocal clock
        rows = here.mean(torch.stack(history))
        check_finite(args.stage, names if args.amp != "fp16" else names[:-1], step - len(rows) + 1, rows)
        values = {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows))}
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        files = sum(len(reader.files) for reader in unreadable.values())
        files = here.mean(torch.tensor(float(files), device=here.device)) * here.world
        rate = {f"{job.unit}_per_s": args.batch_size * len(rows) / seconds}
        metrics.write(step=step, **values, lr=lr, **rate, unreadable=round(files))
        shown = [*stage.weights, "gradient norm"]
        bar.set_postfix({name: f"{values[name]:.2f}" for name in shown}, refresh=False)
        history.clear()

    def measure(split, step):
        nonlocal clock
        began = time.perf_counter()
        with here.autocast():
            results = job.measure(split)
        metrics.write(step=step, split=split, **results)
        stage.train()
        clock += time.perf_counter() - began  # the rate is that of training
        if here.main:
            bar.write(f"step {step}, split {split}: {evaluate.line(results)}")
        return results

    def watch(step):
        """Measures on split val where it is time to, and keeps the best."""
        nonlocal record
        if args.eval_every and step and (step % args.eval_every == 0 or job.best and step == args.steps):
            results = measure("val", step)
            if job.best and results[job.best] > record:
                record = results[job.best]
                if here.main:
                    save(best, step)

    def save(path, step, *parts):
        state = {"model": weights.learned(model, taken), "tokenizer": job.tokenizer and job.tokenizer.to_str()}
        state |= {name: part.state_dict() for name, part in (("head", stage.head), *parts)}
        runtime.save(path, described | state | job.kept | {"step": step, "record": record})

    sources = {"": job.samples} | ({momo.BESIDE: job.beside} if job.beside else {})
    loaders = {prefix: loader(args, here, samples, done * args.accumulate) for prefix, samples in sources.items()}
    unreadable = {prefix: Unreadable(len(samples)) for prefix, samples in sources.items()}

    def next_batch():
        batches = {prefix: next(batches) for prefix, batches in loaders.items()}
        for prefix, batch in batches.items():
            unreadable[prefix].check(batch)
        return {f"{prefix}{name}": tensor for prefix, batch in batches.items() for name, tensor in batch.items()}

    bar = tqdm(total=args.steps, initial=done, disable=not here.main, unit="step", mininterval=1)
    watch(done)  # a run may have been killed while it measured
    stage.train()
    for step in range(done + 1, args.steps + 1):
        runtime.seed_all(args.seed, step, here.rank)  # drop-path and negatives; the data have seeds of their own
        lr = runtime.learning_rate(step, args.steps, args.warmup, args.lr, decay)
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * lr
        stage.progress = step / args.steps
        parts, found, norm = [next_batch() for _ in range(args.accumulate)], collections.Counter(), 0.0
        for update in job.updates:  # one; in MoMo's ablation one a modality
            for part, batch in enumerate(parts, start=1):
                batch = {name: tensor.to(here.device, non_blocking=True) for name, tensor in batch.items()}
                with here.synchronised(wrapped, part == args.accumulate):
                    with here.autocast():
                        values = wrapped(batch, *update)
                    loss = sum(weight * values[name] for name, weight in stage.weights.items() if name in values)
                    scaler.scale(loss / args.accumulate).backward()
                found.update({name: value.detach().float() / args.accumulate for name, value in values.items()})
            scaler.unscale_(optimizer)
            norm += nn.utils.clip_grad_norm_(parameters, args.clip or math.inf) / len(job.updates)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        names = [*found, "gradient norm"]
        history.append(torch.stack([*found.values(), norm]))
        bar.update()

        saves = step % args.save_every == 0 or step == args.steps
        if step % args.log_every == 0 or saves:
            log(step)
        if here.main and saves:
            save(last, step, ("optimizer", optimizer), ("scaler", scaler))
        watch(step)
    bar.close()
    if "test" in job.splits:
        if job.best and args.eval_every:
            here.meet()
            content = runtime.load(best)
            model.load_state_dict(model.state_dict() | content["model"])
            stage.head.load_state_dict(content["head"])
            here.print(f"{best} is of step {content['step']}, the best on val by {job.best}; of it:")
        measure("test", args.steps)
    here.meet()  # process 0 has saved
    here.print(f"{last} holds the model")
    return last


def main():
    args = parse()
    train(args, runtime.Runtime(args.amp))


if __name__ == "__main__":
    runtime.run(main, data.DataError)
