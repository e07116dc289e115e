"""Positions of a checkpoint at another resolution or text length, absolute and relative.

Shape letters: w patches on a side, C channels, R rows of the relative-position table, L layers, H heads.
"""

import torch
import torch.nn.functional as F


def fitted(name, tensor, old, fresh, new):
    """A tensor of a checkpoint of Config `old` for a model of Config `new`, in which it is `fresh`
    → tensor, and whether it is unchanged."""
    old_side, side = (config.image_size // config.patch_size for config in (old, new))
    if name == "image_position" and old_side != side:
        patches = resample(tensor[1:].view(old_side, old_side, -1), side)
        return torch.cat([tensor[:1], patches.flatten(0, 1)]), False
    if name == "text_position" and old.max_text_len != new.max_text_len:
        return torch.cat([tensor, fresh[len(tensor) :]])[: len(fresh)], False  # beyond the old length: fresh
    if name == "relative_table" and (old_side != side or old.text_reach != new.text_reach):
        return fit_table(tensor, old_side, side, old.text_reach, new.text_reach), False
    return tensor, True


def resample(grid, side):
    """grid (w, w, C) → (side, side, C), bicubic."""
    grid = grid.permute(2, 0, 1)[None].float()
    return F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)


def fit_table(table, old_side, side, old_reach, reach):
    """A relative-position table (R, L·H) at another resolution (patch offsets resampled, as
    released) and another reach of the text (words farther apart than the table knows are treated
    like the farthest that it knows)."""
    old_span = 2 * old_side - 1
    I = old_span**2 + 3
    patches = table[: I - 3]
    if old_side != side:
        grid = patches.view(old_span, old_span, -1).double()
        # `spline` maps values at `places` to values at `targets` of the cubic spline through them (with
        # not-a-knot ends); beyond the outermost place the value there holds
        places = geometric_places(old_side, side)
        targets = torch.arange(1 - side, side).to(places).clamp(places[0], places[-1])
        at_places, at_targets = spline_basis(places, places), spline_basis(targets, places)
        spline = torch.linalg.solve(at_places, at_targets, left=False)  # (2·side − 1, 2w − 1)
        patches = torch.einsum("yi, xj, ijc -> yxc", spline, spline, grid).flatten(0, 1).to(table)
    farthest = old_reach - 2  # text positions 1 … reach−1 are words
    distance = torch.arange(-reach + 1, reach).clamp(-farthest, farthest)
    words = table[I + old_reach + distance]
    words[0], words[-1] = table[I + 1], table[-3]  # not words: image → text, [T_CLS] → word
    return torch.cat([patches, table[I - 3 : I + 1], words, table[-2:]])


def geometric_places(old_side, side):
    """Where the offsets 1 − w … w − 1 of the old table lie among those of the new one, (2w − 1,):
    ±k at ±(1 + q + … + q^(k−1)), so that direct neighbours stay neighbours, and q in 1.01 … 1.5
    such that the farthest reach each other (BEiT)."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        too_far = sum(q**k for k in range(old_side - 1)) > side - 1
        low, high = (low, q) if too_far else (q, high)
    places = torch.tensor([0.0, *(q**k for k in range(old_side - 1))], dtype=torch.float64).cumsum(0)
    return torch.cat([-places[1:].flip(0), places])


def spline_basis(x, places):
    """n functions that span the cubic splines with knots at all places but two at each end, at x:
    (m, n). They are scaled to −1 … 1."""
    scale = max(places[-1].item(), 1.0)
    x, places = x[:, None] / scale, places / scale
    powers = x ** torch.arange(min(4, len(places)))
    return torch.cat([powers, (x - places[2:-2]).clamp(min=0) ** 3], dim=1)
