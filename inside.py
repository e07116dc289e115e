"""Inside a trained model: where the words of a pair look (maps as in MoMo's Figure 4, and the
pointing game that judges them), and what it makes of what is hidden.

Shape letters: B batch, T text tokens, N patches, S rows of a pair, H heads, P values of a patch, M
hidden patches or tokens, V vocabulary.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

import checkpoint
import dvae
import momo
import shapes
from images import mask_blocks, to_tensor
from loader import with_counts
from mome import MIMHead
from relative import scores_of
from textbook import attention
from texts import IGNORE

# ---- Where words look ----------------------------------------------------------------------------


@contextlib.contextmanager
def attention_of(model):
    """Inside, each forward pass over pairs fills a list with the attention probabilities of its
    layers, (B, H, S, S) each, which the fused kernel of Attention.forward keeps to itself."""
    caught = []

    def written_out(layer, inputs, output):
        x, kind, T, keys, positions, _ = inputs
        bias = 0.0 if positions is None else scores_of(*positions)
        output, probabilities = attention(layer, x, kind, T, keys, bias)
        caught.append(probabilities)
        return output

    handles = [block.attention.register_forward_hook(written_out) for block in model.blocks]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def mask_each_word(words, text):
    """text (T,) → the positions of each word's pieces; the text once for each of its B words, which
    is masked: ids (B, T), and labels (B, T), −100 elsewhere."""
    places = words.words(text)
    masked = text.repeat(len(places), 1)
    labels = torch.full_like(masked, IGNORE)
    for row, positions in enumerate(places):
        labels[row, positions] = text[positions]
        masked[row, positions] = words.mask
    return places, masked, labels


@torch.no_grad()
def attention_maps(model, text, mask, image, layers, heads):
    """What each token reads of each patch, a mean over layers and heads (numbers from 0) →
    (B, T, N). text, mask (B, T), image (B, 3, side, side)."""
    with attention_of(model) as caught:
        model.encode_pair(text, mask, image)
    T = text.shape[1]
    maps = [caught[layer][:, heads, :T, T + 1 :].mean(1) for layer in layers]  # (B, T, N) each
    return torch.stack(maps).mean(0)


def relevance_maps(model, words, text, mask, image):
    """How much each patch matters when a word is masked and predicted: (T, N), with the same row
    for all pieces of a word. text, mask (T,), image (3, side, side).

    In each layer, attention times its gradient (the positive part, averaged over heads) says how
    much a row takes from each other row; R accumulates this over all layers (Chefer et al.,
    "Generic Attention-model Explainability", which MoMo's Figure 4 uses).
    """
    places, masked, _ = mask_each_word(words, text)
    with torch.enable_grad(), attention_of(model) as caught:
        states = model.encode_pair(masked, mask.expand_as(masked), image.expand(len(masked), -1, -1, -1))
        logits = [model.mlm_head(states[k, positions]) for k, positions in enumerate(places)]  # (pieces, V)
        right = [logit.gather(1, text[at, None]).sum() for logit, at in zip(logits, places)]
        gradients = torch.autograd.grad(sum(right), caught)
    R = torch.eye(states.shape[1], device=states.device)
    for probabilities, gradient in zip(caught, gradients):
        R = R + (probabilities * gradient).clamp(min=0).mean(1).detach() @ R  # (B, S, S)
    out = torch.zeros(len(text), states.shape[1] - len(text) - 1, device=states.device)
    for k, positions in enumerate(places):
        out[positions] = R[k, positions, len(text) + 1 :].mean(0)
    return out


# ---- The pointing game ---------------------------------------------------------------------------

KINDS = {**dict.fromkeys(shapes.SIZES, "size"), **dict.fromkeys(shapes.COLORS, "color")}
KINDS |= dict.fromkeys(shapes.SHAPES, "shape")


def pointing_game(maps, words, config, device, count=200):
    """Whether the hottest patch of a word that describes a thing lies in that thing, on scenes of
    the built-in world's split test → {"size", "color", "shape", "all", "any thing": how often it
    lies in any thing of the scene, "chance": of a patch at random}, in percent, of the kinds of
    words that the model knows.

    maps(text (1, T), mask (1, T), image (1, 3, side, side)) → (T, N). A patch lies in a thing if
    its center lies in the thing's circle.
    """
    world = shapes.World("test", config.image_size)
    hits = {name: [] for name in ("size", "color", "shape", "all", "any thing", "chance")}
    for i in range(count):
        ids, mask = words.encode_all(world[i].captions[:1])
        image = to_tensor(world.image(i))[None]
        weights = maps(ids.to(device), mask.to(device), image.to(device)).cpu()  # (T, N)
        inside = patches_inside(world.places(i), config)  # (things, N)
        thing = 0
        for positions in words.words(ids[0]):
            word = words.tokenizer.decode(ids[0, positions].tolist())
            if word in KINDS:
                hottest = weights[positions].mean(0).argmax()
                hits[KINDS[word]].append(inside[thing, hottest])
                hits["all"].append(inside[thing, hottest])
                hits["any thing"].append(inside[:, hottest].any())
                hits["chance"].append(inside[thing].double().mean())
            thing += word in shapes.SHAPES  # a caption names size, color and shape of one, then of the next
    return {name: 100 * torch.stack(found).double().mean().item() for name, found in hits.items() if found}


def patches_inside(places, config):
    """Which patches have their center in which thing, bool (things, N). places: of shapes.World."""
    side = config.image_size // config.patch_size
    center = (torch.arange(side) + 0.5) * config.patch_size
    y, x = torch.meshgrid(center, center, indexing="ij")  # (side, side)
    circles = [(x - left).square() + (y - top).square() <= radius**2 for left, top, radius in places]
    return torch.stack(circles).flatten(1)


# ---- What is made of what is hidden --------------------------------------------------------------


def fills_in(start):
    """What a checkpoint has learned to fill in: a set of "image", "text" and "pair"."""
    if start.stage == "momo-image":
        return {"image"}
    if start.stage.startswith("momo-"):
        own = {"text"} if start.stage == "momo-text" else {"image", "pair"}
        return own if start.args.get("no_simultaneous") else own | {"image", "text"}
    if "dvae" in start.extra:
        return {"image"}
    learned = "mlm_head" in checkpoint.groups(start.tensors) and start.args.get("mlm_weight") != 0
    if not learned or start.stage not in ("text", "vl"):  # a task keeps the head, and forgets its use
        return set()
    return {"text"} if start.stage == "text" else {"text", "pair"}


def hidden_patches(start, config, rng):
    """Which patches the stage of a checkpoint hides: (1, N) bool."""
    side = config.image_size // config.patch_size
    ratio = momo.RATIO["image"]
    hidden = mask_blocks(side, rng) if "dvae" in start.extra else momo.hide_patches(ratio, side * side, rng)
    return hidden[None]


def reconstructed(start, model, image, hidden, text=None, mask=None):
    """An image (1, 3, S, S) uint8 whose hidden patches (1, N) are what stage image predicts of them
    (visual tokens, decoded), or MoMo (values of pixels; in stage momo-vl with the help of a text,
    text and mask (1, T))."""
    if "dvae" in start.extra:
        tokenizer = dvae.build(start.extra["dvae"]).to(image.device)
        head = MIMHead(model.config, tokenizer.config.codes).to(image.device)
        checkpoint.load_exactly(head, start.head, start.path)
        states = model.encode_image(image, masked=hidden, mask_embedding=head.mask_embedding)
        codes = tokenizer.encode(image)  # (1, N)
        codes[hidden] = head(states[:, 1:][hidden]).argmax(1)
        pixels = F.interpolate(tokenizer.decode(codes), image.shape[-2:], mode="bilinear")
        values = patches_of(pixels, hidden.shape[1])[hidden]  # (M, P)
    else:
        decoders = momo.read_decoders(start, model.config).to(image.device)
        batch = {"image": image, "hidden": hidden}
        if "image" not in decoders and start.stage != "momo-text":
            batch |= {"masked": text, "labels": torch.full_like(text, IGNORE), "mask": mask}
        decoder = decoders["image" if "image" in decoders else "pair"]
        [batch] = with_counts([batch])
        values, _ = momo.reconstruct(model, decoder, batch)  # (M, P)
        if start.args["normalise_pixels"]:  # the mean and the variance of a patch are not predicted
            true = momo.patch_values(image, batch["hidden_at"], model.config.patch_size)
            values = values * (true.var(1, keepdim=True) + 1e-6).sqrt() + true.mean(1, keepdim=True)
    return with_patches(image, hidden, values)


def patches_of(pixels, N):
    """(1, 3, S, S) → (1, N, P)."""
    size = pixels.shape[-1] // math.isqrt(N)
    return F.unfold(pixels, size, stride=size).transpose(1, 2)


def with_patches(image, hidden, values):
    """An image uint8 (1, 3, S, S) with other values (M, P) in −1 … 1, or one, in hidden patches."""
    patches = patches_of(image.float() / 127.5 - 1, hidden.shape[1])
    patches[hidden] = values
    size = image.shape[-1] // math.isqrt(hidden.shape[1])
    pixels = F.fold(patches.transpose(1, 2), image.shape[-2:], size, stride=size)
    return (127.5 * (pixels + 1)).round().clamp(0, 255).byte()


def guesses(start, model, words, text, mask, image=None):
    """For each word of a text the likeliest word in its place when it is hidden, next to an image
    (1, 3, S, S) or without → [(word, guess, probability)]. text, mask (T,)."""
    places, masked, labels = mask_each_word(words, text)
    batch = {"masked": masked, "labels": labels, "mask": mask.expand_as(masked)}
    if image is not None:
        batch["image"] = image.expand(len(masked), -1, -1, -1)
    found = iter(masked_logits(start, model, batch).softmax(1))  # (M, V), word by word
    out = []
    for positions in places:
        best = [next(found).max(0) for _ in positions]
        guess = words.tokenizer.decode([piece.indices.item() for piece in best])
        word = words.tokenizer.decode(text[positions].tolist())
        out.append((word, guess, math.prod(piece.values.item() for piece in best)))
    return out


def masked_logits(start, model, batch):
    """→ logits (M, V) of the hidden tokens of a batch, with or without images."""
    if start.stage.startswith("momo-"):
        decoders = momo.read_decoders(start, model.config).to(batch["masked"].device)
        if "image" in batch:
            N = (model.config.image_size // model.config.patch_size) ** 2
            batch["hidden"] = batch["mask"].new_zeros(len(batch["mask"]), N)  # none is
        decoder = decoders["text" if "text" in decoders and "image" not in batch else "pair"]
        return momo.reconstruct(model, decoder, with_counts([batch])[0])[1]
    if "image" in batch:
        states = model.encode_pair(batch["masked"], batch["mask"], batch["image"])
    else:
        states = model.encode_text(batch["masked"], batch["mask"])
    return model.mlm_head(states[:, : batch["masked"].shape[1]][batch["labels"] != IGNORE])
