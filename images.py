"""Images: reading them, the views of training, and which patches are hidden (Sections 3.4, 4.1).

Shape letters: N patches, S side of an image in pixels.
"""

import io
import math
import struct
import warnings

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from reading import MALFORMED
from runtime import UserError


class Unreadable(UserError):
    """An image file that cannot be read."""


# ---- Reading ---------------------------------------------------------------------------------------

# What Pillow raises on broken files, depending on their format
UNREADABLE = (*MALFORMED, SyntaxError, struct.error, Image.DecompressionBombError)
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as large is an error
GRAY = (128, 128, 128)


def read_image(path, view=None, at=None):
    """RGB, turned as its EXIF data says; transparent parts become white, and gray values of more
    than 8 bit are scaled by their range. Unreadable, with the path, if it is no image.

    view: None, or the side of the training view that is made of it: then a JPEG file is decoded at
    a half, a quarter or an eighth of its size, if that is enough. at: where an image in a shard is,
    (file, offset, size).
    """
    try:
        shard, offset, size = at or (path, 0, -1)
        with open(shard, "rb") as file:
            file.seek(offset)
            content = io.BytesIO(file.read(size))
        with Image.open(content) as image:
            if view:
                shortest = min(*image.size, math.sqrt(AREA * image.width * image.height / ASPECT))  # of a crop
                enough = view * ENLARGED / shortest
                image.draft(None, (math.ceil(enough * image.width), math.ceil(enough * image.height)))
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                image = to_8_bit(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UNREADABLE as error:
        reason = str(error).partition(" <")[0]  # without Pillow's name of the BytesIO
        raise Unreadable(f"{path} cannot be read: {reason}") from None


def to_tensor(image):
    """RGB image → uint8 (3, S, S)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_8_bit(image):
    """An image of one channel with other values than 0 … 255 → the same from black to white."""
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("its values are not finite")
    return Image.fromarray(np.uint8(255 * (values - low) / max(high - low, 1e-300)))


def read_images(paths, size):
    """Image files as a model sees them: uint8 (n, 3, size, size). Unreadable if one is no image."""
    return torch.stack([to_tensor(resize(read_image(path), size)) for path in paths])


def resize(image, size, **how):
    return image.resize((size, size), Image.Resampling.BICUBIC, **how)


# ---- Augmentation in Pillow (Section 4.1) ----------------------------------------------------------


AREA, ASPECT = 0.5, 4 / 3  # of a crop: its smallest share of the image's area, its largest ratio of sides
GAP = 2.0  # a large image is averaged to twice the size of a view before it is resized exactly
ENLARGED = 0.75  # of a view's side: what the smallest crop of a JPEG decoded at reduced size has at least


def random_resized_crop(image, size, rng):
    """A crop of 50–100 % of the area and of 3:4 to 4:3, resized to a square."""
    return resize(image, size, box=crop_box(*image.size, rng), reducing_gap=GAP)


def crop_box(width, height, rng):
    """→ (left, upper, right, lower) of a crop; of very long or tall images None, which is all."""
    for _ in range(10):
        target = rng.uniform(AREA, 1) * width * height
        ratio = math.exp(rng.uniform(-math.log(ASPECT), math.log(ASPECT)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if w <= width and h <= height:
            x, y = rng.randint(0, width - w), rng.randint(0, height - h)
            return x, y, x + w, y + h
    return None


def affine(image, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    """The image at (a·x + b·y + c, d·x + e·y + f). A move by whole pixels needs no interpolation."""
    moved = (a, b, d, e) == (1, 0, 0, 1) and c.is_integer() and f.is_integer()
    filter = Image.Resampling.NEAREST if moved else Image.Resampling.BILINEAR
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), filter, fillcolor=GRAY)


def moved_by(side, level):
    """How many pixels a translation moves an image: at level 1, 10 of 224."""
    return round(10 / 224 * side * level, 6)  # without rounding errors, so that affine sees whole numbers


OPERATIONS = {  # RandAugment's (image, level 0 … 1, sign ±1), without those that change a color's name
    "identity": lambda image, level, sign: image,
    "auto-contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "brightness": lambda image, level, sign: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * level),
    "sharpness": lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * level),
    "shear-x": lambda image, level, sign: affine(image, b=0.3 * level * sign),
    "shear-y": lambda image, level, sign: affine(image, d=0.3 * level * sign),
    "translate-x": lambda image, level, sign: affine(image, c=moved_by(image.width, level) * sign),
    "translate-y": lambda image, level, sign: affine(image, f=moved_by(image.height, level) * sign),
    "rotate": lambda image, level, sign: image.rotate(30 * level * sign, Image.Resampling.BILINEAR, fillcolor=GRAY),
}


def rand_augment(image, rng):
    """RandAugment(2, 7): two operations, drawn with replacement, at magnitude 7 of 10."""
    for operation in rng.choices(list(OPERATIONS.values()), k=2):
        image = operation(image, 0.7, rng.choice((-1, 1)))
    return image


AUGMENTATIONS = ("none", "crop", "randaugment")


def augment(image, size, rng, kind="randaugment", flip=False):
    """A training view (S, S): "none" (resized), "crop" (random resized crop), "randaugment" (crop,
    then two operations). flip: half of them are mirrored."""
    image = resize(image, size) if kind == "none" else random_resized_crop(image, size, rng)
    if flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return rand_augment(image, rng) if kind == "randaugment" else image


# ---- Blockwise masking (Section 3.4, as in BEiT) -------------------------------------------------

MASKED, SMALLEST = 75 / 196, 16 / 196  # of all patches: how many are hidden, and the smallest block


def mask_blocks(side, rng):
    """Which of side × side patches are hidden: (N,) bool, row by row, True = hidden.

    Blocks of random size, 3:1 to 1:3, at random places, each with at least SMALLEST of the grid,
    until MASKED of it is hidden (rounded up or down at random, so that small grids have their
    share) and never more: a block that would add more, or nothing, is drawn again, a hundred times
    at most.
    """
    wanted, smallest = int(MASKED * side * side + rng.random()), max(1, round(SMALLEST * side * side))
    hidden = np.zeros((side, side), dtype=bool)
    for _ in range(100):
        missing = wanted - int(hidden.sum())
        if not missing:
            break
        area = rng.uniform(smallest, max(smallest, missing))
        aspect = math.exp(rng.uniform(-math.log(3), math.log(3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h * w < smallest or max(h, w) > side:
            continue
        y, x = rng.randint(0, side - h), rng.randint(0, side - w)
        added = h * w - int(hidden[y : y + h, x : x + w].sum())
        if 0 < added <= missing:
            hidden[y : y + h, x : x + w] = True
    return torch.from_numpy(hidden.flatten())
