"""The discrete image tokenizer whose codes stage image predicts: a small convolutional discrete
VAE, and its stage.

The paper's come from DALL-E (Section 3.4, by way of BEiT). This one is of the same kind: an encoder
gives each cell of a grid a distribution over a codebook, a decoder makes the image from one code a
cell, and both learn through the Gumbel-softmax relaxation of the draw (Jang et al., 2017).

Shape letters: B batch, W processes, G cells on a side of the grid, N = G² cells, K codes, C
channels.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import data
import drawing
import losses
import sources
from runtime import UserError, at_least, seed_all
from stage import Stage, config_flags

CELL = 8  # pixels on a side that one code stands for, as in DALL-E: images are scaled to 8G × 8G first
COLD = 1 / 16  # the relaxation's temperature falls from 1 to this, geometrically (DALL-E's)


@dataclass(frozen=True)
class DVAEConfig:
    grid: int  # G: as many cells as the image has patches
    codes: int = 8192  # K; DALL-E's number
    width: int = 256  # C


class Residual(nn.Sequential):
    """x + convolutions of x, (B, C, G, G)."""

    def __init__(self, C):
        super().__init__(nn.ReLU(), nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.Conv2d(C, C, 1))

    def forward(self, x):
        return x + super().forward(x)


class Tokenizer(nn.Module):
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
        """image (B, 3, S, S) → the likeliest code of each cell, int64 (B, N); in full precision."""
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return self.encoder(self.pixels(image)).argmax(1).flatten(1)

    def decode(self, codes):
        """codes (B, N) int64 → image (B, 3, 8G, 8G), about −1 … 1."""
        return self._decode(self.codebook(codes))

    def forward(self, image, temperature):
        """image (B, 3, S, S) → pixels, their reconstruction (B, 3, 8G, 8G), logits of codes (B, N, K)."""
        pixels = self.pixels(image)
        logits = self.encoder(pixels).flatten(2).transpose(1, 2)  # (B, N, K)
        drawn = F.gumbel_softmax(logits.float(), temperature)  # (B, N, K): nearly one-hot when cold
        return pixels, self._decode(drawn @ self.codebook.weight), logits

    def _decode(self, x):
        return self.decoder(x.transpose(1, 2).unflatten(2, (self.config.grid, -1)))  # (B, N, C) → (B, 3, 8G, 8G)


def dvae_losses(pixels, reconstruction, logits):
    """The two sides of the evidence bound, as one process's part of means over all (losses.py).

    pixels, reconstruction (b, 3, ·, ·); logits (b, N, K) → {"reconstruction": mean squared error,
    "kl": nats}. The bound's KL(q(z|x) ‖ uniform) is, on average, what a code says about its image
    plus KL(q(z) ‖ uniform) of the codebook's use over all images; only the second is penalised
    here: a code should say much about its image, and all codes should be used.
    """
    posterior = logits.float().softmax(-1).flatten(0, 1).mean(0, keepdim=True)  # (1, K)
    used = losses.gather(posterior).mean(0)  # (K,): q(z) of the global batch
    kl = (used * used.clamp(min=1e-20).log()).sum() + math.log(len(used))
    return {"reconstruction": F.mse_loss(reconstruction.float(), pixels), "kl": kl}


def codebook_use(counts):
    """counts (K,): how often each code serves → how many do, and their perplexity, exp(entropy)."""
    share = counts.double() / counts.sum()
    return int((share > 0).sum()), math.exp(-(share * share.clamp(min=1e-20).log()).sum().item())


# ---- The stage -----------------------------------------------------------------------------------


class DVAE(Stage):
    """The tokenizer of stage image: reconstruction, and the use of the codebook."""

    unit, betas, weight_decay, decay = "images", (0.9, 0.99), 0.0, "cosine"
    recipe = {
        "tiny": dict(batch_size=32, steps=400, warmup=50, lr=3e-3, clip=1.0, save_every=100, codes=256, width=128),
        "base": dict(batch_size=512, steps=20_000, warmup=1000, lr=1e-3, clip=1.0, codes=8192, width=256),
    }

    @staticmethod
    def flags(parser, base):
        group = parser.add_argument_group("stage dvae")
        group.add_argument("--codes", type=at_least(2), metavar="K", help="size of the codebook")
        group.add_argument("--width", type=at_least(1), metavar="C", help="channels")
        group.add_argument("--kl-weight", type=at_least(0.0), default=0.002, metavar="W", help="of the codebook's use")
        data.flags(parser, images="crop")
        config_flags(parser, base, ("image_size", "patch_size"))

    def __init__(self, args, config, start, run):
        super().__init__()
        self.steps, self.image_size = args.steps, config.image_size
        self.loss_weights = {"reconstruction": 1.0, "kl": args.kl_weight}
        self.sources = sources.read_pictures(args, config.image_size)
        seed_all(args.seed)
        self.model = Tokenizer(DVAEConfig(config.image_size // config.patch_size, args.codes, args.width))
        if start:
            checkpoint.load_exactly(self.model, start.tensors, start.path)
        self.samples = [data.Images(self.sources["train"], self.image_size, args)]

    def forward(self, batch):
        """batch: image (b, 3, S, S)."""
        temperature = COLD ** (self.step / self.steps)
        pixels, reconstruction, logits = self.model(batch["image"], temperature)
        out = dvae_losses(pixels, reconstruction, logits)
        used = torch.zeros(1, logits.shape[-1], device=logits.device)  # (1, K)
        used.index_fill_(1, logits.argmax(-1).flatten(), 1)
        out["codes"] = losses.gather(used).amax(0).sum()  # used in this batch
        return out

    @torch.no_grad()
    def measure(self, split, device):
        """How many codes are used, their perplexity, and the mean squared error of reconstructions
        from codes only (pixels in −1 … 1)."""
        self.eval()
        source = self.sources[split]
        used = torch.zeros(self.model.config.codes, dtype=torch.float64, device=device)
        error = torch.zeros(1, dtype=torch.float64, device=device)
        for image in data.pictures(source, data.sample_batches(len(source)), self.image_size, device):
            codes = self.model.encode(image)
            used += torch.bincount(codes.flatten(), minlength=len(used))
            error += (self.model.decode(codes) - self.model.pixels(image)).square().mean((1, 2, 3)).sum()
        error, *used = losses.over_processes(torch.cat([error, used]))
        serving, perplexity = codebook_use(torch.tensor(used))
        return {"codes": serving, "perplexity": perplexity, "error": error / min(len(source), 10_000)}

    @torch.no_grad()
    def draw(self, device):
        """Images, above their reconstructions from codes only."""
        source = self.sources[self.measured()[-1]]
        [image] = data.pictures(source, [range(min(8, len(source)))], self.image_size, device)
        pixels = self.model.pixels(image)
        rows = [("images", pixels), ("reconstructed from their codes", self.model.decode(self.model.encode(pixels)))]
        tiles = [(title, [drawing.tile(drawing.from_tensor(one), side=96) for one in shown]) for title, shown in rows]
        return {"reconstructions.png": drawing.sheet(tiles)}


def read(path):
    """A checkpoint of stage dvae → {"config", "model"}, what stage image keeps of it."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; python train.py --stage dvae makes one (or name one with --dvae)")
    found = checkpoint.read(path)
    if found.stage != "dvae":
        raise UserError(f"{path} was written by stage {found.stage}, not by stage dvae")
    return {"config": found.config, "model": found.tensors}


def build(kept):
    """The tokenizer of what read() returned, frozen."""
    tokenizer = Tokenizer(DVAEConfig(**kept["config"])).requires_grad_(False)
    tokenizer.load_state_dict(kept["model"])
    return tokenizer
