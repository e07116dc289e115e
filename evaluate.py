"""Metrics as pure functions, and the evaluation of each task (Sections 3.5, 4.3–4.5) and stage (Section 3.4).

    python evaluate.py --task retrieval --checkpoint runs/vl/last.pt [--rerank 16]
    python evaluate.py --task vqa --checkpoint runs/vqa/best.pt --data DIR --split test --predictions FILE
    torchrun --nproc_per_node=8 evaluate.py --task nlvr2 --checkpoint runs/nlvr2/best.pt --data DIR

Any number of processes gives the same answer. Shape letters: I images, C captions, D dim, Q queries, G gallery.
"""

import collections
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import data
import losses
import momo
import runtime
import weights
from dvae import codebook_use
from mome import NLVR2, VQA, Classifier, Config

# ---- Metrics ---------------------------------------------------------------------------------------------------------


def ranks(scores, relevant):
    """How many irrelevant columns stand before the best relevant one, for rows that ask for columns: (Q,) int64.

    scores (Q, G) float; relevant (Q, G) bool, at least one a row. An irrelevant column that scores as high as the best
    relevant one stands before it: a model that cannot tell them apart earns nothing by it.
    """
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)  # (Q, 1)
    return (~(scores < best) & ~relevant).sum(1)  # what is not a number counts against, too


def recall(text_ranks, image_ranks):
    """Ranks of (images,), (captions,) → {"TR@1", … "IR@10", "mean"} in percent: text retrieval asks for a caption with
    an image, image retrieval for an image with a caption (Table 2)."""
    ways = {"TR": text_ranks, "IR": image_ranks}
    found = {f"{way}@{k}": 100 * (ranks < k).double().mean().item() for way, ranks in ways.items() for k in (1, 5, 10)}
    return found | {"mean": sum(found.values()) / 6}


def vqa_accuracy(answer, answers):
    """VQA 2.0's accuracy of one answer: min(n / 3, 1), where n of the annotators agree, averaged over all the sets that
    leave one of them out."""
    given = [data.normalise(other) for other in answers]
    n, all = given.count(data.normalise(answer)), len(given)
    return (n * min((n - 1) / 3, 1) + (all - n) * min(n / 3, 1)) / all


def vqa_accuracies(predicted, questions):
    """Answers to a list of data.Question → {"accuracy", and for each type of answer its own, in percent, and that of
    the best constant answer (of the ten most frequent) to all questions of the type}."""
    kinds = collections.defaultdict(list)
    for answer, question in zip(predicted, questions):
        kinds[question.kind].append((answer, question))
    mean = lambda pairs: 100 * sum(vqa_accuracy(answer, question.answers) for answer, question in pairs) / len(pairs)
    out = {"accuracy": mean(list(zip(predicted, questions)))}
    for kind, pairs in sorted(kinds.items()):
        frequent = collections.Counter(question.majority for _, question in pairs).most_common(10)
        constant = max(mean([(answer, question) for _, question in pairs]) for answer, _ in frequent)
        out |= {kind: mean(pairs), f"{kind}, best constant": constant}
    return out


def nlvr2_accuracies(predicted, statements):
    """Truth values for a list of data.Statement → {"accuracy": percent of pairs, "consistency": percent of statements
    of which all pairs are right}. A statement is known by its identifier without the number of the pair."""
    right = collections.defaultdict(list)
    for value, statement in zip(predicted, statements):
        split, images, _, sentence = statement.id.split("-", 3)
        right[split, images, sentence].append(value == statement.label)
    share = lambda values: 100 * sum(values) / len(values)
    return {
        "accuracy": share([value for pairs in right.values() for value in pairs]),
        "consistency": share([all(pairs) for pairs in right.values()]),
    }


def line(results):
    """{name: number} in a line."""
    return ", ".join(
        f"{name} {value:.4g}" if value < 1000 else f"{name} {value:.0f}" for name, value in results.items()
    )


# ---- What an evaluation reads ----------------------------------------------------------------------------------------


def shard(count, batch):
    """This process's share of 0 … count−1, in batches. Shares are equally long: the last numbers may come twice."""
    share = -(-count // losses.world())
    first = min(losses.rank() * share, count)
    mine = [min(first + k, count - 1) for k in range(share)]
    return [mine[k : k + batch] for k in range(0, share, batch)]


class Views(Dataset):
    """The pictures of a source, or pairs of them, as evaluation sees them; the message about one that is unreadable."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __getitem__(self, i):
        try:
            return data.to_tensor(self.source.image(i), lambda image: data.resize(image, self.size))
        except data.Unreadable as error:  # a loader worker's error would come with a traceback
            return str(error)


def pictures(source, batches, size, device):
    """For each list of numbers in batches: uint8 (n, 3, S, S), or pairs (n, 2, 3, S, S). data.Unreadable, which names
    the first picture that cannot be read."""
    workers = runtime.workers(device)
    for views in DataLoader(Views(source, size), batch_sampler=batches, num_workers=workers, collate_fn=list):
        for view in views:
            if isinstance(view, str):
                raise data.Unreadable(view)
        yield torch.stack(views)


def encode(words, texts):
    """Texts → ids (n, T) int64, mask (n, T) bool, cut as a batch of them."""
    ids, mask = (torch.stack(parts) for parts in zip(*map(words.encode, texts)))
    T = data.cut(mask)
    return ids[:, :T], mask[:, :T]


# ---- Retrieval -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def retrieval(model, source, words, device, batch=64, rerank=0):
    """Retrieval over a source, all its pictures against all their captions, by the dual encoder (Section 3.5); if
    `rerank`, also with the ITM head on each query's best `rerank` → {"TR@1", … "reranked TR@1", …}.

    A caption is right for every picture that has it (`source.by_text`), or in Karpathy's splits for its own alone.
    All processes share the work.
    """
    training, size = model.training, model.config.image_size
    model.eval()
    captions = [(i, text) for i in range(len(source)) for text in source[i].captions]
    views = pictures(source, shard(len(source), batch), size, device)
    image = losses.gather(torch.cat([model.embed_image(view.to(device)) for view in views]))[: len(source)]  # (I, D)
    ids, mask = encode(words, [caption for _, caption in captions])  # (C, T)
    text = embed_texts(model, ids, mask, device, batch)  # (C, D)
    owners = collections.defaultdict(list)
    for i, caption in captions:
        owners[caption if source.by_text else i].append(i)
    pairs = [(i, n) for n, (own, caption) in enumerate(captions) for i in owners[caption if source.by_text else own]]
    relevant = torch.tensor(pairs, device=device).T  # (2, P): image, caption
    results = recall(search(image, text, relevant), search(text, image, relevant.flip(0)))
    if rerank:
        images = torch.empty(len(source), 3, size, size, dtype=torch.uint8)  # in memory: each is read many times
        for i, view in enumerate(pictures(source, [[i] for i in range(len(source))], size, device)):
            images[i] = view[0]
        odds = lambda i, n: matching(model, images, ids, mask, torch.stack([i, n], 1), device, batch)
        by_image = lambda s, first: reorder(model.scale() * s, rerank, lambda row, column: odds(first + row, column))
        by_text = lambda s, first: reorder(model.scale() * s, rerank, lambda row, column: odds(column, first + row))
        again = recall(search(image, text, relevant, by_image), search(text, image, relevant.flip(0), by_text))
        results |= {f"reranked {name}": value for name, value in again.items()}
    model.train(training)
    return results


def embed_texts(model, ids, mask, device, batch):
    """ids, mask (C, T) → unit vectors (C, D), on all processes, which share the work. A batch has texts of about one
    length, and is cut to it: captions are 13 tokens long on average, the longest 40."""
    order = mask.sum(1).argsort(stable=True)
    order = torch.cat([order[process :: losses.world()] for process in range(losses.world())])  # long ones for each
    out = []
    for n in map(order.__getitem__, shard(len(order), batch)):
        T = data.cut(mask[n])
        out.append(model.embed_text(ids[n, :T].to(device), mask[n, :T].to(device)))
    return losses.gather(torch.cat(out))[order.argsort().to(device)]


def search(queries, gallery, relevant, second=None, block=2**24):
    """`ranks` of all queries (Q, D) in the gallery (G, D): (Q,). relevant (2, P): the pairs (query, column) that belong
    together. second(scores (q, G), first query) may reorder them. Never more than `block` scores, or a row of them, are
    in memory; processes take turns at the blocks, of which each gets one at least."""
    block = max(1, min(block // len(gallery), math.ceil(len(queries) / losses.world())))
    out = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for first in range(losses.rank() * block, len(queries), losses.world() * block):
        with torch.autocast(queries.device.type, enabled=False):  # rounded scores would tie
            scores = queries[first : first + block] @ gallery.T  # (q, G)
        row, column = relevant[:, (relevant[0] >= first) & (relevant[0] < first + block)]
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[row - first, column] = True
        out[first : first + block] = ranks(second(scores, first) if second else scores, right)
    return losses.gather(out[None]).sum(0)


def reorder(scores, K, odds):
    """s/σ (q, G) → scores by which each row's K best stand before all others, in the order of s/σ + odds(row, column).

    The ITM head has learned to tell a match from negatives drawn with probability softmax(s/σ): its log-odds are what
    s/σ leaves out of the logarithm of a match's probability.
    """
    best, column = scores.topk(min(K, scores.shape[1]))  # (q, K)
    row = torch.arange(len(scores)).repeat_interleave(column.shape[1])
    best = best + odds(row, column.flatten().cpu()).view_as(best)
    return scores.scatter(1, column, best - best.amin(1, keepdim=True) + scores.amax(1, keepdim=True) + 1)


def matching(model, images, texts, masks, pairs, device, batch):
    """Log-odds of a match (P,), by the ITM head, of pairs (P, 2): numbers of images (I, 3, S, S) and of texts, masks
    (C, T)."""
    out = []
    for i, n in (part.unbind(1) for part in pairs.split(batch)):
        T = data.cut(masks[n])
        text, mask = texts[n, :T].to(device), masks[n, :T].to(device)
        hidden = model.encode_pair(text, mask, images[i].to(device), rows=1)
        logits = model.itm_head(model.pool(hidden)).float()
        out.append(logits[:, 1] - logits[:, 0])
    return torch.cat(out)


# ---- Questions, statements, classes ----------------------------------------------------------------------------------


@torch.no_grad()
def predict(task, source, words, device, batch=64):
    """The best of a task's choices for every sample of a source: (n,) int64 on the CPU, on every process. task: VQA,
    NLVR2 or Classifier of mome.py; words: None where the source has no text."""
    task.eval()
    out = []
    shards = shard(len(source), batch)
    for numbers, views in zip(shards, pictures(source, shards, task.model.config.image_size, device)):
        inputs = {"image": views}
        if words:
            inputs["text"], inputs["mask"] = encode(words, [source[i].text for i in numbers])
        out.append(task({name: tensor.to(device) for name, tensor in inputs.items()}).argmax(1))
    return losses.gather(torch.cat(out))[: len(source)].cpu()


def vqa(task, source, words, answers, device, batch=64):
    """→ accuracies ({} where no answers are published), and what the evaluation server takes."""
    predicted = [answers[k] for k in predict(task, source, words, device, batch)]
    questions = [source[i] for i in range(len(source))]
    results = vqa_accuracies(predicted, questions) if questions[0].answers else {}
    pairs = [{"question_id": question.id, "answer": answer} for question, answer in zip(questions, predicted)]
    return results, json.dumps(pairs)


def nlvr2(task, source, words, choices, device, batch=64):
    """→ accuracies, and what the release's metrics.py reads."""
    predicted = [bool(k) for k in predict(task, source, words, device, batch)]
    statements = [source[i] for i in range(len(source))]
    lines = [f"{statement.id},{value}\n" for statement, value in zip(statements, predicted)]
    return nlvr2_accuracies(predicted, statements), "".join(lines)


def classify(task, source, words, classes, device, batch=64):
    """→ accuracy in percent; there is no official format of predictions."""
    check_classes(source, classes)
    predicted = [classes[k] for k in predict(task, source, None, device, batch)]
    right = sum(source[i].label == predicted[i] for i in range(len(source)))
    return {"accuracy": 100 * right / len(source)}, None


def check_classes(source, classes):
    """DataError if a source has a class that the model does not know."""
    for label in {sample.label for sample in data.samples(source)}.difference(classes):
        raise data.DataError(f"class {label} is none of those that the model was trained on")


# ---- What the stages before are measured by --------------------------------------------------------------------------


ENOUGH = 10_000  # pictures or texts to measure a stage on


def batches(count, size):
    """This process's share of 0 … count−1, each number once over all processes, in batches."""
    mine = list(range(losses.rank(), count, losses.world()))
    return [mine[k : k + size] for k in range(0, len(mine), size)]


def perplexity(loss, count):
    """exp of a mean; infinite where that is too large, or there is nothing to take it of."""
    return math.exp(loss / count) if count and loss / count < 700 else math.inf


def nearest_visible(codes, hidden):
    """For each patch the code of the nearest visible one (the first of equals). codes, hidden (n, N) → (n, N)."""
    n, N = codes.shape
    place = torch.arange(N, device=codes.device)
    grid = torch.stack([place // math.isqrt(N), place % math.isqrt(N)], dim=1).float()  # (N, 2)
    far = torch.cdist(grid, grid).expand(n, N, N).masked_fill(hidden[:, None], torch.inf)  # (n, N, N)
    return codes.gather(1, far.argmin(2))


@torch.no_grad()
def masked_patches(model, head, dvae, source, device):
    """Stage image on the pictures of a source (10,000 at most), a mask each: the share of hidden visual tokens (in
    percent) that the model finds, its perplexity, and the share that two guesses find: the most frequent of all hidden
    codes, and the code of the nearest visible patch. The same numbers for any number of processes."""
    model.eval()
    side, K = dvae.config.grid, dvae.config.codes
    count, hits, near, loss = torch.zeros(4, dtype=torch.float64, device=device)
    seen = torch.zeros(K, dtype=torch.float64, device=device)
    shares = batches(min(len(source), ENOUGH), 64)
    for numbers, views in zip(shares, pictures(source, shares, model.config.image_size, device)):
        image = views.to(device)
        hidden = torch.stack([data.mask_blocks(side, random.Random(f"mask {i}")) for i in numbers]).to(device)  # (n, N)
        codes = dvae.encode(image)
        out = model.encode_image(image, masked=hidden, mask_embedding=head.mask_embedding)[:, 1:]
        logits, labels = head(out[hidden]).float(), codes[hidden]  # (M, K), (M,)
        count, hits = count + len(labels), hits + (logits.argmax(1) == labels).sum()
        near = near + (nearest_visible(codes, hidden)[hidden] == labels).sum()
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")
        seen += torch.bincount(labels, minlength=K)
    total = losses.gather(torch.cat([torch.stack([count, hits, near, loss]), seen])[None]).sum(0)
    count, hits, near, loss, *seen = total.tolist()
    share = lambda found: 100 * found / max(count, 1)
    return {"accuracy": share(hits), "perplexity": perplexity(loss, count), "nearest visible": share(near),
            "most frequent": share(max(seen)), "masked": round(count)}  # fmt: skip


@torch.no_grad()
def masked_pixels(stage, source, device):
    """MoMo's stages image and text on the pictures of a source (10,000 at most), a mask each: the mean squared error of
    hidden patches, in the units of training, and that of guessing the mean of a picture's visible ones. The same
    numbers for any number of processes."""
    stage.eval()
    config, found = stage.model.config, torch.zeros(3, dtype=torch.float64, device=device)
    patches, ratio = (config.image_size // config.patch_size) ** 2, momo.RATIO["image"]
    shares = batches(min(len(source), ENOUGH), 64)
    for numbers, views in zip(shares, pictures(source, shares, config.image_size, device)):
        image = views.to(device)
        hidden = torch.stack([momo.hide_patches(ratio, patches, random.Random(f"mask {i}")) for i in numbers])
        hidden = hidden.to(device)  # (n, N)
        wanted = momo.patch_values(image, hidden, stage.normalised)  # (M, P)
        seen = momo.patch_values(image, ~hidden, stage.normalised).unflatten(0, (len(image), -1))  # (n, visible, P)
        guess = seen.mean(1).repeat_interleave(len(wanted) // len(image), 0)  # (M, P)
        error = lambda pixels: (pixels - wanted).float().square().mean(1).sum()
        pixels = stage.pixels({"image": image, "hidden": hidden})
        found += torch.stack([error(pixels), error(guess), found.new_tensor(len(wanted))])
    error, guess, count = losses.gather(found[None]).sum(0).tolist()
    return {"error": error / count, "mean patch's error": guess / count, "masked patches": round(count)}


@torch.no_grad()
def masked_words(stage, texts, training, device):
    """A stage with logits(batch) on data.Texts `texts` (10,000 at most): the share of masked tokens (in percent) that
    it finds, its perplexity, and those of the unigram distribution of the tokens of data.Texts `training` (of 10 M at
    most, one added each). The same numbers for any number of processes."""
    stage.eval()
    words = texts.words
    seen = torch.from_numpy(np.bincount(training.tokens[: 10**7], minlength=words.size)).double().to(device)
    seen[words.sep] = 0  # stands between documents
    unigram = ((seen + 1) / (seen + 1).sum()).log()
    count, hits, loss, top, plain = torch.zeros(5, dtype=torch.float64, device=device)
    for numbers in batches(min(len(texts), ENOUGH), 64):
        batch = data.collate([texts[0, i] for i in numbers])
        batch = {name: batch[name].to(device) for name in ("masked", "labels", "mask")}
        logits, labels = stage.logits(batch).float(), batch["labels"][batch["labels"] != data.IGNORE]  # (M, V), (M,)
        count, hits = count + len(labels), hits + (logits.argmax(1) == labels).sum()
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")
        top, plain = top + (labels == seen.argmax()).sum(), plain - unigram[labels].sum()
    count, hits, loss, top, plain = losses.gather(torch.stack([count, hits, loss, top, plain])[None]).sum(0).tolist()
    share = lambda found: 100 * found / max(count, 1)
    return {"accuracy": share(hits), "perplexity": perplexity(loss, count), "unigram accuracy": share(top),
            "unigram perplexity": perplexity(plain, count), "masked": round(count)}  # fmt: skip


@torch.no_grad()
def codebook(dvae, source, image_size, device):
    """A dVAE on the pictures of a source (10,000 at most): the codes that serve, their perplexity, and the mean squared
    error of reconstructions from codes alone (pixels in −1 … 1). The same numbers for any number of processes."""
    dvae.eval()
    seen = torch.zeros(dvae.config.codes, dtype=torch.float64, device=device)
    error = torch.zeros((), dtype=torch.float64, device=device)
    for views in pictures(source, batches(min(len(source), ENOUGH), 64), image_size, device):
        image = views.to(device)
        codes = dvae.encode(image)
        seen += torch.bincount(codes.flatten(), minlength=len(seen))
        error = error + (dvae.decode(codes) - dvae.pixels(image)).square().mean((1, 2, 3)).sum()
    total = losses.gather(torch.cat([error[None], seen])[None]).sum(0)
    serving, perplexity = codebook_use(total[1:])
    return {"codes": serving, "perplexity": perplexity, "error": total[0].item() / min(len(source), ENOUGH)}


@torch.no_grad()
def reconstruction_sheet(dvae, source, image_size, device):
    """A picture: the first 16 of a source, side by side, above their reconstructions from codes alone."""
    [views] = pictures(source, [range(min(16, len(source)))], image_size, device)
    wanted = dvae.pixels(views.to(device))
    rows = torch.stack([wanted, dvae.decode(dvae.encode(wanted))])  # (2, n, 3, s, s)
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (2s, n·s, 3)
    return Image.fromarray((127.5 * (sheet + 1)).round().clamp(0, 255).byte().cpu().numpy())


# ---- The command -----------------------------------------------------------------------------------------------------


def read_checkpoint(path, kind=Config):
    """A checkpoint of this project → (its content, config of a `kind`, tokenizer or None). UserError if it is none."""
    content = runtime.load(path)
    if (content["stage"] == "dvae") != (kind is not Config):
        wrong, right = ("a dVAE", "a model") if kind is Config else (f"a model of stage {content['stage']}", "a dVAE")
        raise runtime.UserError(f"{path} holds {wrong}, where {right} is needed")
    try:
        config = kind(**content["config"])
    except (TypeError, ValueError) as error:
        raise runtime.UserError(f"{path}: its architecture is not one of this version: {error}") from None
    text = content["tokenizer"]  # stage image and the dVAE have none
    return content, config, text and data.tokenizer_from_json(text, path)


TASKS = {"vqa": (VQA, vqa), "nlvr2": (NLVR2, nlvr2), "classify": (Classifier, classify)}


def load_task(task, path, vocab, device):
    """A fine-tuned checkpoint → the task's module, its words, and choices (answers, classes). UserError if it is of
    another task, or has another number of choices than its head."""
    content, config, tokenizer = read_checkpoint(path)
    if content["stage"] != task:
        advice = f"fine-tune it first: finetune.py --task {task} --init {path}"
        raise runtime.UserError(f"{path} (stage {content['stage']}) has no head for task {task}: {advice}")
    choices = content["choices"]
    if choices is None:
        raise runtime.UserError(f"{path} was imported without its answers: import it again, with --answers")
    model, _ = weights.rebuild(content["model"], config, path)
    module = TASKS[task][0](model, len(choices))
    there = list(content["head"].values())[-1].shape[0]
    if there != len(choices):
        raise runtime.UserError(f"{path} has {len(choices)} answers or classes and a head for {there}: it is damaged")
    weights.load_exactly(module.head, content["head"], path)
    words = None
    if task != "classify":
        words = data.Words(weights.vocabulary(path, content["model"], tokenizer, vocab), config.max_text_len)
    return module.to(device), words, choices


def main():
    parser = runtime.Parser(__doc__)
    parser.add_argument("--task", choices=["retrieval", *TASKS], default="retrieval", help="[retrieval]")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="for retrieval any that has learned ITC")
    parser.add_argument("--data", nargs="+", default=["shapes"], metavar="DIR", help='folders, or "shapes" (default)')
    parser.add_argument("--split", default="test", help="train, val, test; of VQA 2.0 also test-dev, minival [test]")
    parser.add_argument(
        "--rerank", type=int, default=0, metavar="K", help="retrieval: the K best again, by the ITM head"
    )
    parser.add_argument("--predictions", metavar="FILE", help="vqa: json for the server; nlvr2: csv for metrics.py")
    parser.add_argument("--vocab", metavar="FILE", help="where weights.py imported the checkpoint without one")
    parser.add_argument("--batch-size", type=int, default=64, help="[64]")
    parser.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision [off]")
    args = parser.parse_args()
    if args.batch_size < 1 or args.rerank < 0:
        raise runtime.UserError("--batch-size must be at least 1, and --rerank not negative")
    if args.rerank and args.task != "retrieval" or args.predictions and args.task not in ("vqa", "nlvr2"):
        raise runtime.UserError("--rerank is of task retrieval, and --predictions of vqa and nlvr2")
    if args.vocab and args.task == "classify":
        raise runtime.UserError("--vocab is of tasks with text, not of classify")
    if args.predictions and not Path(args.predictions).resolve().parent.is_dir():
        raise runtime.UserError(f"--predictions {args.predictions}: no such folder")
    here = runtime.Runtime(args.amp)
    run = evaluate_retrieval if args.task == "retrieval" else evaluate_task
    with here.autocast():
        results = run(args, here)
    if results:
        here.print(line(results))
        here.print(json.dumps({name: round(value, 2) for name, value in results.items()}))


def evaluate_retrieval(args, here):
    content, config, tokenizer = read_checkpoint(args.checkpoint)
    model, how = weights.rebuild(content["model"], config, args.checkpoint)
    for group in ["itc_image", "itm_head"] if args.rerank else ["itc_image"]:
        if how[group] == "fresh":
            lacks = {"itc_image": "ITC, which retrieval needs", "itm_head": "ITM, which --rerank needs"}[group]
            raise runtime.UserError(f"{args.checkpoint} (stage {content['stage']}) never learned {lacks}")
    source = data.read_sources(args.data, args.split, config.image_size)
    captions = sum(len(source[i].captions) for i in range(len(source)))
    here.print(f"{args.split}: {len(source)} images, {captions} captions")
    tokenizer = weights.vocabulary(args.checkpoint, content["model"], tokenizer, args.vocab)
    words = data.Words(tokenizer, config.max_text_len)
    return retrieval(model.to(here.device), source, words, here.device, args.batch_size, args.rerank)


def evaluate_task(args, here):
    module, words, choices = load_task(args.task, args.checkpoint, args.vocab, here.device)
    source = data.read_task(args.task, args.data, args.split, module.model.config.image_size)
    here.print(f"{args.split}: {len(source)} samples")
    if args.task == "vqa" and not source[0].answers and not args.predictions:
        raise runtime.UserError(
            f"split {args.split} has no published answers: --predictions writes yours for the server"
        )
    results, predictions = TASKS[args.task][1](module, source, words, choices, here.device, args.batch_size)
    if args.predictions and here.main:
        runtime.write(args.predictions, lambda file: file.write(predictions.encode()))
    return results


if __name__ == "__main__":
    runtime.run(main, data.DataError)
