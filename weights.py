"""From one checkpoint's tensors to another model: what is taken, resampled, copied, or starts fresh; and from the
weights that the authors of VLMo and BEiT published to a checkpoint of this project.

    python weights.py vlmo_base_patch16_480_vqa.pt -o vqa.pt --vocab bert-base-uncased-vocab.txt --answers vqa
    python weights.py beit_base_patch16_224_pt22k_ft22kto1k.pth -o beit.pt

Shape letters: D dim, H heads, L layers, w patches on a side of the image, T text positions; I as in relative_index.

Tensors come in *groups*, which are learned, saved and taken as a whole: a module of the trunk or a head by its name;
of the blocks a modality's experts, or the norms, …, of all layers together ("blocks.*.experts.language").
"""

import collections
import dataclasses
import math
import re
import textwrap
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
import runtime
from mome import CONFIGS, NLVR2, VQA, Config, VLMo

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
    """Gives the model what another checkpoint learned (its tensors, themselves, and Config) → {group: how}, in the
    model's order.

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
            state[name] = tensors[vision].clone()
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
    model.load_state_dict(state, assign=True)
    return how


def rebuild(tensors, config, path):
    """The model of a checkpoint's tensors and Config → VLMo, {group: how}. As fit, but only what starts fresh is
    initialised: what is taken takes no memory of its own."""
    with torch.device("meta"):
        model = VLMo(config)
    own, present = model.state_dict(), groups(tensors)
    absent = [name for name in own if group(name) in OPTIONAL.difference(present) and not name.startswith("blocks.")]
    if absent:
        short = VLMo(dataclasses.replace(config, layers=1, vl_layers=0)).state_dict()  # has all that is in no block
        model.load_state_dict(own | {name: short[name] for name in absent}, assign=True)
    return model, fit(model, tensors, config, path)


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


def vocabulary(path, tensors, tokenizer, vocab):
    """The tokenizer of a checkpoint with these tensors, or that of the file `vocab`, which must be the same where there
    are both, and as large as the word embeddings. None: there is neither, and no words have been learned."""
    given, words = vocab and data.load_tokenizer(vocab), tensors.get("words.weight")
    if given and tokenizer and given.get_vocab() != tokenizer.get_vocab():
        raise runtime.UserError(f"--vocab {vocab} is not the vocabulary that {path} was trained with")
    if words is not None and not given and not tokenizer:
        raise runtime.UserError(f"{path} was imported without its vocabulary: give it with --vocab")
    if words is not None and given and given.get_vocab_size() != len(words):
        sizes = f"has {given.get_vocab_size()} entries, and {path} embeds {len(words)}"
        raise runtime.UserError(f"--vocab {vocab} {sizes}: it is another vocabulary")
    return tokenizer or given


def vision_name(name):
    """The name of the vision expert's (or projection's) tensor that a language or vl one starts from."""
    parts = ["vision" if part in ("language", "vl") else part for part in name.split(".")]
    return ".".join(parts)


def describe(how, model):
    """{group: how} → {group: (how, its parameters)}."""
    parameters = collections.Counter()
    for name, tensor in model.state_dict().items():
        parameters[group(name)] += tensor.numel()
    return {name: (what, parameters[name]) for name, what in how.items()}


def report(rows):
    """{name: (how, parameters)} as a table for the user."""
    lines = []
    for what in dict.fromkeys(how for how, _ in rows.values()):
        names = [name for name, (how, _) in rows.items() if how == what]
        start = f"  {what:9} {sum(rows[name][1] for name in names) / 1e6:6.1f} M  "
        lines += textwrap.wrap(", ".join(names), 118, initial_indent=start, subsequent_indent=" " * len(start))
    return "\n".join(lines)


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


# ---- Released files --------------------------------------------------------------------------------------------------

TABLE = "relative_position_bias_table"
TEXT_POSITION = "text_embeddings.position_embeddings.weight"  # the relative files have it, and do not use it
BERT_TYPE = "text_embeddings.token_type_embeddings.weight"

# Our name of a tensor, or of a module, → the file's.
IMAGE = {
    "image_cls": "cls_token",
    "patches": "patch_embed.proj",
    "image_position": "pos_embed",
}
BLOCK = {
    "norm": "norm1",
    "attention.query.shared.weight": "attn.qkv.weight",
    "attention.key.shared.weight": "attn.qkv.weight",
    "attention.value.shared.weight": "attn.qkv.weight",
    "attention.query.shared.bias": "attn.q_bias",
    "attention.value.shared.bias": "attn.v_bias",
    "attention.out.shared": "attn.proj",
    "attention_branch.gamma": "gamma_1",
    "expert_branch.gamma": "gamma_2",
}
BEIT_BLOCK = BLOCK | {"experts.vision.norm": "norm2", "experts.vision": "mlp"}
VLMO_BLOCK = BLOCK | {
    "experts.vision.norm": "norm2_imag",
    "experts.vision": "mlp_imag",
    "experts.language.norm": "norm2_text",
    "experts.language": "mlp_text",
    "experts.vl.norm": "norm2_vl",
    "experts.vl": "mlp_vl",
}
VLMO = {ours: f"transformer.{theirs}" for ours, theirs in (IMAGE | {"norm": "norm"}).items()} | {
    "words": "text_embeddings.word_embeddings",
    "text_norm": "text_embeddings.LayerNorm",
    "text_position": TEXT_POSITION,
    "types": "token_type_embeddings.weight",
    "relative_table": TABLE,
    "itc_image": "itc_image_proj.fc",
    "itc_text": "itc_text_proj.fc",
    "logit_scale": "logit_scale",
    "pooler": "pooler.dense",
    "itm_head": "itm_score.fc",
    "mlm_head.0": "mlm_score.transform.dense",
    "mlm_head.2": "mlm_score.transform.LayerNorm",
    "mlm_head.3.weight": "mlm_score.decoder.weight",
    "mlm_head.3.bias": "mlm_score.bias",
}
VLMO_TASKS = {"vqa_classifier": VQA, "nlvr2_classifier": NLVR2}

# Groups that a released file has whole, or lacks whole.
VLMO_OPTIONAL = [{"itc_image", "itc_text", "logit_scale"}, {"itm_head"}, {"mlm_head"}, {"blocks.*.experts.vl"}]
BEIT_OPTIONAL = [OPTIONAL | {"types", "norm", "relative_table"}]

# What they have besides: indices, a contrastive branch that is not in the paper, BEiT's own heads.
VLMO_IGNORED = re.compile(
    r"itc_vl_(image|text)_proj\.fc\.weight|logit_vl_scale|text_embeddings\.(position|token_type)_ids"
    r"|(text_|text_imag_)?relative_position_index"
)
BEIT_IGNORED = re.compile(r"mask_token|(lm_head|head|fc_norm|norm)\..*|(.*\.)?relative_position_index")

NAMES = {768: "base", 544: "base_plus", 1024: "large"}  # the published sizes by their width
REACH = 196  # how many text positions their tables tell apart


class Released(NamedTuple):
    """A released file in the words of this project."""

    config: Config
    tensors: dict  # of the trunk and the heads of pre-training: the file's own where they are of the same shape
    ignored: dict  # {name in the file: parameters}
    task: str = ""  # the file's name of a task's classifier, and its tensors
    head: dict = {}
    how: dict = {}  # {group: "resampled" or "fresh"}, where it is not simply taken


def from_vlmo(state_dict, heads=None, reach=REACH, image_size=None):
    """The weights of a released VLMo file → (model, report).

    state_dict: its tensors by name; the model takes them themselves where it can, without a copy. heads: where
    positions are absolute and the width is not a published one (768, 544, 1024). reach: how many text positions the
    relative table tells apart. image_size: another resolution than the file's, in pixels.
    model: a VLMo; a VQA or NLVR2 where the file has their classifier. report: {group, or name in the file: ("taken",
    "resampled", "copied", "fresh" or "ignored", parameters)}.
    UserError that names what is missing, left over or of a wrong shape.
    """
    released = resized(read_vlmo(state_dict, heads, reach), image_size)
    model, _ = rebuild(released.tensors, released.config, "the file")
    if released.task:
        model = VLMO_TASKS[released.task](model, outputs(released))
        model.head.load_state_dict(released.head, assign=True)
    return model, rows_of(released)


def from_beit(state_dict, heads=None, image_size=None):
    """The weights of a released BEiT file, as stage image leaves them → (VLMo, report): see from_vlmo.

    What BEiT does not have starts fresh: text embeddings, the final norm, heads; the text rows of the relative table
    and the types start at zero, so that its features are BEiT's. Language and vl experts are copies of the vision
    expert (Table 4, "image-only").
    """
    released = resized(read_beit(state_dict, heads), image_size)
    return rebuild(released.tensors, released.config, "the file")[0], rows_of(released)


def read_vlmo(state_dict, heads, reach):
    """→ Released."""
    layers, image_rows = count_layers(state_dict, "transformer."), None
    if relative := TABLE in state_dict:
        rows, columns = need(state_dict, TABLE, 2).shape
        image_rows, heads = rows - 2 * reach - 2, heads_of(TABLE, columns, layers, heads)
    elif "transformer.pos_embed" not in state_dict:
        raise runtime.UserError(f"it lacks {TABLE}, or transformer.pos_embed")
    config = architecture(state_dict, "transformer.", layers, heads, image_rows, reach)
    index = state_dict.get("relative_position_index")
    if relative and index is not None and len(index) != 1 + (config.image_size // config.patch_size) ** 2:
        raise runtime.UserError(
            f"its {TABLE} is of {config.image_size} pixels with a text reach of {reach} (--reach), "
            f"and its relative_position_index of {len(index) - 1} patches"
        )
    length = len(need(state_dict, TEXT_POSITION, 2, config.dim))
    if not 2 <= length <= reach:
        raise runtime.UserError(f"{TEXT_POSITION} has {length} rows, where 2 … {reach} can be")
    fusing = re.compile(r"transformer\.blocks\.(\d+)\.(mlp|norm2)_vl\.")
    fuses = len({match[1] for key in state_dict if (match := fusing.match(key))})
    tasks = [task for task in VLMO_TASKS if any(key.startswith(task) for key in state_dict)]
    if len(tasks) > 1:
        raise runtime.UserError(f"it has {' and '.join(tasks)}, where a released file has one")
    if not fuses and any(key.startswith(("itm_score", *tasks)) for key in state_dict):
        raise runtime.UserError(f"it lacks transformer.blocks.{layers - 1}.mlp_vl, which its heads read")
    words = need(state_dict, "text_embeddings.word_embeddings.weight", 2, config.dim)
    fuses = fuses or config.vl_layers  # stage text leaves none
    config = dataclasses.replace(config, vl_layers=fuses, vocab_size=len(words), max_text_len=length)

    with torch.device("meta"):
        blank = VLMo(config)
        for task in tasks:
            choices = 2 if task == "nlvr2_classifier" else len(need(state_dict, f"{task}.3.weight", 2))
            blank = VLMO_TASKS[task](blank, choices)
    names = VLMO | blocks("transformer.", VLMO_BLOCK, layers) | {"head": task for task in tasks}
    ignored = {key for key in state_dict if VLMO_IGNORED.fullmatch(key)} | ({TEXT_POSITION} if relative else set())
    tensors = translate(state_dict, blank, names, VLMO_OPTIONAL, ignored | {BERT_TYPE})
    first = "words.weight" if relative else "text_position"  # BERT adds row 0 of its types to every word
    tensors[first] = tensors[first] + need(state_dict, BERT_TYPE, 2, config.dim, 2)[0]
    head = {name.removeprefix("head."): tensors.pop(name) for name in list(tensors) if name.startswith("head.")}
    return Released(config, tensors, count(state_dict, ignored), "".join(tasks), head)


def read_beit(state_dict, heads):
    """→ Released."""
    layers, image_rows = count_layers(state_dict, ""), None
    keys = [f"blocks.{i}.attn.{TABLE}" for i in range(layers)]  # in fine-tuned files; else one for all layers, or none
    if f"rel_pos_bias.{TABLE}" in state_dict:
        keys = [f"rel_pos_bias.{TABLE}"] * layers
    if relative := any(key in state_dict for key in keys):
        image_rows, columns = need(state_dict, keys[0], 2).shape
        heads = heads_of(keys[0], columns, 1, heads)
        tables = [need(state_dict, key, 2, heads, image_rows).float() for key in keys]
    elif "pos_embed" not in state_dict:
        raise runtime.UserError(f"it lacks rel_pos_bias.{TABLE}, {keys[0]}, or pos_embed")
    config = architecture(state_dict, "", layers, heads, image_rows, REACH)

    with torch.device("meta"):
        blank = VLMo(config)
    ignored = {key for key in state_dict if BEIT_IGNORED.fullmatch(key)}
    tensors = translate(state_dict, blank, IMAGE | blocks("", BEIT_BLOCK, layers), BEIT_OPTIONAL, ignored | set(keys))
    if relative:
        tensors["relative_table"] = torch.cat([torch.cat(tables, dim=1), torch.zeros(2 * REACH + 2, layers * heads)])
    tensors |= {"types": torch.zeros(3, config.dim)}
    tensors |= {"norm.weight": torch.ones(config.dim), "norm.bias": torch.zeros(config.dim)}
    return Released(config, tensors, count(state_dict, ignored), how={"types": "fresh", "norm": "fresh"})


def resized(released, image_size):
    """Released at another resolution."""
    old = released.config
    if image_size in (None, old.image_size):
        return released
    try:
        new = dataclasses.replace(old, image_size=image_size)
    except ValueError as error:
        raise runtime.UserError(str(error)) from None
    tensors, how = {}, dict(released.how)
    for name, tensor in released.tensors.items():
        tensors[name], same = fitted(name, tensor, old, tensor, new)
        how |= {} if same else {group(name): "resampled"}
    return released._replace(config=new, tensors=tensors, how=how)


def rows_of(released):
    """The report."""
    with torch.device("meta"):
        model = VLMo(released.config)
    how = {}
    for name in model.state_dict():
        kind = "taken" if name in released.tensors else "copied" if vision_name(name) in released.tensors else "fresh"
        how[group(name)] = released.how.get(group(name), kind)
    rows = describe(how, model)
    if released.task:
        rows[released.task] = ("taken", sum(tensor.numel() for tensor in released.head.values()))
    return rows | {name: ("ignored", parameters) for name, parameters in released.ignored.items()}


def outputs(released):
    """How many a task's classifier has."""
    return len(released.head["3.bias"])


def need(state_dict, key, rank, width=None, length=None):
    """A tensor that the file must have, of so many dimensions, the last one of a width, the first one of a length."""
    if key not in state_dict:
        raise runtime.UserError(f"it lacks {key}")
    tensor = state_dict[key]
    there = tuple(tensor.shape)
    if len(there) != rank or 0 in there or width not in (None, there[-1]) or length not in (None, there[0]):
        wanted = ", ".join(map(str, [length or "…"] + ["…"] * (rank - 2) + [width or "…"]))
        raise runtime.UserError(f"{key} has the shape {there}: ({wanted}) fits the rest of the file")
    return tensor


def count_layers(state_dict, prefix):
    pattern = re.compile(re.escape(prefix) + r"blocks\.(\d+)\.")
    found = {int(match[1]) for key in state_dict if (match := pattern.match(key))}
    if gaps := set(range(max(1, len(found)))) - found:
        raise runtime.UserError(f"it lacks {prefix}blocks.{min(gaps)}")
    return len(found)


def heads_of(key, columns, layers, heads):
    """The number of heads that a table of relative positions has columns for."""
    if columns % layers or heads not in (None, columns // layers):
        wanted = f"{layers} layers" + (f" of {heads} heads" if heads else "")
        raise runtime.UserError(f"{key} has {columns} columns, which does not fit {wanted}")
    return columns // layers


def architecture(state_dict, prefix, layers, heads, image_rows, reach):
    """The Config of a released file's trunk. image_rows: of its table of relative positions; None: they are absolute.
    VL layers as in the published sizes: 2 of 12, 3 of 24."""
    dim = need(state_dict, f"{prefix}cls_token", 3).shape[-1]
    patch = need(state_dict, f"{prefix}patch_embed.proj.weight", 4).shape[-1]
    usual = CONFIGS[NAMES[dim]] if dim in NAMES else None
    if usual and heads not in (None, usual.heads):
        raise runtime.UserError(f"a width of {dim} has {usual.heads} heads in the published sizes, and not {heads}")
    if usual:
        heads = usual.heads
    if heads is None:
        raise runtime.UserError(f"absolute positions do not tell the number of heads of a width of {dim}: give --heads")
    if image_rows is None:
        patches = need(state_dict, f"{prefix}pos_embed", 3).shape[1] - 1
        side = math.isqrt(patches)
        if side**2 != patches or not side:
            raise runtime.UserError(f"{prefix}pos_embed has {patches} patches, which are no square")
    else:
        span = math.isqrt(max(0, image_rows - 3))
        side = (span + 1) // 2
        if span**2 != image_rows - 3 or span % 2 == 0:
            with_text = f"with {reach} positions of text (--reach)" if prefix else "of patches"
            raise runtime.UserError(f"no resolution has as many rows as its {TABLE}, {with_text}")
    try:
        return Config(
            dim=dim,
            layers=layers,
            heads=heads,
            vl_layers=min(3, max(1, layers // 6)),
            image_size=side * patch,
            patch_size=patch,
            max_text_len=min(Config.max_text_len, reach),
            position="absolute" if image_rows is None else "relative",
            text_reach=reach,
            layer_scale=0.1 if any(".gamma_" in key for key in state_dict) else 0.0,
            drop_path=usual.drop_path if usual else 0.0,
        )
    except ValueError as error:
        raise runtime.UserError(str(error)) from None


def blocks(prefix, names, layers):
    return {
        f"blocks.{i}.{ours}": f"{prefix}blocks.{i}.{theirs}" for i in range(layers) for ours, theirs in names.items()
    }


def translate(state_dict, blank, names, optional, ignored):
    """A released file's tensors by our names and in our shapes, which are those of `blank`."""
    tensors, used, absent = {}, set(ignored), {}
    for name, wanted in blank.state_dict().items():
        name = name.removeprefix("model.")  # of a task's module
        key = theirs(name, names)
        if key not in state_dict:
            absent[name] = key
            continue
        if not state_dict[key].is_floating_point() or state_dict[key].layout != torch.strided:
            raise runtime.UserError(f"{key} is {state_dict[key].dtype}, {state_dict[key].layout}: not plain numbers")
        tensor = unpacked(name, state_dict[key]).float()
        if tensor.shape != wanted.shape:
            there = tuple(state_dict[key].shape)
            raise runtime.UserError(f"{key} has the shape {there}: {tuple(wanted.shape)} fits the rest of the file")
        tensors[name] = tensor
        used.add(key)
    present = set(groups(tensors))
    free = set().union(*(unit for unit in optional if not unit & present))
    for name, key in absent.items():
        if group(name) not in free:
            raise runtime.UserError(f"it lacks {key}")
    if left := [key for key in state_dict if key not in used]:
        raise runtime.UserError(f"it has {', '.join(left[:3])}{' …' if left[3:] else ''}, which no released file has")
    return tensors


def theirs(name, names):
    """The file's name of our tensor, or None: that of the smallest module around it that is among `names`."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (module := ".".join(parts[:end])) in names:
            return ".".join([names[module], *parts[end:]])


def unpacked(name, tensor):
    """Our tensor out of the file's."""
    if re.search(r"attention\.(query|key|value)\.shared\.weight", name):  # the file has them as one
        return tensor.chunk(3)[("query", "key", "value").index(name.split(".")[3])].clone()
    if name in ("image_cls", "image_position"):
        return tensor.squeeze()
    if name == "types" and len(tensor) == 2:  # the second image's starts from the image's
        return torch.cat([tensor, tensor[1:]])
    return tensor


def count(state_dict, keys):
    """Parameters of what is ignored; those of all layers together."""
    parameters = collections.Counter()
    for key in sorted(keys):
        parameters[re.sub(r"\d+", "*", key)] += state_dict[key].numel()
    return dict(parameters)


# ---- The command -----------------------------------------------------------------------------------------------------


def read_released(path):
    """The tensors of a released file by name, mapped into memory where they lie in it as they are. UserError if it
    holds none. Only what torch.load(weights_only=True) reads: pickles can run any code."""
    if not Path(path).is_file():
        raise runtime.UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_stored(path))
    except (*runtime.DAMAGED, zipfile.BadZipFile) as error:
        reason = f"it is damaged, empty or of another kind ({runtime.first_line(error)})"
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it needs {code[1]}, and loading that could run any code: only tensors are read"
        elif "Weights only load failed" in reason:
            reason = "it is damaged, or more than tensors is in it, which could run any code: only tensors are read"
        raise runtime.UserError(f"{path} cannot be read as a file of torch.save: {reason}") from None
    for name in ("state_dict", "module", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            if {"stage", "config", "step"} <= content.keys():
                raise runtime.UserError(f"{path} is a checkpoint of this project already")
            content = content[name]
    if not isinstance(content, dict) or not content:
        raise runtime.UserError(f"{path} holds no tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise runtime.UserError(f"{path}: {name} is no tensor")
    whole = all(name.startswith("module.") for name in content)
    return {name.removeprefix("module.") if whole else name: tensor for name, tensor in content.items()}


def is_stored(path):
    """Whether a file is a zip archive whose parts are not compressed."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())


def main():
    parser = runtime.Parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="a released file, .pt or .pth")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the checkpoint to write")
    parser.add_argument("--vocab", metavar="FILE", help="VLMo: the vocabulary, vocab.txt of BERT (uncased)")
    parser.add_argument("--answers", metavar="DIR", help="VQA: the folder of VQA 2.0, for the names of the answers")
    parser.add_argument("--image-size", type=int, metavar="S", help="resample positions to S pixels [the file's]")
    parser.add_argument("--heads", type=int, metavar="H", help="of absolute positions and a width of one's own")
    parser.add_argument("--reach", type=int, metavar="R", help="text positions that a relative table tells apart [196]")
    args = parser.parse_args()
    if Path(args.out).exists() and Path(args.file).exists() and Path(args.out).samefile(args.file):
        raise runtime.UserError(f"-o {args.out} would replace the released file itself: name another")
    state = read_released(args.file)
    try:
        if any(key.startswith("transformer.") for key in state):
            released = read_vlmo(state, args.heads, REACH if args.reach is None else args.reach)
        elif any(key.startswith("blocks.") for key in state):
            released = read_beit(state, args.heads)
        else:
            raise runtime.UserError("it holds neither VLMo's weights nor BEiT's")
        released = resized(released, args.image_size)
    except runtime.UserError as error:
        raise runtime.UserError(f"{args.file}: {error}") from None
    config, stage = released.config, stage_of(released)
    if args.reach is not None and (stage == "image" or config.position == "absolute"):
        raise runtime.UserError(f"--reach is of VLMo's relative positions, and {args.file} has none")
    if args.vocab and stage == "image":
        raise runtime.UserError("--vocab is of VLMo's files: BEiT has no words")
    tokenizer = args.vocab and vocabulary(args.file, released.tensors, None, args.vocab)
    choices = read_choices(args, stage, released)
    content = {
        "stage": stage, "step": 0, "args": {"config": NAMES.get(config.dim, "base")}, "choices": choices,
        "config": dataclasses.asdict(config), "model": released.tensors, "head": released.head,
        "tokenizer": tokenizer and tokenizer.to_str(),
    }  # fmt: skip
    runtime.save(args.out, content)
    print(
        f"{args.file} → {args.out}: stage {stage}, {config.layers} layers of {config.dim}, {config.heads} heads, "
        f"{config.vl_layers} vision-language layers, {config.image_size} pixels, {config.position} positions"
    )
    print(report(rows_of(released)))
    if not tokenizer and stage != "image":
        print("  without --vocab here, train.py, finetune.py and evaluate.py need it")
    if stage == "vqa" and not choices:
        print("  without --answers, the names of the answers are not known, and evaluate.py needs them")


def stage_of(released):
    """Which stage or task of this project leaves such weights."""
    has = set(groups(released.tensors))
    if released.task:
        return released.task.removesuffix("_classifier")
    if "words" not in has:
        return "image"
    if "blocks.*.experts.vl" not in has:
        return "text"
    return "vl" if "mlm_head" in has else "retrieval"


def read_choices(args, stage, released):
    """What the outputs of a classifier mean, as far as it is known."""
    if args.answers and stage != "vqa":
        raise runtime.UserError(f"--answers is of VQA, and {args.file} has no vqa_classifier")
    if stage == "nlvr2":
        return ["False", "True"]
    if not args.answers:
        return None
    answers = data.released_answers(args.answers)
    if len(answers) != outputs(released):
        raise runtime.UserError(
            f"--answers {args.answers} has {len(answers)} answers, and {args.file} {outputs(released)}"
        )
    return answers


if __name__ == "__main__":
    runtime.run(main, data.DataError)
