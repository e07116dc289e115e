"""The step of stage vl as a textbook has it: what stages.VL computes fast, and must equal.

Shape letters as in losses.py; T text tokens, N patches, S rows of a sequence, H heads.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

import losses
from mome import Router, unit
from relative import scores_of
from stage import Stage
from texts import IGNORE


class Textbook(Stage):
    """The step of stage vl the obvious way: the same parameters and losses, but every pass by
    itself, its text padded to full length, all rows through all of every layer, the vocabulary head
    on every token, attention written out, and the images of all processes gathered. stages.VL is
    measured against it, and must equal it."""

    def forward(self, batch):
        image, text, mask, labels = (batch[name] for name in ("image", "text", "mask", "labels"))
        out = {}

        # Image-text contrast: Eq. (3) and (4)
        same = losses.same_pairs(batch["ids"])  # (b, B)
        i2t = t2i = torch.zeros(same.shape, device=same.device)
        if "itc" in self.loss_weights:
            vectors = self.embed_image(image), self.embed_text(text, mask)
            i2t, t2i = losses.similarities(*vectors, self.model.scale())
            out["itc"] = losses.itc_loss(i2t, t2i, same)

        # Masked language modeling
        if "mlm" in self.loss_weights:
            states = self.encode_pair(batch["masked"], mask, image)[:, : text.shape[1]]  # (b, T, D)
            logits, at = self.model.mlm_head(states), labels != IGNORE  # (b, T, V), (b, T)
            out["mlm"] = losses.masked_token_loss(logits[at], labels[at], at.sum())

        # Image-text matching, with a hard negative for each text and for each image
        if "itm" in self.loss_weights:
            self.seed()
            candidate = losses.candidates(same, self.negatives)
            drawn_image, _, image_found = losses.draw_negatives(t2i, candidate)
            drawn_text, _, text_found = losses.draw_negatives(i2t, candidate)
            wrong_image = losses.gather(image)[drawn_image]
            wrong_text = losses.gather(text)[drawn_text]
            wrong_mask = losses.gather(mask.long()).bool()[drawn_text]
            matched = self.itm_logits(text, mask, image)
            with_wrong_image = self.itm_logits(text, mask, wrong_image)
            with_wrong_text = self.itm_logits(wrong_text, wrong_mask, image)
            logits = torch.cat([matched, with_wrong_image, with_wrong_text])  # (3b, 2)
            right = torch.arange(len(logits), device=same.device) < len(image)
            found = torch.cat([torch.ones_like(image_found), image_found, text_found])
            out["itm"] = losses.itm_loss(logits, right, found, found.sum())
        return out

    def embed_image(self, image):
        states = self.encode(self.model.embed_patches(image, 1), "image", 0)
        return unit(self.model.itc_image(states[:, 0]))

    def embed_text(self, text, mask):
        states = self.encode(self.model.embed_words(text), "text", text.shape[1], mask)
        return unit(self.model.itc_text(states[:, 0]))

    def itm_logits(self, text, mask, image):
        return self.model.itm_head(self.model.pool(self.encode_pair(text, mask, image)))

    def encode_pair(self, text, mask, image):
        x = torch.cat([self.model.embed_words(text), self.model.embed_patches(image, 1)], dim=1)
        return self.encode(x, "pair", text.shape[1], mask)

    def encode(self, x, kind, T, mask=True):
        """Embedded rows x (b, S, D), the first T of them text, through all layers and the norm."""
        keys = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)  # (b, S), True = read
        keys[:, :T] = mask
        keys, bias = keys[:, None, None], [0.0] * len(self.model.blocks)
        if self.model.config.position == "relative":
            bias = [scores_of(*positions) for positions in self.model.positions(kind, T)]  # (H, S, S) each
        for block, layer_bias in zip(self.model.blocks, bias):
            y, _ = attention(block.attention, block.norm(x), kind, T, keys, layer_bias)
            x = x + block.attention_branch(y)
            experts = {name: partial(feed_forward, block.experts[name]) for name in block.experts}
            x = x + block.expert_branch(Router.forward(experts, x, kind, T))
        return self.model.norm(x)


def attention(layer, x, kind, T, keys, bias):
    """P·v with P = softmax(q·k/√(D/H) + bias), as it is written → (b, S, D), and P itself (b, H, S, S).

    layer: an Attention. keys (b, 1, 1, S), True = may be read.
    """
    q, k, v = (router(x, kind, T) for router in (layer.query, layer.key, layer.value))  # (b, S, D)
    q, k, v = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for y in (q, k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # (b, H, S, S)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) + bias
    probabilities = scores.masked_fill(~keys, -math.inf).softmax(-1).to(v.dtype)
    return layer.out((probabilities @ v).transpose(1, 2).flatten(2), kind, T), probabilities


def feed_forward(expert, x):
    """FC2(GELU(FC1(LN(x)))), as it is written."""
    return expert.fc2(F.gelu(expert.fc1(expert.norm(x))))
