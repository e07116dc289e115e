"""Stages, tasks and batches without data: the steps that bench.py compares.

Shape letters as in losses.py; T text tokens, N patches.
"""

import dataclasses
from types import SimpleNamespace

import torch
from torch import nn

import momo
import runtime
import train
from loader import to_device, with_counts
from mome import CONFIGS, VLMo, classifier
from momo_stages import MoMoText, MoMoVL
from stage import Stage
from stages import VL, Text, language_part
from textbook import Textbook
from texts import IGNORE
from vqa import VQA

ALL = {"itc": 1.0, "itm": 1.0, "mlm": 0.25}  # the paper's losses, and their weights
ANSWERS = 3129  # of VQA 2.0


def bare(kind, model, **attributes):
    """A stage of this class around a model, without data."""
    stage = kind.__new__(kind)
    Stage.__init__(stage)
    stage.model = model
    for name, value in attributes.items():
        setattr(stage, name, value)
    return stage


def hide(ratio, candidates):
    """round(ratio · their number) of a row's candidates, but one at least. (b, n) → (b, n) bool."""
    place = torch.rand(candidates.shape).masked_fill(~candidates, 2.0).argsort(1).argsort(1)
    return place < (ratio * candidates.sum(1, keepdim=True)).round().clamp(min=1)


def pairs(config, b, ratio=0.15, full=False):
    """b pairs as data.Pairs makes them, with this ratio of tokens and of patches hidden. full: with
    running text; else with captions, the b quantiles of a length of 6 to 40 tokens, 13 on average:
    of 4 captions the longest has 21, of 8 26, of 64 40."""
    torch.manual_seed(0)
    T, S = config.max_text_len, config.image_size
    quantiles = 6 - 7.2 * torch.log1p(-(torch.arange(b) + 0.5) / b)
    lengths = torch.full((b,), T) if full else quantiles.round().clamp(max=40)
    place, lengths = torch.arange(T), lengths[:, None]  # (T,), (b, 1)
    mask = place < lengths  # (b, T)
    text = torch.randint(5, config.vocab_size, (b, T)).masked_fill(~mask, 0)
    words = hide(ratio, (place > 0) & (place < lengths - 1))
    patches = torch.ones(b, (S // config.patch_size) ** 2, dtype=torch.bool)  # (b, N)
    return {
        "image": torch.randint(0, 256, (b, 3, S, S), dtype=torch.uint8),
        "text": text,
        "mask": mask,
        "masked": text.masked_fill(words, 4),
        "labels": text.masked_fill(~words, IGNORE),
        "hidden": hide(ratio, patches),
        "ids": torch.arange(2 * b).view(b, 2),
    }


class Side:
    """One way to compute a step, which a call does: a stage, its optimizer, its batches."""

    def __init__(
        self,
        name,
        b,
        run,
        kind="stage vl",
        full=False,
        parts=1,
        ahead=True,
        recompute=False,
        compile=False,
        **fields,
    ):
        """kind: as in stage_of. full: with texts of full length. parts: of the step; ahead: whether
        they see each other. fields: of the Config."""
        torch.manual_seed(0)
        self.run, self.ahead = run, ahead
        fields = {"drop_path": 0.0} | fields
        self.stage = stage_of(kind, name, dataclasses.replace(CONFIGS[name], **fields))

        # The batches of each data set of the stage
        config = self.stage.model.config  # of MoMo another one
        batches = [pairs(config, b, momo.RATIO["pair"] if kind == "momo" else 0.15, full)]
        if kind == "vqa":
            batches[0]["target"] = torch.rand(b, ANSWERS)
        if kind == "momo":
            documents = pairs(config, b, momo.RATIO["text"], full=True)
            batches.append({name: documents[name] for name in ("masked", "labels", "mask")})

        # Each of them in parts, on the device
        columns = []
        for batch in batches:
            split = [dict(zip(batch, rows)) for rows in zip(*(x.chunk(parts) for x in batch.values()))]
            split = split if kind == "textbook" else with_counts(split)  # a textbook pads to full length
            columns.append([to_device(part, run.device) for part in split])
        self.parts = list(zip(*columns))

        # As train.train begins
        self.stage.to(run.device).train()
        train.freeze_unread(self.stage, self.parts[0], run)
        runtime.speed_up(self.stage, SimpleNamespace(recompute=recompute, compile=compile), run)
        self.optimizer = runtime.adamw(self.stage)

    def __call__(self):
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self):
        """Forward and backward passes."""
        parts = self.parts
        if self.ahead:
            with self.run.autocast():
                parts = self.stage.look_ahead(parts)
        for batches in parts:
            with self.run.autocast():
                values = self.stage(*batches)
            loss = sum(w * values[name] for name, w in self.stage.loss_weights.items())
            (loss / len(parts)).backward()

    def trained(self):
        """The parameters that train."""
        return [p for p in self.stage.parameters() if p.requires_grad]


def stage_of(kind, name, config):
    """A stage or task without data: "stage vl", "textbook" (the same), "momo" (stage momo-vl),
    "stage text", "retrieval" or "vqa"."""
    if kind == "momo":
        return momo_stage(name, config)
    model = VLMo(config)
    if kind == "stage text":
        model.requires_grad_(False)
        for module in language_part(model):
            module.requires_grad_(True)
        return bare(Text, model, loss_weights={"mlm": 1.0})
    if kind == "vqa":
        return bare(VQA, model, head=classifier(config, config.dim, ANSWERS), loss_weights={"loss": 1.0})
    weights = {"itc": 1.0} if kind == "retrieval" else ALL
    return bare(Textbook if kind == "textbook" else VL, model, loss_weights=weights, negatives="global")


def momo_stage(name, config):
    """Stage momo-vl, with texts of stage momo-text's length."""
    recipe = MoMoText.recipe.get(name, MoMoText.recipe["base"])
    length = recipe.get("max_text_len", config.max_text_len)
    config = dataclasses.replace(config, experts="shared", max_text_len=length)
    decoders = {kind: momo.Decoder(config, momo.DECODERS[name], kind) for kind in ("pair", "text")}
    weights = dict.fromkeys(["cmm mim", "cmm mlm", "itc", "itm", "mlm"], 1.0)
    stage = bare(MoMoVL, VLMo(config), head=nn.ModuleDict(decoders), loss_weights=weights)
    stage.negatives, stage.normalised = "global", False
    return stage
