"""The mixture-of-modality-experts Transformer of VLMo: Sections 3.1 and 3.2, and the heads of 3.3.

Shape letters: B batch, T text tokens with [T_CLS] and [T_SEP], N patches, S rows of a sequence (T,
1+N or T+1+N), R the leading rows of it that somebody reads, D dim, H heads, L layers, F
vision-language layers, V vocabulary. A pair is text first, then image: [T_CLS] is row 0, [I_CLS] is
row T. Masks: True = real token; they hide keys only.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from relative import RelativeAttention, pair_index, relative_index


@dataclass(frozen=True)
class Config:
    """The architecture. Raises ValueError where fields do not fit together."""

    dim: int = 768
    layers: int = 12
    heads: int = 12
    vl_layers: int = 2  # F: the top layers, where a pair meets the vision-language expert
    image_size: int = 224
    patch_size: int = 16
    vocab_size: int = 30522
    max_text_len: int = 40
    position: str = "absolute"  # "absolute" (Section 3.1) or "relative" (the released base and large models)
    text_reach: int = 196  # relative only: how many text positions the table tells apart
    layer_scale: float = 0.0  # initial LayerScale; 0 = none (released relative models: 0.1)
    drop_path: float = 0.0  # drop rate of the last layer, linear from 0 in the first; also text dropout
    init_std: float = 0.02  # of the normal distribution that matrices and embeddings start from (BERT, BEiT)
    experts: str = "mome"  # "mome", or "shared": the standard Transformer of Table 5, row 4
    attention: str = "shared"  # "shared", or "separate" below the vision-language layers (Table 7)

    def __post_init__(self):
        sizes = (self.dim, self.layers, self.heads, self.image_size, self.patch_size, self.vocab_size)
        fits = self.position == "absolute" or self.max_text_len <= self.text_reach
        rules = {
            "dim, layers, heads, image_size, patch_size and vocab_size must be positive": min(sizes) > 0,
            "position must be absolute or relative": self.position in ("absolute", "relative"),
            "experts must be mome or shared": self.experts in ("mome", "shared"),
            "attention must be shared or separate": self.attention in ("shared", "separate"),
            "vl_layers must be in 0 … layers": 0 <= self.vl_layers <= self.layers,
            "max_text_len must hold at least [T_CLS], a token and [T_SEP]": self.max_text_len >= 3,
            "max_text_len must not exceed text_reach": fits,
            "drop_path must be at least 0 and below 1": 0 <= self.drop_path < 1,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(rule)
        if self.dim % self.heads or self.image_size % self.patch_size:  # both divisors are > 0 by now
            raise ValueError("dim must be a multiple of heads, image_size one of patch_size")


CONFIGS = {
    "tiny": Config(  # narrow layers start with the gain of wide ones: 0.05 ≈ 0.02·√(768/128)
        dim=128, layers=3, heads=2, vl_layers=1, image_size=48, patch_size=8, vocab_size=512, max_text_len=24,
        init_std=0.05,
    ),
    "base": Config(drop_path=0.1),
    "base_plus": Config(dim=544, layers=24, heads=16, vl_layers=3, drop_path=0.1),
    "large": Config(dim=1024, layers=24, heads=16, vl_layers=3, drop_path=0.1),
}  # fmt: skip


class Router(nn.ModuleDict):
    """Sends every row to the module of its modality, as Section 3.2 selects experts.

    Modules: only `shared` (all rows), or `language` and `vision`, with or without `vl` (all rows of
    a pair).
    """

    def forward(self, x, kind, T):
        """x (B, R, D), the leading rows of an input of `kind` "image", "text" or "pair", whose
        first T are text."""
        if "shared" in self:
            return self["shared"](x)
        if kind == "pair" and "vl" in self:
            return self["vl"](x)
        if kind == "pair" and x.shape[1] > T:
            text, image = x.split([T, x.shape[1] - T], dim=1)
            return torch.cat([self["language"](text), self["vision"](image)], dim=1)
        return self["vision" if kind == "image" else "language"](x)  # of a pair: only text rows are left


class Attention(nn.Module):
    """Multi-head self-attention over the rows of all modalities. Keys have no bias (BEiT)."""

    def __init__(self, config, separate):
        super().__init__()
        D = config.dim
        names = ("language", "vision") if separate else ("shared",)
        self.heads = config.heads
        self.query = Router({name: nn.Linear(D, D) for name in names})
        self.key = Router({name: nn.Linear(D, D, bias=False) for name in names})
        self.value = Router({name: nn.Linear(D, D) for name in names})
        self.out = Router({name: nn.Linear(D, D) for name in names})

    def forward(self, x, kind, T, mask=None, positions=None, rows=None):
        """x (B, S, D) → (B, R, D): queries come from the first `rows` rows (None: all), keys and
        values from all.

        mask: None, or a mask of keys (B, 1, 1, S), True = may be read. positions: None, or relative
        ones, a table (H, P) and an index (S, S) into it.
        """
        x = in_precision(x)
        by_head = (self.heads, -1)  # D → H, D/H
        q = self.query(x[:, :rows], kind, T).unflatten(-1, by_head).transpose(1, 2)  # (B, H, R, D/H)
        k = self.key(x, kind, T).unflatten(-1, by_head).transpose(1, 2)  # (B, H, S, D/H)
        v = self.value(x, kind, T).unflatten(-1, by_head).transpose(1, 2)
        if positions is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, R, D/H)
        else:
            table, index = positions
            y = RelativeAttention.apply(q, k, v, table, index[:rows], mask)
        return self.out(y.transpose(1, 2).flatten(2), kind, T)


class Expert(nn.Module):
    """A modality expert: its own LayerNorm and its feed-forward network, FFN(LN(x)) of Eq. (2)."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.fc1 = nn.Linear(config.dim, 4 * config.dim)
        self.fc2 = nn.Linear(4 * config.dim, config.dim)

    def forward(self, x):
        """x (B, R, D) → (B, R, D): FC2(GELU(FC1(LN(x))))."""
        return GELULinear.apply(self.fc1(self.norm(x)), self.fc2.weight, self.fc2.bias)


class GELULinear(torch.autograd.Function):
    """Linear(GELU(x)) that saves only x and recomputes GELU(x) in the backward pass: a step keeps a
    fifth less memory in all, at no measurable cost in time. to_…: the gradient with respect to …"""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """x (B, R, 4D), weight (D, 4D), bias (D,) → (B, R, D)."""
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (B·R, D): one product, where (B, R, D) would be B of them
        to_gelu = (rows @ weight.to(grad.dtype)).view_as(x)
        to_x = torch.ops.aten.gelu_backward(to_gelu, x)
        return to_x, rows.T @ F.gelu(x).flatten(0, -2), rows.sum(0)


class Branch(nn.Module):
    """LayerScale, then drop-path, of a residual branch (B, R, D): a sample's whole branch is dropped."""

    def __init__(self, config, drop):
        super().__init__()
        self.drop = drop
        self.gamma = nn.Parameter(torch.full((config.dim,), config.layer_scale)) if config.layer_scale else None

    def forward(self, x):
        if self.gamma is not None:
            x = self.gamma * x
        if self.training and self.drop > 0:
            kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop  # (B, 1, 1)
            x = x * kept / (1 - self.drop)
        return x


class Block(nn.Module):
    """A MoME Transformer block: Eq. (1) and (2)."""

    def __init__(self, config, layer):
        super().__init__()
        fuses = layer >= config.layers - config.vl_layers  # one of the F top layers
        drop = config.drop_path * layer / max(config.layers - 1, 1)
        modalities = ("language", "vision", "vl") if fuses else ("language", "vision")
        names = modalities if config.experts == "mome" else ("shared",)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.attention = Attention(config, separate=config.attention == "separate" and not fuses)
        self.experts = Router({name: Expert(config) for name in names})
        self.attention_branch, self.expert_branch = Branch(config, drop), Branch(config, drop)

    def forward(self, x, kind, T, mask=None, positions=None, rows=None):
        """x (B, S, D) → (B, R, D): the first `rows` rows (None: all), each of which attended to all
        S."""
        y = self.attention(self.norm(x), kind, T, mask, positions, rows)
        x = x[:, :rows] + self.attention_branch(y)  # Eq. (1)
        x = x + self.expert_branch(self.experts(x, kind, T))  # Eq. (2); each expert has its own LN
        return x


class MoME(nn.Module):
    """The trunk: embeddings, L blocks, final norm; one path for image-only, text-only and pair
    inputs.

    `rows` in the three encoders: how many leading rows the last block computes (None: all). A
    caller that reads only [CLS] passes 1, one that reads only a pair's text passes T; the last
    block then skips all other rows.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, side = config.dim, config.image_size // config.patch_size
        self.words = nn.Embedding(config.vocab_size, D)
        self.text_norm = nn.LayerNorm(D, eps=1e-12)  # BERT's
        self.patches = nn.Conv2d(3, D, config.patch_size, stride=config.patch_size)
        self.image_cls = embedding(config, D)
        self.types = embedding(config, 3, D)  # text, image, the second image of NLVR2
        if config.position == "absolute":
            self.text_position = embedding(config, config.max_text_len, D)
            self.image_position = embedding(config, 1 + side * side, D)
        else:
            with torch.device("cpu"):  # indices have values even where the model is built on device "meta"
                text, image, size = relative_index(config.max_text_len, side, config.text_reach)
            self.register_buffer("text_index", text, persistent=False)
            self.register_buffer("image_index", image, persistent=False)
            self.relative_table = nn.Parameter(torch.zeros(size, config.heads * config.layers))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        initialise(self, config)

    def embed_words(self, text):
        """Text input representations of Section 3.1. text (B, T) int64 → (B, T, D)."""
        x = self.words(text)
        if self.config.position == "absolute":
            x = x + self.text_position[: text.shape[1]]
        x = F.dropout(self.text_norm(x), self.config.drop_path, self.training)  # as released
        return x + self.types[0]

    def embed_patches(self, image, image_type, masked=None, mask_embedding=None):
        """Image input representations of Section 3.1. image (B, 3, side, side) → (B, 1+N, D).
        image_type: row of `types`; the rest as in encode_image."""
        if not image.is_floating_point():  # uint8: normalised here, on the device
            image = image.to(self.types.dtype) / 127.5 - 1
        x = self.patches(image).flatten(2).transpose(1, 2)  # (B, N, D)
        if masked is not None:
            x = torch.where(masked[..., None], mask_embedding.to(x.dtype), x)
        x = torch.cat([self.image_cls.expand(len(x), 1, -1), x], dim=1)  # (B, 1+N, D)
        if self.config.position == "absolute":
            x = x + self.image_position
        return x + self.types[image_type]

    def encode_image(self, image, rows=None, masked=None, mask_embedding=None):
        """image (B, 3, side, side): uint8, or float and normalised already → (B, 1+N, D) after the
        final norm.

        masked (B, N) bool, True = hidden: `mask_embedding` (D,) stands in for the patch (stage
        image).
        """
        return self.encode_rows(self.embed_patches(image, 1, masked, mask_embedding), "image", 0, None, rows)

    def encode_text(self, text, mask, rows=None):
        """text (B, T) int64, mask (B, T), True = real token → (B, T, D) after the final norm."""
        return self.encode_rows(self.embed_words(text), "text", text.shape[1], mask, rows)

    def encode_pair(self, text, mask, image, image_type=1, rows=None):
        """text, mask (B, T) and image (B, 3, side, side) as above → (B, T+1+N, D) after the final
        norm, text first.

        image_type 2 is NLVR2's second image.
        """
        text, image = self.embed_words(text), self.embed_patches(image, image_type)
        mask = F.pad(mask, (0, image.shape[1]), value=True)  # (B, T+1+N)
        return self.encode_rows(torch.cat([text, image], dim=1), "pair", text.shape[1], mask, rows)

    def encode_rows(self, x, kind, T, mask, rows=None):
        """Embedded rows x (B, S, D) of an input of `kind`, the first T of them text, mask (B, S)
        bool or None → (B, R, D) after the final norm."""
        keys = None if mask is None else mask[:, None, None]  # (B, 1, 1, S)
        for block, positions in zip(self.blocks, self.positions(kind, T)):
            x = block(x, kind, T, keys, positions, rows if block is self.blocks[-1] else None)
        return self.norm(x)

    def positions(self, kind, T):
        """For each layer None, or its relative table (H, P) and the index (S, S) of each (query, key)."""
        if self.config.position == "absolute":
            return [None] * len(self.blocks)
        index = self.image_index if kind == "image" else self.text_index[:T, :T]
        if kind == "pair":
            index = pair_index(index, self.image_index)
        tables = self.relative_table.T.contiguous().unflatten(0, (len(self.blocks), -1))  # (L, H, P)
        return [(table, index) for table in tables]


def embedding(config, *shape):
    """A learned embedding of type, position or [CLS]."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=config.init_std))


def initialise(root, config):
    """Initialises all matrices below `root` from a normal distribution, and their biases with zero.
    Norms keep their ones and zeros. (trunc_normal_ cuts at ±2, which is 40 standard deviations or
    more.)"""
    for module in root.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=config.init_std)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return root


class VLMo(MoME):
    """The trunk with the heads of the pre-training tasks (Section 3.3)."""

    def __init__(self, config):
        super().__init__(config)
        D = config.dim
        self.itc_image = nn.Linear(D, D, bias=False)
        self.itc_text = nn.Linear(D, D, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # ln(1/σ) of Eq. (4)
        self.pooler = nn.Linear(D, D)
        self.itm_head = nn.Linear(D, 2)  # class 1 = matched
        self.mlm_head = nn.Sequential(
            nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D, eps=1e-12), nn.Linear(D, config.vocab_size)
        )
        for head in (self.itc_image, self.itc_text, self.pooler, self.itm_head, self.mlm_head):
            initialise(head, config)

    def embed_image(self, image):
        """image (B, 3, side, side) → unit vectors ĥᵛ (B, D), at least float32: Eq. (3)."""
        return unit(self.itc_image(self.encode_image(image, rows=1)[:, 0]))

    def embed_text(self, text, mask):
        """text, mask (B, T) → unit vectors ĥʷ (B, D), at least float32: Eq. (3)."""
        return unit(self.itc_text(self.encode_text(text, mask, rows=1)[:, 0]))

    def scale(self):
        """1/σ of Eq. (4), at most 100: the parameter is clamped, so that its gradient never vanishes."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(100))
        return self.logit_scale.exp()

    def pool(self, states):
        """states (B, ·, D) of pairs → (B, D): what the ITM, VQA and NLVR2 heads read of [T_CLS]."""
        return torch.tanh(self.pooler(states[:, 0]))

    def match(self, text, mask, image):
        """text, mask, image as in encode_pair → logits (B, 2) of ITM, class 1 = matched."""
        return self.itm_head(self.pool(self.encode_pair(text, mask, image, rows=1)))


class MIMHead(nn.Module):
    """What only stage image needs: the embedding of masked patches, and their classifier over K
    visual tokens (Section 3.4, as in BEiT)."""

    def __init__(self, config, codes):
        super().__init__()
        self.mask_embedding = embedding(config, config.dim)
        self.classifier = nn.Linear(config.dim, codes)
        initialise(self, config)

    def forward(self, states):
        """states (M, D) of masked patches → logits (M, K)."""
        return self.classifier(states)


def classifier(config, inputs, classes):
    """The head of VQA and NLVR2, as released: (n, inputs) → logits (n, classes)."""
    hidden = 2 * config.dim
    head = nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, classes))
    return initialise(head, config)


def in_precision(x):
    """x in the precision of autocast, if that is on: products that read the same x share one copy."""
    kind = x.device.type
    on = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)  # others may not cast at all
    return x.to(torch.get_autocast_dtype(kind)) if on else x


def unit(x):
    """(…, D) → the same directions with length 1, at least float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
