"""From one checkpoint's tensors to another model: what is taken, resampled, copied, or starts fresh.

Shape letters: D dim, H heads, L layers, w patches on a side of the image, T text positions; I as in relative_index.

Tensors come in *groups*, which are learned, saved and taken as a whole: a module of the trunk or a head by its name;
of the blocks a modality's experts, or the norms, …, of all layers together ("blocks.*.experts.language").
"""

import collections

import torch
import torch.nn.functional as F

import runtime

# No tensor can be fitted to another one of these (LayerScale: whether there is any).
FIXED = ("dim", "layers", "heads", "patch_size", "position", "experts", "attention", "layer_scale")
MODALITIES = ("shared", "vision", "language", "vl")

# What a file may lack, because its stage did not learn it: the rest of the trunk is in every file.
OPTIONAL = {"words", "text_norm", "text_position", "itc_image", "itc_text", "logit_scale", "pooler", "itm_head",
            "mlm_head", "blocks.*.experts.language", "blocks.*.experts.vl", "blocks.*.attention.language"}  # fmt: skip


def group(name):
    """The group of a tensor by its name in the state dict."""
    first, *rest = name.split(".")
    if first != "blocks":
        return first
    modality = [part for part in rest if part in MODALITIES]
    return ".".join(["blocks.*", rest[1], *modality])


def groups(names):
    """Names of tensors → their groups, each once, in order."""
    return list(dict.fromkeys(map(group, names)))


def learned(model, taken):
    """The part of the state dict to save: groups in `taken`, those that train now, and what every file has."""
    kept = set(taken) | set(groups(name for name, p in model.named_parameters() if p.requires_grad))
    return {name: t for name, t in model.state_dict().items() if group(name) in kept or group(name) not in OPTIONAL}


def fit(model, tensors, config, path):
    """Loads what another checkpoint learned (its tensors and Config) → {group: how}, in the model's order.

    how is "taken"; "resampled", for positions at another resolution or text length; "copied", for experts (and separate
    attention) of language and vl that the file lacks and the vision ones stand in for; or "fresh", left as they are.
    UserError where the architectures differ, or the file lacks or has a tensor that it should not.
    """
    for name in FIXED:
        there, here = vars(config)[name], vars(model.config)[name]
        if there != here and (name != "layer_scale" or not there or not here):
            advice = "leave the flags of the architecture away, or start from another file"
            raise runtime.UserError(f"{path} has {name} {there}, and this run {here}: {advice}")
    own, how = model.state_dict(), {}
    present = set(groups(tensors))
    state = {}
    for name, tensor in own.items():
        vision = vision_name(name)
        if name in tensors:
            state[name], same = fitted(name, tensors[name], config, tensor, model.config)
            how[group(name)] = "taken" if same else "resampled"
        elif group(name) in present or group(name) not in OPTIONAL:
            raise runtime.UserError(f"{path} lacks {name}")
        elif vision in tensors:
            state[name] = tensors[vision]
            how[group(name)] = "copied"
        else:
            state[name] = tensor
            how[group(name)] = "fresh"
        if state[name].shape != tensor.shape:
            there, here = tuple(state[name].shape), tuple(tensor.shape)
            raise runtime.UserError(f"{path} is of another shape: {name} is {there} there and {here} here")
    for name in tensors:
        if name not in own:
            raise runtime.UserError(f"{path} has {name}, and this model does not: is --vl-layers another?")
    model.load_state_dict(state)
    return how


def load_exactly(module, tensors, path):
    """Loads a state dict of just this module's names and shapes. UserError that names the first which differs."""
    own = module.state_dict()
    for name in own | tensors:
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            shape = lambda state: tuple(state[name].shape) if name in state else "missing"
            raise runtime.UserError(
                f"{path} is of another shape: {name} is {shape(tensors)} there and {shape(own)} here"
            )
    module.load_state_dict(tensors)


def vision_name(name):
    """The name of the vision expert's (or projection's) tensor that a language or vl one starts from."""
    parts = ["vision" if part in ("language", "vl") else part for part in name.split(".")]
    return ".".join(parts)


def report(how):
    """{group: how} as lines for the user."""
    lines = collections.defaultdict(list)
    for name, what in how.items():
        lines[what].append(name)
    return "\n".join(f"  {what}: {', '.join(names)}" for what, names in lines.items())


# ---- Positions -------------------------------------------------------------------------------------------------------


def fitted(name, tensor, old, fresh, new):
    """A tensor of a checkpoint of Config `old` for a model of Config `new`, where it is `fresh` → tensor, unchanged?"""
    sides = [config.image_size // config.patch_size for config in (old, new)]
    if name == "image_position" and sides[0] != sides[1]:
        patches = resample(tensor[1:].view(sides[0], sides[0], -1), sides[1])
        return torch.cat([tensor[:1], patches.flatten(0, 1)]), False
    if name == "text_position" and old.max_text_len != new.max_text_len:
        return torch.cat([tensor, fresh[len(tensor) :]])[: len(fresh)], False  # beyond the old length: fresh
    if name == "relative_table" and (sides[0] != sides[1] or old.text_reach != new.text_reach):
        return fit_table(tensor, sides, old.text_reach, new.text_reach), False
    return tensor, True


def resample(grid, side):
    """grid (w, w, C) → (side, side, C), bicubic."""
    grid = grid.permute(2, 0, 1)[None].float()
    return F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)


def fit_table(table, sides, old_reach, new_reach):
    """A relative-position table (R, L·H) at another resolution (patch offsets resampled) and another reach of the text
    (farther words stand to each other as the farthest that the table knows)."""
    spans = [2 * side - 1 for side in sides]
    I = spans[0] ** 2 + 3
    patches = resample(table[: I - 3].view(spans[0], spans[0], -1), spans[1]).flatten(0, 1)
    farthest = old_reach - 2  # text positions 1 … reach−1 are words
    distance = torch.arange(-new_reach + 1, new_reach).clamp(-farthest, farthest)  # unused at both ends
    words = table[I + old_reach + distance]
    words[0], words[-1] = table[I + 1], table[-3]
    return torch.cat([patches, table[I - 3 : I + 1], words, table[-2:]])
