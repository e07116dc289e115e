"""The discrete image tokenizer whose codes stage image predicts: a small convolutional discrete VAE.

The paper's come from DALL-E (Section 3.4, by way of BEiT). This one is of the same kind: an encoder gives each cell of
a grid a distribution over a codebook, a decoder makes the image from one code a cell, and both learn through the
Gumbel-softmax relaxation of the draw (Jang et al., 2017).

Shape letters: B batch, W processes, G cells on a side of the grid, N = G² cells, K codes, C channels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import losses

CELL = 8  # pixels on a side that one code stands for, as in DALL-E: images are scaled to 8G × 8G first
HOT, COLD = 1.0, 1 / 16  # the relaxation's temperature at the start and at the end of training (DALL-E's)


@dataclass(frozen=True)
class DVAEConfig:
    """Raises ValueError for a codebook or grid that is none."""

    grid: int  # G: as many cells as the image has patches
    codes: int = 8192  # K; DALL-E's number
    width: int = 256  # C

    def __post_init__(self):
        if self.grid < 1 or self.codes < 2 or self.width < 1:
            raise ValueError(f"a dVAE needs a grid of at least 1, 2 codes and 1 channel: {self}")


class Residual(nn.Sequential):
    """x + convolutions of x, (B, C, G, G)."""

    def __init__(self, C):
        super().__init__(nn.ReLU(), nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.Conv2d(C, C, 1))

    def forward(self, x):
        return x + super().forward(x)


class DVAE(nn.Module):
    """encode: image → codes. decode: codes → image. forward: what dvae_losses learns from."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, K = config.width, config.codes
        self.encoder = nn.Sequential(
            nn.Conv2d(3, C, 4, stride=4), nn.ReLU(), nn.Conv2d(C, C, 4, stride=2, padding=1),
            Residual(C), Residual(C), nn.Conv2d(C, K, 1)
        )  # fmt: skip
        self.codebook = nn.Embedding(K, C)
        self.decoder = nn.Sequential(
            Residual(C), Residual(C),
            nn.ConvTranspose2d(C, C, 4, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(C, 3, 4, stride=4)
        )  # fmt: skip

    def pixels(self, image):
        """image (B, 3, S, S), uint8, or float and normalised already → (B, 3, 8G, 8G) in −1 … 1."""
        side = CELL * self.config.grid
        if not image.is_floating_point():
            image = image.float() / 127.5 - 1
        if image.shape[-1] != side:
            image = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
        return image

    def encode(self, image):
        """The likeliest code of each cell, row by row, in full precision. image (B, 3, S, S) → (B, N) int64."""
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return self.encoder(self.pixels(image)).argmax(1).flatten(1)

    def decode(self, codes):
        """codes (B, N) int64 → image (B, 3, 8G, 8G), about −1 … 1."""
        return self._decode(self.codebook(codes))

    def forward(self, image, temperature):
        """image (B, 3, S, S) → pixels and their reconstruction (B, 3, 8G, 8G), logits (B, N, K) of the codes."""
        pixels = self.pixels(image)
        logits = self.encoder(pixels).flatten(2).transpose(1, 2)  # (B, N, K)
        drawn = F.gumbel_softmax(logits.float(), temperature)  # (B, N, K): nearly one-hot when cold
        return pixels, self._decode(drawn @ self.codebook.weight), logits

    def _decode(self, x):
        return self.decoder(x.transpose(1, 2).unflatten(2, (self.config.grid, -1)))  # (B, N, C) → (B, 3, 8G, 8G)


def temperature(progress):
    """Of the relaxation, falling geometrically. progress 0 … 1: the share of training that is done."""
    return HOT * (COLD / HOT) ** progress


def dvae_losses(pixels, reconstruction, logits):
    """The two sides of the evidence bound, as one process's part of means over all (losses.py).

    pixels, reconstruction (b, 3, ·, ·); logits (b, N, K) → {"reconstruction": mean squared error, "kl": nats}.
    The bound's KL(q(z|x) ‖ uniform) is, on average, what a code says about its image plus KL(q(z) ‖ uniform) of the
    codebook's use over all images; only the second is punished here: codes should say much, and all should serve.
    """
    posterior = logits.float().softmax(-1).flatten(0, 1).mean(0, keepdim=True)  # (1, K)
    used = losses.gather(posterior).mean(0)  # (K,): q(z) of the global batch
    kl = (used * used.clamp(min=1e-20).log()).sum() + math.log(len(used))
    return {"reconstruction": F.mse_loss(reconstruction.float(), pixels), "kl": kl}


def codebook_use(counts):
    """counts (K,): how often each code serves → how many do, and their perplexity exp(entropy): K if all do equally."""
    share = counts.double() / counts.sum()
    return int((share > 0).sum()), math.exp(-(share * share.clamp(min=1e-20).log()).sum().item())
