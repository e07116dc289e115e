"""Retrieval of captions by pictures and of pictures by captions (Section 3.5, Table 2): ranks and
recall, search in blocks, reranking with the matching head. Any number of processes gives the same
answer.

Shape letters: I images, C captions, D dim, Q queries, G gallery, P pairs, T text tokens.
"""

import collections
import functools
import math
import os
import zipfile

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import drawing
import losses
import runtime
from data import Views, pictures, shard
from runtime import UserError
from texts import cut

# ---- Ranks and recall ----------------------------------------------------------------------------


def ranks(scores, relevant):
    """Rank of the best relevant column of each row (0 = first): (Q,) int64. Ties count against the
    model.

    scores (Q, G) float; relevant (Q, G) bool, at least one per row.
    """
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)  # (Q, 1)
    return (~(scores < best) & ~relevant).sum(1)  # NaN counts against the model, too


def recall(text_ranks, image_ranks):
    """text_ranks (I,), image_ranks (C,) → {"TR@1", … "IR@10", "mean"} in percent. Text retrieval
    (TR) looks for a caption of an image, image retrieval (IR) for the image of a caption."""
    found = {}
    for way, best in (("TR", text_ranks), ("IR", image_ranks)):
        for k in (1, 5, 10):
            found[f"{way}@{k}"] = 100 * (best < k).double().mean().item()
    return found | {"mean": sum(found.values()) / 6}


# ---- Search --------------------------------------------------------------------------------------


def search(queries, gallery, relevant, second=None, block=2**24):
    """Ranks of all queries (Q, D) in the gallery (G, D): (Q,), on all processes, which share the
    work.

    relevant (2, P): the pairs (query, column) that belong together. second(scores (q, G), first
    query) → scores may reorder them. At most `block` scores, or one row of them, are in memory at a
    time.
    """
    rows = max(1, min(block // len(gallery), math.ceil(len(queries) / losses.world())))  # every process gets a block
    out = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for first in range(losses.rank() * rows, len(queries), losses.world() * rows):
        with torch.autocast(queries.device.type, enabled=False):  # rounded scores would tie
            scores = queries[first : first + rows] @ gallery.T  # (q, G)
        row, column = relevant[:, (relevant[0] >= first) & (relevant[0] < first + rows)]
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[row - first, column] = True
        out[first : first + rows] = ranks(second(scores, first) if second else scores, right)
    return losses.gather(out[None]).sum(0)


def embed_images(model, source, device, batch, count=None):
    """A source's pictures, or its first → unit vectors (I, D), on all processes, which share the work."""
    count = count or len(source)
    views = pictures(source, shard(count, batch), model.config.image_size, device)
    return losses.gather(torch.cat([model.embed_image(view) for view in views]))[:count]


def embed_texts(model, ids, mask, device, batch):
    """ids, mask (C, T) → unit vectors (C, D), on all processes, which share the work. A batch has
    texts of about one length, and is cut to it: COCO's captions have 13 tokens on average, the
    longest 40."""
    by_length = mask.sum(1).argsort(stable=True)
    # Each process gets texts of all lengths, sorted
    order = torch.cat([by_length[process :: losses.world()] for process in range(losses.world())])
    out = []
    for numbers in shard(len(order), batch):
        n = order[numbers]
        T = cut(mask[n])
        out.append(model.embed_text(ids[n, :T].to(device), mask[n, :T].to(device)))
    return losses.gather(torch.cat(out))[order.argsort().to(device)]


@torch.no_grad()
def retrieval(model, source, words, device, batch=64, rerank=0):
    """All pictures of a source against all its captions, by the dual encoder → {"TR@1", …, "mean"};
    if `rerank`, also with the ITM head on each query's best `rerank`, as "reranked TR@1", ….

    A caption is right for every picture that has it (in upper or lower case), or is of the same
    item, if source.by_text, else (Karpathy's splits) only for its own.
    """
    training = model.training
    model.eval()
    captions, items = [], []
    for i in range(len(source)):
        items.append(source[i].item)
        captions += [(i, caption) for caption in source[i].captions]
    ids, mask = words.encode_all([caption for _, caption in captions])  # (C, T)
    image = embed_images(model, source, device, batch)  # (I, D)
    text = embed_texts(model, ids, mask, device, batch)  # (C, D)
    relevant = relevant_pairs(captions, items, source.by_text).to(device)
    results = recall(search(image, text, relevant), search(text, image, relevant.flip(0)))
    if rerank:
        numbers = [part.tolist() for part in torch.arange(len(source)).split(batch)]
        views = pictures(source, numbers, model.config.image_size, device)
        images = torch.cat([view.cpu() for view in views])  # (I, 3, S, S): they are read many times
        reranker = Reranker(model, images, ids, mask, rerank, device, batch)
        by_image = search(image, text, relevant, functools.partial(reranker.reorder, image_asks=True))
        by_text = search(text, image, relevant.flip(0), functools.partial(reranker.reorder, image_asks=False))
        results |= {f"reranked {name}": value for name, value in recall(by_image, by_text).items()}
    model.train(training)
    return results


@torch.no_grad()
def retrieval_sheet(model, source, words, device, queries=4, best=5, among=500):
    """A picture: the best pictures for a source's first captions, among its first ones; those that
    have the caption in a green frame."""
    model.eval()
    count = min(among, len(source))
    image = embed_images(model, source, device, 64, count)  # (I, D)
    rows = []
    for i in range(min(queries, count)):
        caption = source[i].captions[0]
        ids, mask = words.encode_all([caption])
        scores = image @ model.embed_text(ids.to(device), mask.to(device))[0]  # (I,)
        found = results(source, caption, scores, scores.topk(min(best, count)).indices.tolist())
        rows.append((caption, [drawing.tile(source.image(k), label, right) for k, label, right in found]))
    return drawing.sheet(rows)


def relevant_pairs(captions, items, by_text):
    """captions: C pairs (image, caption); items: of each image → (2, P) int64, the pairs (image,
    number of the caption) that are right."""
    having, alike = collections.defaultdict(set), collections.defaultdict(set)
    for image, caption in captions:
        having[caption.lower()].add(image)
    for image, item in enumerate(items):
        alike[item].add(image)
    pairs = []
    for n, (image, caption) in enumerate(captions):
        owners = having[caption.lower()] | alike[items[image]] if by_text else {image}
        pairs += [(owner, n) for owner in sorted(owners)]
    return torch.tensor(pairs).T


# ---- Reranking -----------------------------------------------------------------------------------


class Reranker:
    """Reorders the K best columns of a block of scores with the ITM head, which has learned to tell
    a match from negatives drawn with probability softmax(s/σ): its log-odds are what s/σ leaves out
    of the logarithm of a match's probability."""

    def __init__(self, model, images, ids, mask, K, device, batch):
        """images (I, 3, S, S) uint8 and ids, mask (C, T) on the CPU."""
        self.model, self.images, self.ids, self.mask = model, images, ids, mask
        self.K, self.device, self.batch = K, device, batch

    def reorder(self, scores, first, image_asks):
        """Similarities (q, G) of images first, first + 1, … to all captions (image_asks), or of
        captions to all images → scores (q, G) by which the K best of each row stand before all
        others, in the order of s/σ + log-odds."""
        scores = self.model.scale() * scores
        best, column = scores.topk(min(self.K, scores.shape[1]))  # (q, K)
        answer = column.flatten().cpu()
        query = first + torch.arange(len(scores)).repeat_interleave(column.shape[1])
        odds = self.odds(query, answer) if image_asks else self.odds(answer, query)
        best = best + odds.view_as(best)
        best = best - best.amin(1, keepdim=True) + scores.amax(1, keepdim=True) + 1  # above all others
        return scores.scatter(1, column, best)

    def odds(self, image, caption):
        """Log-odds of a match, by the ITM head, of pairs of numbers (P,), (P,) → (P,)."""
        out = []
        for i, n in zip(image.split(self.batch), caption.split(self.batch)):
            T = cut(self.mask[n])
            text, mask = self.ids[n, :T].to(self.device), self.mask[n, :T].to(self.device)
            logits = self.model.match(text, mask, self.images[i].to(self.device)).float()
            out.append(logits[:, 1] - logits[:, 0])
        return torch.cat(out)


def reranked(model, best, scores, images, ids, mask):
    """best: K indices into `scores` → the same, sorted by s/σ + log-odds as in reorder, and {index:
    probability of a match}. images, ids, mask: of the K pairs, or one for all."""
    K, pair = len(best), torch.arange(len(best))
    images, ids, mask = images.expand(K, -1, -1, -1), ids.expand(K, -1), mask.expand(K, -1)
    odds = Reranker(model, images, ids, mask, K, scores.device, 64).odds(pair, pair)  # (K,)
    by_both = model.scale() * scores[best] + odds
    matches = dict(zip(best, odds.sigmoid().tolist()))
    return [best[k] for k in by_both.argsort(descending=True).tolist()], matches


def results(source, caption, scores, best):
    """Yields (number, label, whether it is known to be right) of the best pictures for a caption."""
    for rank, i in enumerate(best, start=1):
        yield i, f"{rank}.  {scores[i]:.3f}", caption in source[i].captions


# ---- The vectors of a folder of images -----------------------------------------------------------


@torch.no_grad()
def embed_pictures(model, source, numbers, device):
    """Pictures of a source by number → unit vectors (n, D), NaN for one that is unreadable, which
    is named."""
    views = Subset(Views(source, model.config.image_size), numbers)
    loader = DataLoader(views, 64, collate_fn=list, **runtime.workers(device))
    out = []
    for batch in tqdm(loader, leave=False, disable=len(numbers) < 1000):
        vectors = torch.full((len(batch), model.config.dim), torch.nan)
        for message in (one for one in batch if isinstance(one, str)):
            tqdm.write(f"{message}; it is left out")
        readable = [k for k, one in enumerate(batch) if not isinstance(one, str)]
        if readable:
            images = torch.stack([batch[k] for k in readable])
            vectors[readable] = model.embed_image(images.to(device)).cpu()
        out.append(vectors)
    return torch.cat(out)


def kept_vectors(model, source, path, checkpoint, device):
    """The pictures of a source → unit vectors (I, D), NaN for an unreadable one. They are kept in
    the file `path`, if it is named, and used again where neither a picture nor the checkpoint has
    changed."""
    if path is None:
        return embed_pictures(model, source, range(len(source)), device).to(device)
    trained = stamp(checkpoint)
    known = read_vectors(path, trained)
    stamps = [stamp_of_image(source[i]) for i in range(len(source))]
    missing = [i for i, key in enumerate(stamps) if key not in known]
    if missing:
        print(f"{path}: {len(missing)} of {len(source)} images are new")
        new = embed_pictures(model, source, missing, device)
        known |= dict(zip([stamps[i] for i in missing], new.numpy()))
        vectors = np.stack(list(known.values()))
        content = {"checkpoint": trained, "files": np.array(list(known)), "vectors": vectors}
        runtime.write(path, lambda file: np.savez(file, **content))
    return torch.from_numpy(np.stack([known[key] for key in stamps])).to(device)


def stamp(path):
    """A file's path, times (of its content, and of its permissions) and size."""
    state = os.stat(path)
    return f"{os.path.abspath(path)} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_size}"


def stamp_of_image(picture):
    """The stamp of a picture's file; in a shard, of the shard, and the picture's name."""
    if picture.at:
        return f"{stamp(picture.at[0])} {picture.image}"
    return stamp(picture.image) if os.path.exists(picture.image) else f"{picture.image} is missing"


def read_vectors(path, trained):
    """{stamp of a file: its vector (D,)}, by this checkpoint."""
    if not path.exists():
        return {}
    try:
        with np.load(path) as file:
            return dict(zip(file["files"].tolist(), file["vectors"])) if file["checkpoint"] == trained else {}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read, delete it: {error}") from None
