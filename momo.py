"""MoMo as its differences from VLMo: Sections 3.1 to 3.6 of "MoMo: A shared Encoder Model for text, image and
multi-Modal representations". VLMo's equations read complete without this file.

The encoder is the trunk of mome.py with shared experts: one standard Transformer, with the heads of VLMo for contrast
and matching. In the masked objectives it sees visible tokens only. Shallow decoders put mask tokens back in place and
reconstruct what is hidden; each stage and each modality has its own, and later stages leave them behind.

Shape letters as in mome.py; K visible rows, E width of a decoder, P = 3·patch_size² values of a patch, M hidden tokens.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

import data
import losses
from mome import Block, embedding, initialise

RATIO = {"image": 0.75, "text": 0.15, "pair": 0.75}  # masked: of patches, of tokens, of both (Section 3.2)
DECODERS = {"tiny": (2, 64, 2), "base": (8, 512, 16), "base_plus": (8, 512, 16), "large": (8, 512, 16)}  # layers, E, H


def misfit(config):
    """Why the encoder of this Config is not MoMo's, or None."""
    rules = {"experts": "shared", "attention": "shared", "position": "absolute"}
    needed = [f"{name} {value}" for name, value in rules.items() if vars(config)[name] != value]
    if needed:
        return f"--model momo is one Transformer for all rows: it needs {', '.join(needed)}"
    if config.image_size // config.patch_size < 2:
        return "--model momo reconstructs hidden patches from others: it needs more than one"


# ---- Hiding: in the data, so that it does not depend on the number of processes --------------------------------------


def hide(ratio, rng, candidates):
    """Candidates chosen at random: exactly round(ratio · their number), at least one where there is any."""
    count = min(len(candidates), max(1, round(ratio * len(candidates))))
    return sorted(rng.sample(candidates, count))


def hide_patches(ratio, patches, rng):
    """→ (N,) bool, True = hidden."""
    hidden = torch.zeros(patches, dtype=torch.bool)
    hidden[hide(ratio, rng, range(patches))] = True
    return hidden


class HiddenWords(data.Words):
    """Texts of which tokens are hidden: they leave the encoder's input, nothing stands for them."""

    def __init__(self, tokenizer, length, ratio):
        super().__init__(tokenizer, length)
        self.ratio = ratio

    def mask_words(self, ids, rng):
        """ids (T,) → the same with [MASK] where a token is hidden, which no one reads; labels (T,), −100 = visible."""
        special = torch.tensor([self.pad, self.cls, self.sep])
        at = hide(self.ratio, rng, torch.isin(ids, special, invert=True).nonzero()[:, 0].tolist())
        labels = torch.full_like(ids, data.IGNORE)
        labels[at] = ids[at]
        return ids.masked_fill(labels != data.IGNORE, self.mask), labels


# ---- The encoder and the decoders (Section 3.3) ----------------------------------------------------------------------


def encode_visible(model, x, visible):
    """The encoder on visible rows alone, as in MAE. x (b, S, D): embedded rows, which know their positions; visible
    (b, S) bool → rows (b, K, D) after the final norm, their places (b, K), and which of them are real (b, K), for K is
    the largest number of visible rows of a sample."""
    fewest, K = torch.stack(visible.sum(1).aminmax()).tolist()
    place = visible.long().argsort(dim=1, descending=True, stable=True)[:, :K]  # visible ones first, in their order
    rows, real = x.gather(1, place[..., None].expand(-1, -1, x.shape[2])), visible.gather(1, place)
    # its one shared expert asks neither for the kind of input nor where its text ends
    return model.encode_rows(rows, "pair", 0, None if fewest == K else real), place, real


class Decoder(nn.Module):
    """Visible rows of the encoder, and a mask token wherever something is hidden → what stood there. Its width is not
    the encoder's: words are projected back to that, for the token embeddings are the output weights, too."""

    def __init__(self, config, shape, modality):
        """config: the encoder's; shape: a row of DECODERS; modality: "image", "text" or "pair"."""
        super().__init__()
        layers, E, heads = shape
        inner = dataclasses.replace(config, dim=E, layers=layers, heads=heads, vl_layers=0, drop_path=0.0)
        self.enter = nn.Linear(config.dim, E)
        self.mask_token = embedding(inner, E)
        self.blocks = nn.ModuleList(Block(inner, layer) for layer in range(layers))
        self.norm = nn.LayerNorm(E, eps=1e-6)
        self.text_position = self.image_position = None
        if modality != "image":
            self.text_position = embedding(inner, config.max_text_len, E)
            self.words = nn.Linear(E, config.dim)
            self.word_bias = nn.Parameter(torch.zeros(config.vocab_size))
        if modality != "text":
            self.image_position = embedding(inner, 1 + (config.image_size // config.patch_size) ** 2, E)
            self.pixels = nn.Linear(E, 3 * config.patch_size**2)
        initialise(self, config)

    def forward(self, rows, place, real, mask, T):
        """rows, place, real as encode_visible gives them; mask (b, S) bool, False = padding, or None; the first T rows
        are text → (b, S, E)."""
        position = [] if self.text_position is None else [self.text_position[:T]]
        position = torch.cat(position + ([] if self.image_position is None else [self.image_position]))  # (S, E)
        rows = torch.where(real[..., None], self.enter(rows), self.mask_token.to(rows.dtype))
        x = self.mask_token.to(rows.dtype).expand(len(rows), *position.shape)
        x = x.scatter(1, place[..., None].expand_as(rows), rows) + position
        for block in self.blocks:
            x = block(x, "pair", T, None if mask is None else mask[:, None, None])
        return self.norm(x)


# ---- The objectives (Section 3.1) ------------------------------------------------------------------------------------


def reconstructions(model, decoder, image=None, hidden=None, masked=None, labels=None, mask=None):
    """Of an image, a text or a pair: pixels (M, P) of hidden patches and logits (M, V) of hidden tokens.

    image (b, 3, S, S) with hidden (b, N) bool; masked (b, T) int64 with labels (b, T), −100 = visible, and mask (b, T)
    bool, True = real token. What is hidden does not reach the encoder.
    """
    x, visible, masks, T = [], [], [], 0
    if masked is not None:
        T = data.cut(mask)
        labels, mask = labels[:, :T], mask[:, :T]
        x, visible, masks = [model.embed_words(masked[:, :T])], [mask & (labels == data.IGNORE)], [mask]
    if image is not None:
        x.append(model.embed_patches(image, 1))
        visible.append(F.pad(~hidden, (1, 0), value=True))  # [I_CLS] is always visible
        masks.append(torch.ones_like(visible[-1]))
    rows = encode_visible(model, torch.cat(x, dim=1), torch.cat(visible, dim=1))
    out = decoder(*rows, torch.cat(masks, dim=1) if T else None, T)  # (b, S, E)
    pixels = None if image is None else decoder.pixels(out[:, T + 1 :][hidden])
    if masked is None:
        return pixels, None
    return pixels, F.linear(decoder.words(out[:, :T][labels != data.IGNORE]), model.words.weight, decoder.word_bias)


def mim_loss(pixels, image, hidden, normalised=False):
    """Eq. (1): the squared error of hidden patches, a mean over them and their values. pixels (M, P); image, hidden as
    above. normalised: each patch's target has mean 0 and variance 1 (MAE)."""
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    error = (pixels - patch_values(image, hidden, normalised)).square().mean(1)  # (M,)
    return losses.global_mean(error.sum(), len(error))


def patch_values(image, hidden, normalised):
    """The targets of Eq. (1): image (b, 3, S, S) uint8, hidden (b, N) bool → (M, P), in −1 … 1 or normalised."""
    size = image.shape[-1] // round(hidden.shape[1] ** 0.5)
    values = F.unfold(image.float() / 127.5 - 1, size, stride=size).transpose(1, 2)[hidden]  # (M, P)
    if normalised:
        values = (values - values.mean(1, keepdim=True)) / (values.var(1, keepdim=True) + 1e-6).sqrt()
    return values


def mlm_loss(logits, labels):
    """Eq. (2): cross-entropy, a mean over hidden tokens. logits (M, V); labels (b, T), −100 = visible."""
    return losses.masked_token_loss(logits, labels[labels != data.IGNORE])


# ---- The stages (Sections 3.2 and 3.5) -------------------------------------------------------------------------------


MODALITIES = {"image": ("image",), "text": ("text", "image"), "vl": ("pair", "text")}  # the second is learned beside
INPUTS = {"image": ("image", "hidden"), "text": ("masked", "labels", "mask")}
INPUTS["pair"] = INPUTS["image"] + INPUTS["text"]
BESIDE = "beside: "  # before the names of the second modality in a batch
LOSSES = {"image": ("mim",), "text": ("mlm",), "pair": ("cmm mim", "cmm mlm")}  # Eq. (3) is the sum of the last two


def active(model):
    """{modality: the parameters that its input passes on its way to [CLS]}: Table 1's counts."""
    shared = [model.types, *model.blocks.parameters(), *model.norm.parameters()]
    text = [model.text_position, *model.words.parameters(), *model.text_norm.parameters()]
    image = [model.image_position, model.image_cls, *model.patches.parameters()]
    return {"text": text + shared, "image": image + shared, "pair": text + image + shared}


def unread(model, modalities):
    """Embeddings that no input of these modalities passes."""
    if modalities == ("image",):
        yield from (model.words, model.text_norm, model.text_position)
    if modalities == ("text",):
        yield from (model.patches, model.image_cls, model.image_position)


class Stage(nn.Module):
    """One stage of three. A step has a batch of each of its modalities, whose losses add up to one gradient: cross-
    modality gradient accumulation (CMGA)."""

    def __init__(self, model, modalities, shape, aligned, normalised=False):
        """modalities: of MODALITIES; shape: a row of DECODERS; aligned: contrast and matching of whole pairs, a module
        batch → {"itc", "itm", …} with their weights (train.VisionLanguageStage); normalised: targets of pixels."""
        super().__init__()
        self.model, self.aligned, self.normalised = model, aligned, normalised
        self.weights = {name: 1.0 for modality in modalities for name in LOSSES[modality]} | aligned.weights
        self.head = nn.ModuleDict({name: Decoder(model.config, shape, name) for name in modalities})
        self.prefix = dict(zip(modalities, ("", BESIDE)))
        for module in unread(model, modalities):
            module.requires_grad_(False)

    def forward(self, batch, *modalities):
        """batch: of the first modality as data.py makes it, of the second each name after BESIDE.
        modalities: those whose losses are wanted; none: all."""
        out = {}
        for modality in modalities or self.head:
            inputs = {name: batch[self.prefix[modality] + name] for name in INPUTS[modality]}
            pixels, logits = reconstructions(self.model, self.head[modality], **inputs)
            found = []
            if pixels is not None:
                found.append(mim_loss(pixels, inputs["image"], inputs["hidden"], self.normalised))
            if logits is not None:
                found.append(mlm_loss(logits, inputs["labels"]))
            out |= zip(LOSSES[modality], found)
            if modality == "pair":
                out |= self.aligned(batch)
        return out

    def pixels(self, batch):
        """(M, P): of the hidden patches of images."""
        return reconstructions(self.model, self.head["image"], batch["image"], batch["hidden"])[0]

    def logits(self, batch):
        """(M, V): of the hidden tokens of texts."""
        inputs = {name: batch[name] for name in INPUTS["text"]}
        return reconstructions(self.model, self.head["text"], **inputs)[1]
