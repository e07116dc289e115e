"""A trained checkpoint on own files: every command prints what it finds, and draws it. Without files
they look at the built-in world.

    python show.py search --images DIR --text "a large red circle above a small blue star"
    python show.py search --images DIR --image FILE           # pictures like it; --texts FILE: texts
    python show.py match --image FILE --text "a dog" "a cat"
    python show.py ask --image FILE --question "what color is the circle?"
    python show.py compare --images LEFT RIGHT --statement "both images show a red shape."
    python show.py attend --image FILE --text "a wet dog"     # where each word looks
    python show.py masked --image FILE --text "a wet dog"     # what it makes of what is hidden
    python show.py embed --images DIR --texts FILE            # vectors for other tools
    python show.py curve runs/vl runs/momo-vl

    python show.py search --help                              # the flags of a command

Shape letters: I images, C texts, D dim, T text tokens, N patches, S side of an image.
"""

import math
import random
from pathlib import Path

import numpy as np
import torch

import checkpoint
import data
import drawing
import inside
import nlvr2
import retrieval
import runtime
import shapes
import sources
import vqa
from images import read_image, resize, to_tensor
from log import in_words
from runtime import UserError, at_least
from texts import read_texts

# ---- What the commands share ---------------------------------------------------------------------


def load(args, run, needs=()):
    """→ the model of --checkpoint on the device, its words, its Config."""
    model, words, config = checkpoint.load_model(args.checkpoint, needs)
    return model.to(run.device), words, config


def view(image, config, run):
    """An RGB image as the model sees it: uint8 (1, 3, S, S)."""
    return to_tensor(resize(image, config.image_size))[None].to(run.device)


def encode(words, texts, run):
    """Typed texts → ids (C, T), mask (C, T). UserError for none, and for one without any known
    word, or too long to be read whole."""
    if not texts:
        raise UserError("name a text, too (--help lists the flags)")
    ids, mask = words.encode_all(texts)
    for text in texts:
        pieces = words.tokenizer.encode(text, add_special_tokens=False).tokens
        if len(pieces) > words.length - 2:
            raise UserError(f'"{text[:40]}" has {len(pieces)} tokens: this model reads {words.length - 2} at most')
        if set(pieces) <= {"[UNK]"}:
            raise UserError(f'"{text[:40]}" has no word that this model knows')
    return ids.to(run.device), mask.to(run.device)


def image_and_texts(args, config):
    """The image and the texts that were named, or those of a scene of the built-in world."""
    if args.image:
        return read_image(args.image), args.text or []
    world = shapes.World("test", config.image_size)
    return world.image(args.scene), args.text or world[args.scene].captions


def save(picture, args):
    runtime.write(args.out, lambda file: picture.save(file, "PNG"))
    print(args.out)


# ---- The dual encoder, and the matching head -----------------------------------------------------


@torch.no_grad()
def search(args, run):
    """The best pictures for each --text or for an --image, or the best of --texts for an --image.

    Scores are cosines (ITC); with --rerank the best K are sorted again by the matching head (ITM).
    Pictures that are known to be right have a green frame.
    """
    heads = ("itc_image", "itc_text", "itm_head")
    model, words, config = load(args, run, heads if args.rerank else heads[:2])
    if args.texts:
        return search_texts(model, words, args, run)
    if args.rerank and args.image:
        raise UserError("--rerank matches an image with texts, not with images")

    # What is looked for: an image, or texts
    source = sources.folder_of_images(args.images, config.image_size)
    if args.image:
        titles, queries = [args.image], model.embed_image(view(read_image(args.image), config, run))
    else:
        known = [source[i].captions[0] for i in range(min(3, len(source))) if source[i].captions]
        titles = args.text or known
        # A source's own captions may be cut to the model's length; typed texts may not
        ids, mask = words.encode_all(known) if known and not args.text else encode(words, args.text, run)
        queries = model.embed_text(ids.to(run.device), mask.to(run.device))  # (C, D)

    # The gallery, and for each query its best pictures
    kept = Path(args.out).with_suffix(".vectors.npz") if args.images else None
    gallery = retrieval.kept_vectors(model, source, kept, args.checkpoint, run.device)  # (I, D)
    rows = []
    for q, title in enumerate(titles):
        scores = (gallery @ queries[q]).nan_to_num(-2)  # (I,): −2 is unreadable
        best = scores.topk(min(max(args.best, args.rerank), int((scores > -2).sum()))).indices.tolist()
        if not best:
            raise UserError(f"no image of {args.images} can be read")
        matches, first = {}, best[: args.rerank]
        if first:
            images = torch.cat([view(source.image(i), config, run) for i in first])
            best[: len(first)], matches = retrieval.reranked(model, first, scores, images, ids[q], mask[q])

        # Printed, and as a row of the sheet
        tiles = []
        print(title)
        for i, label, right in retrieval.results(source, title, scores, best[: args.best]):
            label += f"  match {matches[i]:.0%}" if i in matches else ""
            print(f"  {label}  {source[i].image}{'  (right)' if right else ''}")
            tiles.append(drawing.tile(source.image(i), label, right))
        rows.append((title, tiles))
    save(drawing.sheet(rows), args)


def search_texts(model, words, args, run):
    """The best of --texts for --image."""
    if not args.image or args.images:
        raise UserError("--texts are what an --image looks for: name it, and no --images")
    image, texts = read_image(args.image), read_texts(args.texts)
    pixels = view(image, model.config, run)
    data.print_not_read_whole(texts, words)
    ids, mask = words.encode_all(texts)
    scores = retrieval.embed_texts(model, ids, mask, run.device, 64) @ model.embed_image(pixels)[0]  # (C,)
    best = scores.topk(min(max(args.best, args.rerank), len(scores))).indices.tolist()
    if first := best[: args.rerank]:
        best[: len(first)], _ = retrieval.reranked(model, first, scores, pixels, ids[first], mask[first])
    rows = [f"{k}.  {scores[n]:.3f}  {texts[n]}" for k, n in enumerate(best[: args.best], start=1)]
    print("\n".join(rows))
    save(drawing.sheet([(args.image, [drawing.tile(image), drawing.written("\n".join(rows))])]), args)


@torch.no_grad()
def match(args, run):
    """For an image and each text the cosine (ITC) and the probability of a match (ITM).

    The cosine ranks: which of many fits better; a million cost nothing. The probability judges: it
    reads image and text together, and says whether this one pair fits.
    """
    model, words, config = load(args, run, ["itc_image", "itc_text", "itm_head"])
    image, texts = image_and_texts(args, config)
    (ids, mask), pixels = encode(words, texts, run), view(image, config, run)
    cosines = model.embed_text(ids, mask) @ model.embed_image(pixels)[0]  # (C,)
    probabilities = model.match(ids, mask, pixels.expand(len(ids), -1, -1, -1)).softmax(1)[:, 1]
    rows = [f"ITC {c:6.3f}   ITM {p:6.1%}   {text}" for c, p, text in zip(cosines, probabilities, texts)]
    rows.append("ITC: cosine, ranks many. ITM: probability of a match, judges one pair.")
    print("\n".join(rows))
    save(drawing.sheet([(args.image, [drawing.tile(image), drawing.written("\n".join(rows))])]), args)


@torch.no_grad()
def embed(args, run):
    """Unit vectors of the images of a folder and of the texts of a file, for other tools: images
    (I,) names, image_vectors (I, D), texts (C,), text_vectors (C, D) float32, in one .npz."""
    model, words, config = load(args, run, ["itc_image", "itc_text"])
    source = sources.folder_of_images(args.images, config.image_size)
    vectors = retrieval.embed_pictures(model, source, range(len(source)), run.device)  # (I, D)
    readable = (~vectors[:, 0].isnan()).nonzero()[:, 0].tolist()
    names = np.array([source[i].image for i in readable])
    content = {"images": names, "image_vectors": vectors[readable].numpy()}
    captions = [caption for i in readable for caption in source[i].captions]
    texts = read_texts(args.texts) if args.texts else captions
    if texts:
        data.print_not_read_whole(texts, words)
        ids, mask = words.encode_all(texts)
        found = retrieval.embed_texts(model, ids, mask, run.device, 64)
        content |= {"texts": np.array(texts), "text_vectors": found.cpu().numpy()}
    runtime.write(args.out, lambda file: np.savez(file, **content))
    print(args.out, *(f"{name} {array.shape}" for name, array in content.items()))


# ---- Fine-tuned tasks ----------------------------------------------------------------------------


@torch.no_grad()
def ask(args, run):
    """What a fine-tuned model says: of a question about an image its five best answers, each with
    the probability that it is right (several can be); of a statement about two images whether it is
    true."""
    task_file, Task = (vqa, vqa.VQA) if args.stage == "vqa" else (nlvr2, nlvr2.NLVR2)
    start = checkpoint.read(args.checkpoint)
    start.require_vocabulary()
    Task.check(start, args)
    task = Task(args, start.config, start, run).to(run.device).eval()
    config = task.model.config
    asked = [([read_image(path) for path in args.images or []], args.text)]
    if not args.images:
        world = task_file.read(["shapes"], "test", config.image_size)
        numbers = range(shapes.TIMES * args.scene, shapes.TIMES * (args.scene + 1))
        if args.text and args.stage == "vqa":
            numbers = numbers[:1]  # all four are of one image
        asked = [(world.image(i), args.text or world[i].text) for i in numbers]
    rows = []
    for images, text in asked:
        images = images if isinstance(images, list | tuple) else [images]
        pixels = torch.cat([view(image, config, run) for image in images])  # (1 or 2, 3, S, S)
        pixels = pixels if len(images) == 1 else pixels[None]
        ids, mask = encode(task.words, [text] if text else [], run)
        [logits] = task.predict({"image": pixels, "text": ids, "mask": mask})
        found = task.say(logits)
        print(f"{text}\n{found}")
        rows.append((text, [*map(drawing.tile, images), drawing.written(found)]))
    save(drawing.sheet(rows), args)


# ---- Inside the model ----------------------------------------------------------------------------


def attend(args, run):
    """For each word of a text a map of its attention to the patches of an image, a mean over
    --layers (default: where both modalities meet one expert) and --heads; or with --relevance, how
    much each patch matters for predicting the word when it is masked. In the built-in world also
    the pointing game: how often a word's hottest patch lies in the thing that it describes."""
    model, words, config = load(args, run, ["mlm_head" if args.relevance else "words"])
    if args.relevance and (args.layers or args.heads):
        raise UserError("--relevance goes through all layers and heads")
    fusing = config.layers if config.experts == "shared" else max(config.vl_layers, 1)
    layers = args.layers or range(config.layers - fusing + 1, config.layers + 1)
    heads = args.heads or range(1, config.heads + 1)
    if max(layers) > config.layers or max(heads) > config.heads:
        raise UserError(f"{args.checkpoint} has {config.layers} layers and {config.heads} heads")

    def maps(text, mask, image):
        """→ (T, N) of one pair."""
        if args.relevance:
            return inside.relevance_maps(model, words, text[0], mask[0], image[0])
        chosen = [layer - 1 for layer in layers], [head - 1 for head in heads]
        return inside.attention_maps(model, text, mask, image, *chosen)[0]

    # A heat map per word
    image, texts = image_and_texts(args, config)
    ids, mask = encode(words, texts[:1], run)
    weights = maps(ids, mask, view(image, config, run)).cpu()
    square = resize(image, config.image_size)
    tiles = [drawing.tile(square)]
    for positions in words.words(ids[0]):
        word, patches = words.tokenizer.decode(ids[0, positions].tolist()), weights[positions].mean(0)
        row, column = divmod(int(patches.argmax()), math.isqrt(len(patches)))
        print(f"{word:12}  hottest patch: row {row + 1}, column {column + 1}")
        tiles.append(drawing.tile(drawing.heat(square, patches.tolist()), word))
    save(drawing.sheet([("" if k else texts[0], tiles[k : k + 7]) for k in range(0, len(tiles), 7)]), args)
    if not args.image and (found := inside.pointing_game(maps, words, config, run.device)):
        print(f"pointing game, % of words: {in_words(found)}")


@torch.no_grad()
def masked(args, run):
    """What a pre-trained model makes of what is hidden: of the patches of an image (stage image,
    MoMo), and of each word of a text, without the image and with it."""
    start = checkpoint.read(args.checkpoint)
    model, words, config = checkpoint.load_model(start)
    model.to(run.device)
    known, rows = inside.fills_in(start), []
    ids = mask = None  # of a model that has learned no words
    if not known:
        raise UserError(f"{args.checkpoint} (stage {start.stage}) has not learned to fill in what is hidden")
    image, texts = image_and_texts(args, config)
    pixels = view(image, config, run)
    if words:
        ids, mask = encode(words, texts[:1], run)

    # The image with patches hidden, and with what is predicted there
    if "image" in known:
        hidden = inside.hidden_patches(start, config, random.Random(0)).to(run.device)
        views = {
            "image": pixels,
            "what it sees": inside.with_patches(pixels, hidden, 0.0),
            "what it predicts": inside.reconstructed(start, model, pixels, hidden, ids, mask),
        }
        tiles = [drawing.tile(drawing.from_tensor(one[0]), label) for label, one in views.items()]
        rows.append((f"{hidden.sum()} of {hidden.numel()} patches are hidden", tiles))

    # Each word of the text hidden in turn: what is guessed without the image, and with it
    seen = {"without the image": None} if "text" in known else {}
    if "pair" in known:
        seen["with the image"] = pixels
    if seen:
        columns = []
        for title, picture in seen.items():
            guessed = inside.guesses(start, model, words, ids[0], mask[0], picture)
            columns.append([title, *(f"{guess} {p:.0%}" for _, guess, p in guessed)])
        columns.insert(0, ["hidden", *(word for word, _, _ in guessed)])
        for row in zip(*columns):
            print("  ".join(f"{cell:24}" for cell in row))
        written = [drawing.written("\n".join(cells)) for cells in columns]
        rows.append((texts[0], [drawing.tile(image), drawing.beside(written, gap=30)]))
    save(drawing.sheet(rows), args)


def curve(args, run):
    """The losses of one run or several, and what was measured, from their metrics.jsonl."""
    if len(args.runs) > len(drawing.COLORS):
        raise UserError(f"{len(args.runs)} runs: there are colors for {len(drawing.COLORS)}")
    known = set().union(*(entry for path in args.runs for entry in drawing.entries(path))) - {"step", "split"}
    if absent := set(args.only or []) - known:
        raise UserError(f"--only: no run has {', '.join(sorted(absent))}")
    if not (chart := drawing.curves({run: [run] for run in args.runs}, args.only)):
        raise UserError(f"{' '.join(args.runs)}: nothing to draw")
    save(chart, args)


# ---- The flags -----------------------------------------------------------------------------------

COMMANDS = {  # the function, and the checkpoint that its built-in world usually has
    "search": (search, "runs/vl/last.pt"),
    "match": (match, "runs/vl/last.pt"),
    "ask": (ask, "runs/vqa/best.pt"),
    "compare": (ask, "runs/nlvr2/best.pt"),
    "attend": (attend, "runs/vl/last.pt"),
    "masked": (masked, "runs/vl/last.pt"),
    "embed": (embed, "runs/vl/last.pt"),
    "curve": (curve, None),
}


def add_flags(command, parser):
    """Adds the flags of a command."""
    flag, number = parser.add_argument, at_least(1)
    if command not in ("embed", "curve"):  # argparse cannot describe a group without flags
        one_of = parser.add_mutually_exclusive_group().add_argument
    if command in ("search", "embed"):
        flag("--images", metavar="DIR", help="a folder; if it has a file of captions, its split test")
        flag("--texts", metavar="FILE", help="a text per line")
    if command == "search":
        one_of("--image", metavar="FILE", help="look for pictures like it, or for texts that fit it")
        one_of("--text", nargs="+", metavar="TEXT", help="look for pictures that fit it")
        flag("--best", type=number, default=5, metavar="K", help="how many to show")
        flag("--rerank", type=at_least(0), default=0, metavar="K", help="sort the best K again by ITM")
    if command in ("match", "attend", "masked"):
        one_of("--image", metavar="FILE")
        flag("--text", nargs="+" if command == "match" else 1, metavar="TEXT")
    if command == "ask":
        one_of("--image", nargs=1, dest="images", metavar="FILE")
        flag("--question", dest="text", metavar="TEXT")
    if command == "compare":
        one_of("--images", nargs=2, metavar=("LEFT", "RIGHT"))
        flag("--statement", dest="text", metavar="TEXT")
    if command in ("match", "ask", "compare", "attend", "masked"):
        one_of("--scene", type=at_least(0), default=0, metavar="I", help="a scene of the built-in world")
    if command == "attend":
        flag("--layers", nargs="+", type=number, metavar="L", help="from 1 (default: the fusing ones)")
        flag("--heads", nargs="+", type=number, metavar="H", help="from 1 (default: all)")
        flag("--relevance", action="store_true", help="show what matters for predicting the word")
    if command == "curve":
        flag("runs", nargs="+", metavar="RUN", help="folder of a run, or its metrics.jsonl")
        flag("--only", nargs="+", metavar="NAME", help="the losses and measures to draw (default: all)")


def main():
    parser = runtime.Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command, (function, usual) in COMMANDS.items():
        one = commands.add_parser(command, description=function.__doc__)
        if usual:
            one.add_argument("--checkpoint", default=usual, metavar="FILE", help="the model")
        add_flags(command, one)
        out = "embed.npz" if command == "embed" else f"{command}.png"
        one.add_argument("--out", default=out, metavar="FILE", help="what to write")
        one.set_defaults(function=function, stage={"ask": "vqa", "compare": "nlvr2"}.get(command))
        one.set_defaults(training=False, splits=[], data=["shapes"], vocab=None, seed=0, head_factor=1.0)
    args = parser.parse_args()
    runtime.refuse_output("--out", args.out)
    args.function(args, runtime.Runtime())


if __name__ == "__main__":
    runtime.run(main)
