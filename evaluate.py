"""Metrics as pure functions, and the evaluation of each task and stage: zero-shot retrieval (Section 3.5, Table 2);
for the stages of Section 3.4 the share of masked visual tokens and words that are found, and the use of a codebook.

python evaluate.py --task retrieval --checkpoint runs/vl/last.pt [--data DIR] [--split test]
"""

import json
import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import losses
import runtime
import weights
from dvae import codebook_use
from mome import Config, VLMo

# ---- Metrics ---------------------------------------------------------------------------------------------------------


def recall(scores, relevant, ks=(1, 5, 10)):
    """Recall@k in percent, rows asking for columns: the share of rows with a relevant column among their k best.

    scores (Q, G) float; relevant (Q, G) bool, at least one a row. An irrelevant column that scores as high as the best
    relevant one stands before it: a model that cannot tell them apart earns nothing by it.
    """
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)  # (Q, 1)
    before = (~(scores < best) & ~relevant).sum(1)  # (Q,); what is not a number counts against, too
    return [100 * (before < k).double().mean().item() for k in ks]


def retrieval_recall(scores, relevant):
    """scores, relevant (images, captions) → {"TR@1", … "IR@10", "mean"}: text retrieval asks for a caption with an
    image, image retrieval for an image with a caption (Table 2)."""
    text, image = recall(scores, relevant), recall(scores.T, relevant.T)
    names = [f"{way}@{k}" for way in ("TR", "IR") for k in (1, 5, 10)]
    return dict(zip(names, text + image)) | {"mean": sum(text + image) / 6}


# ---- Retrieval -------------------------------------------------------------------------------------------------------


def shard(count, batch):
    """This process's share of 0 … count−1, in batches. Shares are equally long: the last numbers may come twice."""
    share = -(-count // losses.world())
    first = min(losses.rank() * share, count)
    mine = [min(first + k, count - 1) for k in range(share)]
    return [mine[k : k + batch] for k in range(0, share, batch)]


@torch.no_grad()
def retrieval(model, source, words, device, batch=64):
    """Zero-shot retrieval over a source: all its pictures against all their captions.

    A caption is right for every picture that has it (`source.by_text`), or in Karpathy's splits for its own alone.
    An image that cannot be read raises data.DataError. All processes share the work and return the same numbers.
    """
    training, size = model.training, model.config.image_size
    model.eval()
    captions = [(i, text) for i in range(len(source)) for text in source.captions(i)]
    image, text = [], []
    for numbers in shard(len(source), batch):
        image.append(model.embed_image(pixels(source, numbers, size).to(device)))
    for numbers in shard(len(captions), batch):
        ids, mask = (torch.stack(parts) for parts in zip(*(words.encode(captions[n][1]) for n in numbers)))
        T = data.cut(mask)
        text.append(model.embed_text(ids[:, :T].to(device), mask[:, :T].to(device)))
    image = losses.gather(torch.cat(image))[: len(source)]  # (I, D)
    text = losses.gather(torch.cat(text))[: len(captions)]  # (C, D)
    owners = {}
    for i, caption in captions:
        owners.setdefault(caption if source.by_text else i, []).append(i)
    relevant = torch.zeros(len(source), len(captions), dtype=torch.bool)  # (I, C)
    for n, (i, caption) in enumerate(captions):
        relevant[owners[caption if source.by_text else i], n] = True
    model.train(training)
    with torch.autocast(image.device.type, enabled=False):  # rounded scores would tie
        return retrieval_recall(image @ text.T, relevant.to(device))


def line(results):
    """{name: number} in a line."""
    return ", ".join(
        f"{name} {value:.4g}" if value < 1000 else f"{name} {value:.0f}" for name, value in results.items()
    )


# ---- What the stages before are measured by --------------------------------------------------------------------------


ENOUGH = 10_000  # pictures or texts to measure a stage on


def batches(count, size):
    """This process's share of 0 … count−1, each number once over all processes, in batches."""
    mine = list(range(losses.rank(), count, losses.world()))
    return [mine[k : k + size] for k in range(0, len(mine), size)]


def pixels(source, numbers, size):
    """Pictures of a source, uint8 (n, 3, S, S)."""
    return torch.stack([data.to_tensor(data.resize(data.read_or_refuse(source, i), size)) for i in numbers])


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
    for numbers in batches(min(len(source), ENOUGH), 64):
        image = pixels(source, numbers, model.config.image_size).to(device)
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
def masked_words(model, texts, training, device):
    """Stage text on data.Texts `texts` (10,000 at most): the share of masked tokens (in percent) that the model finds,
    its perplexity, and those of the unigram distribution of the tokens of data.Texts `training` (of 10 M at most, one
    added each). The same numbers for any number of processes."""
    model.eval()
    words = texts.words
    seen = torch.from_numpy(np.bincount(training.tokens[: 10**7], minlength=words.size)).double().to(device)
    seen[words.sep] = 0  # stands between documents
    unigram = ((seen + 1) / (seen + 1).sum()).log()
    count, hits, loss, top, plain = torch.zeros(5, dtype=torch.float64, device=device)
    for numbers in batches(min(len(texts), ENOUGH), 64):
        masked, labels, mask = (torch.stack([texts[0, i][name] for i in numbers]).to(device)
                                for name in ("masked", "labels", "mask"))  # fmt: skip
        at = labels != data.IGNORE
        logits, labels = model.mlm_head(model.encode_text(masked, mask)[at]).float(), labels[at]  # (M, V), (M,)
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
    for numbers in batches(min(len(source), ENOUGH), 64):
        image = pixels(source, numbers, image_size).to(device)
        codes = dvae.encode(image)
        seen += torch.bincount(codes.flatten(), minlength=len(seen))
        error = error + (dvae.decode(codes) - dvae.pixels(image)).square().mean((1, 2, 3)).sum()
    total = losses.gather(torch.cat([error[None], seen])[None]).sum(0)
    serving, perplexity = codebook_use(total[1:])
    return {"codes": serving, "perplexity": perplexity, "error": total[0].item() / min(len(source), ENOUGH)}


@torch.no_grad()
def reconstruction_sheet(dvae, source, image_size, device, count=16):
    """A picture: pictures of a source, side by side, above their reconstructions from codes alone."""
    wanted = dvae.pixels(pixels(source, range(min(count, len(source))), image_size).to(device))
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


def main():
    parser = runtime.Parser(__doc__)
    parser.add_argument("--task", choices=["retrieval"], default="retrieval")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="any checkpoint of this project")
    parser.add_argument("--data", nargs="+", default=["shapes"], metavar="DIR", help='folders, or "shapes" (default)')
    parser.add_argument("--split", choices=["train", "val", "test"], default="test")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise runtime.UserError("--batch-size must be at least 1")
    here = runtime.Runtime(args.amp)
    content, config, tokenizer = read_checkpoint(args.checkpoint)
    model = VLMo(config).to(here.device)
    how = weights.fit(model, content["model"], config, args.checkpoint)
    if how["itc_image"] == "fresh":
        raise runtime.UserError(
            f"{args.checkpoint} (stage {content['stage']}) never learned ITC, which retrieval needs"
        )
    words = data.Words(tokenizer, config.max_text_len)
    source = data.read_sources(args.data, args.split, config.image_size)
    with here.autocast():
        results = retrieval(model, source, words, here.device, args.batch_size)
    captions = sum(len(source.captions(i)) for i in range(len(source)))
    here.print(f"{args.split}: {len(source)} images, {captions} captions\n{line(results)}")
    here.print(json.dumps({name: round(value, 2) for name, value in results.items()}))


if __name__ == "__main__":
    runtime.run(main, data.DataError)
