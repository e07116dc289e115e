"""MoMo as its differences from VLMo: Sections 3.1 to 3.3 of "MoMo: A shared Encoder Model for text,
image and multi-Modal representations"; its stages are in momo_stages.py. VLMo's equations read
complete without both.

The encoder is the trunk of mome.py with shared experts: one standard Transformer, with the heads of
VLMo for contrast and matching. In the masked objectives it sees only visible tokens. Shallow
decoders put mask tokens back in place and reconstruct what is hidden; each stage and each modality
has its own, and later stages leave them behind.

Shape letters: b batch, T text tokens, N patches, S rows of a sequence, D dim, V vocabulary; K
visible rows, E width of a decoder, P = 3·patch_size² values of a patch, M hidden tokens.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import losses
from mome import Block, embedding, initialise
from texts import IGNORE, Words

RATIO = {"image": 0.75, "text": 0.15, "pair": 0.75}  # hidden: of patches, tokens, both (Section 3.2)
# Layers, E and heads of the decoders
DECODERS = {"tiny": (2, 64, 2), "base": (8, 512, 16), "base_plus": (8, 512, 16), "large": (8, 512, 16)}

# ---- Hiding: in the data, so that it does not depend on the number of processes ------------------


def hide(ratio, rng, candidates):
    """Candidates at random: exactly round(ratio · their number), at least one if there is any."""
    count = min(len(candidates), max(1, round(ratio * len(candidates))))
    return sorted(rng.sample(candidates, count))


def hide_patches(ratio, patches, rng):
    """→ (N,) bool, True = hidden."""
    hidden = torch.zeros(patches, dtype=torch.bool)
    hidden[hide(ratio, rng, range(patches))] = True
    return hidden


class HiddenWords(Words):
    """Texts of which tokens are hidden: the encoder does not see them, not even as [MASK]."""

    def __init__(self, tokenizer, length, ratio):
        super().__init__(tokenizer, length)
        self.ratio = ratio

    def mask_words(self, ids, rng):
        """ids (T,) → the same with [MASK] where a token is hidden; labels (T,), −100 = visible."""
        special = torch.tensor([self.pad, self.cls, self.sep])
        candidates = torch.isin(ids, special, invert=True).nonzero()[:, 0].tolist()
        at = hide(self.ratio, rng, candidates)
        labels = torch.full_like(ids, IGNORE)
        labels[at] = ids[at]
        return ids.masked_fill(labels != IGNORE, self.mask), labels


# ---- The encoder and the decoders (Section 3.3) --------------------------------------------------


def encode_visible(model, x, visible, fewest, K):
    """The encoder on visible rows only, as in MAE.

    x (b, S, D): embedded rows, positions included; visible (b, S) bool, True = seen; fewest, K: the
    smallest and the largest number of visible rows of a sample. → rows (b, K, D) after the final
    norm, their places in x (b, K), and which of them are real (b, K), False = padding.
    """
    visible_first = visible.long().argsort(dim=1, descending=True, stable=True)
    place = visible_first[:, :K]  # (b, K), in the order of the sequence
    rows, real = x.gather(1, place[..., None].expand(-1, -1, x.shape[2])), visible.gather(1, place)
    mask = None if fewest == K else real  # None: no row is padding
    # With one shared expert the kind of input and the end of the text do not matter
    return model.encode_rows(rows, "pair", 0, mask), place, real


class Decoder(nn.Module):
    """Visible rows, and a mask token wherever something is hidden → what stood there. Words are
    projected back to the encoder's width, because its token embeddings are the weights of the
    language modeling head, too."""

    def __init__(self, config, shape, modality):
        """config: of the encoder; shape: a row of DECODERS; modality: "image", "text" or "pair"."""
        super().__init__()
        layers, E, heads = shape
        sizes = dict(dim=E, layers=layers, heads=heads, vl_layers=0)
        inner = dataclasses.replace(config, drop_path=0.0, **sizes)
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
            patches = (config.image_size // config.patch_size) ** 2
            self.image_position = embedding(inner, 1 + patches, E)
            self.pixels = nn.Linear(E, 3 * config.patch_size**2)
        initialise(self, config)

    def forward(self, rows, place, real, mask, T):
        """rows, place, real: from encode_visible; mask (b, S) bool, False = padding, or None; the
        first T rows are text → (b, S, E)."""
        text_position = None if self.text_position is None else self.text_position[:T]
        known = [part for part in (text_position, self.image_position) if part is not None]
        position = torch.cat(known)  # (S, E)
        if mask is not None:
            position = position[: mask.shape[1]]  # a shared decoder given a text has image positions, too
        rows = torch.where(real[..., None], self.enter(rows), self.mask_token.to(rows.dtype))
        x = self.mask_token.to(rows.dtype).expand(len(rows), *position.shape)  # (b, S, E)
        x = x.scatter(1, place[..., None].expand_as(rows), rows) + position
        for block in self.blocks:
            x = block(x, "pair", T, None if mask is None else mask[:, None, None])
        return self.norm(x)


def read_decoders(start, config):
    """The decoders of a checkpoint of one of MoMo's stages: {modality: Decoder}."""
    names = dict.fromkeys(name.split(".")[0] for name in start.head)
    decoders = nn.ModuleDict({name: Decoder(config, DECODERS[start.args["config"]], name) for name in names})
    checkpoint.load_exactly(decoders, start.head, start.path)
    return decoders


def reconstruct(model, decoder, batch):
    """Hides, encodes and decodes an image, a text or a pair → pixels (M, P) of hidden patches and
    logits (M, V) of hidden tokens; None for what the batch does not have.

    batch: image (b, 3, S, S) with hidden (b, N) bool; masked, labels (b, T) with mask (b, T) bool,
    True = real token; and what loader.with_counts adds. All images have equally many hidden patches.
    """
    x, visible, masks = [], [], []  # of the text, then of the image
    T = fewest = K = 0
    if "masked" in batch:
        labels, mask = batch["labels"], batch["mask"]
        x, visible, masks = [model.embed_words(batch["masked"])], [mask & (labels == IGNORE)], [mask]
        T, (fewest, K) = labels.shape[1], batch["visible"]
    if "hidden" in batch:
        b, N = batch["hidden"].shape
        seen = 1 + N - len(batch["hidden_at"]) // b  # with [I_CLS]
        fewest, K = fewest + seen, K + seen
        x.append(model.embed_patches(batch["image"], 1))
        visible.append(F.pad(~batch["hidden"], (1, 0), value=True))  # [I_CLS] is always visible
        masks.append(torch.ones_like(visible[-1]))
    rows = encode_visible(model, torch.cat(x, dim=1), torch.cat(visible, dim=1), fewest, K)
    out = decoder(*rows, torch.cat(masks, dim=1) if T else None, T)  # (b, S, E)

    pixels = logits = None
    if "hidden" in batch:
        pixels = decoder.pixels(out[:, T + 1 :].flatten(0, 1)[batch["hidden_at"]])  # (M, P)
    if "masked" in batch:
        hidden_words = decoder.words(out[:, :T].flatten(0, 1)[batch["masked_at"]])  # (M, D)
        logits = F.linear(hidden_words, model.words.weight, decoder.word_bias)  # (M, V)
    return pixels, logits


# ---- The objectives (Section 3.1) ----------------------------------------------------------------


def mim_loss(pixels, wanted, count):
    """Eq. (1): the squared error of hidden patches, a mean over them and their values. pixels,
    wanted (M, P); count: M, as in losses.global_mean."""
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    return losses.global_mean((pixels - wanted).square().mean(1).sum(), count)


def patch_values(image, at, size, normalised=False):
    """The targets of Eq. (1): image (b, 3, S, S) uint8, at (M,): patches of size × size pixels, of
    all the batch's → (M, P), in −1 … 1, or with mean 0 and variance 1 per patch (MAE)."""
    values = F.unfold(image.float() / 127.5 - 1, size, stride=size).transpose(1, 2)  # (b, N, P)
    values = values.flatten(0, 1)[at]  # (M, P)
    if normalised:
        mean, variance = values.mean(1, keepdim=True), values.var(1, keepdim=True)
        values = (values - mean) / (variance + 1e-6).sqrt()
    return values
