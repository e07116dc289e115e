"""From the weights that the authors of VLMo, BEiT, ViT and MAE published to a checkpoint of this
project.

    python weights.py vlmo_base_patch16_480_vqa.pt -o vqa.pt --vocab vocab.txt --answers vqa
    python weights.py beit_base_patch16_224_pt22k_ft22kto1k.pth -o beit.pt
    python weights.py mae_pretrain_vit_base.pth -o mae.pt

vocab.txt belongs to BERT base uncased; vqa is the folder of VQA 2.0. A ViT is read as timm publishes
it. Shape letters: D dim, H heads, L layers, N patches, R rows of the relative-position table.
"""

import collections
import dataclasses
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import checkpoint
import runtime
from checkpoint import groups
from mome import CONFIGS, Config, VLMo, classifier
from reading import malformed
from runtime import UserError
from texts import load_tokenizer
from vqa import released_answers

# ---- Names: our tensor or module → the file's; * is the number of a layer ------------------------

TABLE = "relative_position_bias_table"
TEXT_POSITION = "text_embeddings.position_embeddings.weight"

IMAGE = {
    "image_cls": "cls_token",
    "patches": "patch_embed.proj",
    "image_position": "pos_embed",
    "relative_table": TABLE,
    "blocks.*.norm": "blocks.*.norm1",
    "blocks.*.attention.query.shared.weight": "blocks.*.attn.qkv.weight",  # all three in one, see unpacked
    "blocks.*.attention.key.shared.weight": "blocks.*.attn.qkv.weight",
    "blocks.*.attention.value.shared.weight": "blocks.*.attn.qkv.weight",
    "blocks.*.attention.query.shared.bias": "blocks.*.attn.q_bias",
    "blocks.*.attention.value.shared.bias": "blocks.*.attn.v_bias",
    "blocks.*.attention.out.shared": "blocks.*.attn.proj",
    "blocks.*.attention_branch.gamma": "blocks.*.gamma_1",
    "blocks.*.expert_branch.gamma": "blocks.*.gamma_2",
}
BEIT = IMAGE | {"blocks.*.experts.vision.norm": "blocks.*.norm2", "blocks.*.experts.vision": "blocks.*.mlp"}
VLMO = IMAGE | {
    "blocks.*.experts.vision.norm": "blocks.*.norm2_imag",
    "blocks.*.experts.vision": "blocks.*.mlp_imag",
    "blocks.*.experts.language.norm": "blocks.*.norm2_text",
    "blocks.*.experts.language": "blocks.*.mlp_text",
    "blocks.*.experts.vl.norm": "blocks.*.norm2_vl",
    "blocks.*.experts.vl": "blocks.*.mlp_vl",
    "norm": "norm",
    "words": "text_embeddings.word_embeddings",
    "word_types": "text_embeddings.token_type_embeddings.weight",  # row 0 is added to all words
    "text_norm": "text_embeddings.LayerNorm",
    "text_position": TEXT_POSITION,
    "types": "token_type_embeddings.weight",
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
TASKS = {"vqa": 1, "nlvr2": 2}  # {task: how many vectors of [T_CLS] its classifier reads}

# What is left behind: a contrastive branch that is not in the paper, indices, positions that
# relative files do not use, BEiT's own heads
VLMO_IGNORED = r"itc_vl_(image|text)_proj\.fc\.weight|logit_vl_scale"
VLMO_IGNORED += r"|text_embeddings\.(position_ids|token_type_ids|position_embeddings\.weight)"
VLMO_IGNORED += r"|(text_(imag_)?)?relative_position_index"
BEIT_IGNORED = r"mask_token|(lm_head|head|pre_logits|fc_norm|norm)\..*|decoder_.*"
BEIT_IGNORED += r"|(.*\.)?relative_position_index"

NAMES = {768: "base", 544: "base_plus", 1024: "large"}  # the published sizes by their width
REACH = 196  # how many text positions their tables tell apart


def name_in_file(name, names):
    """The file's name of our tensor, found by the smallest module around it in `names`. Or None."""
    layer = re.match(r"blocks\.(\d+)", name)
    parts = re.sub(r"^blocks\.\d+", "blocks.*", name).split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if module in names:
            found = ".".join([names[module], *parts[end:]])
            return found.replace("*", layer[1]) if layer else found
    return None


# ---- From a state dict to a model ----------------------------------------------------------------


class Released(NamedTuple):
    """A released file in the words of this project."""

    config: Config
    stage: str  # the stage or task of this project that leaves such weights
    tensors: dict  # of a VLMo, by name; those of the file itself where they have the same shape
    ignored: dict  # {name in the file: number of parameters}
    head: nn.Module | None = None  # the classifier of a task
    fresh: tuple = ()  # groups whose tensors are not the file's


def from_vlmo(state_dict, heads=None, reach=REACH, image_size=None):
    """The weights of a released VLMo file → (VLMo, report). The model has a classifier as
    `model.head` if the file is of VQA or NLVR2.

    state_dict: the file's tensors by name; the model takes them without a copy where it can.
    heads: only needed for absolute positions and a width that was not published. reach: how many
    text positions the relative table tells apart. image_size: another resolution, in pixels.
    report: {group, or name in the file: ("taken", "resampled", "copied", "fresh" or "ignored",
    number of parameters)}. UserError that names what is missing, left over or of a wrong shape.
    """
    with malformed("the file"):
        released = read_vlmo(state_dict, heads=heads, reach=reach)
    return build(released, "the file", image_size)


def from_beit(state_dict, heads=None, image_size=None):
    """The weights of a released BEiT, ViT or MAE file → (VLMo, report), see from_vlmo.

    What it does not have starts fresh. Types and the text rows of the relative table start from
    zero, so that the image features are the file's. Language and VL experts are copies of the
    vision expert (Table 4, "image-only").
    """
    with malformed("the file"):
        released = read_beit(state_dict, heads=heads)
    return build(released, "the file", image_size)


def build(released, path, image_size=None, device="cpu"):
    """→ VLMo, report. On device "meta" what the file lacks takes no memory, and has no values."""
    size = released.config.image_size if image_size is None else image_size
    try:
        config = dataclasses.replace(released.config, image_size=size)
    except ValueError as error:
        raise UserError(f"{path} at {size} pixels: {error}") from None
    with torch.device(device):
        model = VLMo(config)
    origin = checkpoint.fit(model, released.tensors, released.config, path)
    origin |= dict.fromkeys(released.fresh, "fresh")
    rows = checkpoint.with_sizes(origin, model)
    if released.head:
        model.head = released.head
        count = sum(p.numel() for p in model.head.parameters())
        rows[f"{released.stage}_classifier"] = ("taken", count)
    return model, rows | {name: ("ignored", count) for name, count in released.ignored.items()}


def read_vlmo(state, heads=None, reach=REACH):
    """The state dict of a VLMo file → Released."""
    state = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}

    # Its architecture, as the shapes of its tensors tell
    layers, image_rows = count_blocks(state, r"blocks\.(\d+)\."), None
    if TABLE in state:
        rows, columns = state[TABLE].shape  # R, H·L
        heads, image_rows = columns // max(layers, 1), rows - 2 * reach - 2
    config = architecture(state, layers, heads, image_rows)
    config = dataclasses.replace(
        config,
        vl_layers=count_blocks(state, r"blocks\.(\d+)\.mlp_vl\.") or config.vl_layers,
        vocab_size=len(state["text_embeddings.word_embeddings.weight"]),
        max_text_len=len(state[TEXT_POSITION]),
        text_reach=reach,
    )

    # The file's tensors: of a VLMo, of BERT's own types, and of a task's classifier
    task = next((task for task in TASKS if f"{task}_classifier.3.bias" in state), None)
    with torch.device("meta"):
        wanted = VLMo(config)
        wanted.word_types = nn.Parameter(torch.empty(2, config.dim))
        if task:
            outputs = len(state[f"{task}_classifier.3.bias"])
            wanted.head = classifier(config, TASKS[task] * config.dim, outputs)
    tensors, ignored = translate(state, VLMO | {"head": f"{task}_classifier"}, wanted, VLMO_IGNORED)
    added_to_words = "text_position" if image_rows is None else "words.weight"
    tensors[added_to_words] = tensors[added_to_words] + tensors.pop("word_types")[0]

    # The classifier, and the stage that leaves such weights
    head = wanted.head if task else None
    if head:
        taken = {name: tensors.pop(f"head.{name}") for name in head.state_dict()}
        head.load_state_dict(taken, assign=True)
    if "blocks.*.experts.vl" not in groups(tensors):
        stage = "text"
    else:
        stage = "vl" if "mlm_head" in groups(tensors) else "retrieval"
    return Released(config, task or stage, tensors, ignored, head)


def read_beit(state, heads=None):
    """The state dict of a BEiT, ViT or MAE file → Released."""
    layers, image_rows = count_blocks(state, r"blocks\.(\d+)\."), None
    is_vit = "blocks.0.attn.qkv.bias" in state
    if is_vit:
        state = without_key_biases(state, layers)
    tables = [f"blocks.{i}.attn.{TABLE}" for i in range(max(layers, 1))]  # fine-tuned files
    if f"rel_pos_bias.{TABLE}" in state:  # self-supervised files: one for all layers
        tables = [f"rel_pos_bias.{TABLE}"] * len(tables)
    if "pos_embed" not in state:  # a third kind has absolute positions
        image_rows, heads = state[tables[0]].shape
        assert len({state[key].shape for key in tables}) == 1, f"each {TABLE} must be of one shape"
        image_table = torch.cat([state[key] for key in tables], dim=1)
        text_table = torch.zeros(2 * REACH + 2, layers * heads)
        others = {key: tensor for key, tensor in state.items() if key not in tables}
        state = others | {TABLE: torch.cat([image_table, text_table])}  # R, H·L
    config = architecture(state, layers, heads, image_rows)
    with torch.device("meta"):
        wanted = VLMo(config)
    tensors, ignored = translate(state, BEIT | ({"norm": "norm"} if is_vit else {}), wanted, BEIT_IGNORED)
    tensors["types"] = torch.zeros(3, config.dim)
    if is_vit:
        return Released(config, "image", tensors, ignored, fresh=("types",))
    tensors |= {"norm.weight": torch.ones(config.dim), "norm.bias": torch.zeros(config.dim)}
    return Released(config, "image", tensors, ignored, fresh=("types", "norm"))


def without_key_biases(state, layers):
    """A ViT's state dict with BEiT's names. Its key bias b adds q·b to all scores of a query, which
    the softmax cancels, so leaving it out is exact."""
    state = dict(state)
    for i in range(layers):
        query, _, value = state.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        state |= {f"blocks.{i}.attn.q_bias": query, f"blocks.{i}.attn.v_bias": value}
    return state


def architecture(state, layers, heads, image_rows):
    """The Config of a file's trunk. image_rows: of the relative table; None: absolute positions."""
    dim = state["cls_token"].shape[-1]
    patch = state["patch_embed.proj.weight"].shape[-1]
    published = CONFIGS[NAMES.get(dim, "base")]
    if heads is None and dim not in NAMES:
        raise ValueError(f"the number of heads is not known for a width of {dim}")
    if image_rows is None:
        side = math.isqrt(state["pos_embed"].shape[1] - 1)  # without [I_CLS]
    else:
        side = (math.isqrt(image_rows - 3) + 1) // 2  # (2·side − 1)² offsets, 3 rows of [I_CLS]
    return dataclasses.replace(
        published,
        dim=dim,
        layers=layers,
        heads=heads or published.heads,
        vl_layers=min(published.vl_layers, layers),
        image_size=side * patch,
        patch_size=patch,
        position="absolute" if image_rows is None else "relative",
        text_reach=REACH,
        layer_scale=0.1 if any(".gamma_" in key for key in state) else 0.0,
    )


def count_blocks(state, pattern):
    """How many blocks have a tensor whose name begins with the pattern."""
    matches = [re.match(pattern, key) for key in state]
    return len({match[1] for match in matches if match})


def translate(state, names, wanted, ignored):
    """A file's tensors → {our name: tensor}, float32, and {ignored name: number of parameters}.

    names: {our name: the file's}. wanted: a VLMo and what else the file has, on device "meta".
    ignored: a pattern of the file's names. ValueError that names what is left over; what is missing
    or of another shape is for checkpoint.fit to refuse.
    """
    tensors, used = {}, set()
    for name in wanted.state_dict():
        key = name_in_file(name, names)
        if key in state:
            used.add(key)
            tensors[name] = unpacked(name, state[key]).float()
    parameters = collections.Counter()  # of all layers together
    for key in state:
        if key not in used:
            if not re.fullmatch(ignored, key):
                raise ValueError(f"it has {key}, which no released file has")
            parameters[re.sub(r"\d+", "*", key)] += state[key].numel()
    return tensors, dict(parameters)


def unpacked(name, tensor):
    """Our tensor out of the file's."""
    for i, part in enumerate(("query", "key", "value")):
        if name.endswith(f"attention.{part}.shared.weight"):
            return tensor.chunk(3)[i].clone()  # the file has (3D, D)
    if name in ("image_cls", "image_position"):
        return tensor.squeeze()  # (1, 1, D), (1, 1+N, D)
    if name == "types" and len(tensor) == 2:
        return torch.cat([tensor, tensor[1:]])  # the second image's type starts from the image's
    return tensor


# ---- The command ---------------------------------------------------------------------------------


def read_file(path):
    """The tensors of a released file by name. UserError if it holds none."""
    content = checkpoint.load(path, mmap=True)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no tensors by name")
    for name in ("state_dict", "module", "model"):
        if isinstance(content.get(name), dict):
            content = content[name]
    return {str(key).removeprefix("module."): tensor for key, tensor in content.items()}


def main():
    parser = runtime.Parser(description=__doc__)
    parser.add_argument("file", metavar="FILE", help="a released file: .pt, .pth or .bin")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the checkpoint to write")
    parser.add_argument("--vocab", metavar="FILE", help="VLMo: the vocabulary of BERT base uncased")
    answers = "VQA: the folder of VQA 2.0, for the names of the answers"
    parser.add_argument("--answers", metavar="DIR", help=answers)
    size = "resample positions to S pixels (default: the file's)"
    parser.add_argument("--image-size", type=runtime.at_least(1), metavar="S", help=size)
    args = parser.parse_args()
    if Path(args.file).resolve() == Path(args.out).resolve():
        raise UserError(f"-o {args.out} would replace the released file itself: name another")

    runtime.refuse_output("-o", args.out)
    state = read_file(args.file)
    is_vlmo = any(key.startswith("transformer.") for key in state)
    with malformed(args.file):
        released = read_vlmo(state) if is_vlmo else read_beit(state)
    model, rows = build(released, args.file, args.image_size, device="meta")
    config, stage, head = model.config, released.stage, released.head

    # The names of words and answers must be as many as the file has
    tokenizer = load_tokenizer(args.vocab) if args.vocab else None
    entries = tokenizer.get_vocab_size() if tokenizer else config.vocab_size
    if entries != config.vocab_size:
        raise UserError(f"--vocab {args.vocab} has {entries} entries, and {args.file} embeds {config.vocab_size}")
    if args.answers and stage != "vqa":
        raise UserError(f"--answers: {args.file} has no vqa_classifier")
    choices = released_answers(args.answers) if args.answers else None
    if choices is not None and len(choices) != len(head[-1].bias):
        outputs = len(head[-1].bias)
        raise UserError(f"--answers {args.answers} has {len(choices)} answers, and {args.file} {outputs}")

    # What the file has, and neutral types and norm: the rest is for the next stage to decide
    tensors = {name: t for name, t in model.state_dict().items() if name in released.tensors}
    content = {
        "stage": stage,
        "step": 0,
        "args": {"config": NAMES.get(config.dim, "base")},
        "config": dataclasses.asdict(config),
        "model": tensors,
        "head": head.state_dict() if head else {},
        "tokenizer": tokenizer.to_str() if tokenizer else None,
        "extra": {"choices": choices} if stage == "vqa" else {},
    }
    runtime.write(args.out, lambda file: torch.save(content, file))
    trunk = f"{config.layers} × {config.dim}, {config.heads} heads, {config.vl_layers} VL layers"
    print(f"{args.file} → {args.out}: stage {stage}, {trunk}, {config.image_size} pixels")
    print(checkpoint.report(rows))


if __name__ == "__main__":
    runtime.run(main)
