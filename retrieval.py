"""Retrieval of captions by pictures and of pictures by captions (Section 3.5, Table 2): ranks and
recall, search in blocks, reranking with the matching head. Any number of processes gives the same
answer.

Shape letters: I images, C captions, D dim, Q queries, G gallery, P pairs, T text tokens.
"""

import collections
import math

import torch

import losses
from data import pictures, shard
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
    """Ranks of (images,), (captions,) → {"TR@1", … "IR@10", "mean"} in percent. Text retrieval (TR)
    looks for a caption of an image, image retrieval (IR) for the image of a caption."""
    found = {}
    for way, ranks in (("TR", text_ranks), ("IR", image_ranks)):
        for k in (1, 5, 10):
            found[f"{way}@{k}"] = 100 * (ranks < k).double().mean().item()
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


def embed_images(model, source, device, batch):
    """The pictures of a source → unit vectors (I, D), on all processes, which share the work."""
    views = pictures(source, shard(len(source), batch), model.config.image_size, device)
    return losses.gather(torch.cat([model.embed_image(view) for view in views]))[: len(source)]


def embed_texts(model, ids, mask, device, batch):
    """ids, mask (C, T) → unit vectors (C, D), on all processes, which share the work. A batch has
    texts of about one length, and is cut to it: COCO's captions have 13 tokens on average, the
    longest 40."""
    by_length = mask.sum(1).argsort(stable=True)
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

    A caption is right for every picture that has it if source.by_text, else (Karpathy's splits)
    only for its own.
    """
    training = model.training
    model.eval()
    captions = [(i, caption) for i in range(len(source)) for caption in source[i].captions]
    ids, mask = words.encode_all([caption for _, caption in captions])  # (C, T)
    image = embed_images(model, source, device, batch)  # (I, D)
    text = embed_texts(model, ids, mask, device, batch)  # (C, D)
    relevant = relevant_pairs(captions, source.by_text).to(device)
    results = recall(search(image, text, relevant), search(text, image, relevant.flip(0)))
    if rerank:
        images = all_images(source, model.config.image_size, device, batch)
        reranker = Reranker(model, images, ids, mask, rerank, device, batch)
        by_image = search(image, text, relevant, reranker.captions)
        by_text = search(text, image, relevant.flip(0), reranker.pictures)
        results |= {f"reranked {name}": value for name, value in recall(by_image, by_text).items()}
    model.train(training)
    return results


def all_images(source, size, device, batch):
    """The images of a source on the CPU: uint8 (I, 3, S, S). Reranking reads each of them many
    times."""
    numbers = torch.arange(len(source)).split(batch)
    images = torch.empty(len(source), 3, size, size, dtype=torch.uint8)
    for n, views in zip(numbers, pictures(source, [part.tolist() for part in numbers], size, device)):
        images[n] = views.cpu()
    return images


def relevant_pairs(captions, by_text):
    """captions: C pairs (image, caption) → (2, P) int64, the pairs (image, number of the caption)
    that are right."""
    owners = collections.defaultdict(list)
    for image, caption in captions:
        owners[caption].append(image)
    pairs = []
    for n, (image, caption) in enumerate(captions):
        pairs += [(owner, n) for owner in (owners[caption] if by_text else [image])]
    return torch.tensor(pairs).T


# ---- Reranking -----------------------------------------------------------------------------------


def reorder(scores, best, column, odds):
    """s/σ (q, G) and each row's K best, values and columns (q, K) → scores by which these stand
    before all others, in the order of s/σ + odds (q, K).

    The ITM head has learned to tell a match from negatives drawn with probability softmax(s/σ): its
    log-odds are what s/σ leaves out of the logarithm of a match's probability.
    """
    best = best + odds
    return scores.scatter(1, column, best - best.amin(1, keepdim=True) + scores.amax(1, keepdim=True) + 1)


class Reranker:
    """Reorders the K best columns of a block of scores with the ITM head."""

    def __init__(self, model, images, ids, mask, K, device, batch):
        """images (I, 3, S, S) uint8 and ids, mask (C, T) on the CPU."""
        self.model, self.images, self.ids, self.mask = model, images, ids, mask
        self.K, self.device, self.batch = K, device, batch

    def captions(self, scores, first):
        """Similarities of images first, first + 1, … to all captions (q, C) → scores (q, C)."""
        return self.reorder(scores, first, image_asks=True)

    def pictures(self, scores, first):
        """Similarities of captions first, first + 1, … to all images (q, I) → scores (q, I)."""
        return self.reorder(scores, first, image_asks=False)

    def reorder(self, scores, first, image_asks):
        scores = self.model.scale() * scores
        best, column = scores.topk(min(self.K, scores.shape[1]))  # (q, K)
        answer = column.flatten().cpu()
        query = first + torch.arange(len(scores)).repeat_interleave(column.shape[1])
        odds = self.odds(query, answer) if image_asks else self.odds(answer, query)
        return reorder(scores, best, column, odds.view_as(best))

    def odds(self, image, caption):
        """Log-odds of a match, by the ITM head, of pairs of numbers (P,), (P,) → (P,)."""
        out = []
        for i, n in zip(image.split(self.batch), caption.split(self.batch)):
            T = cut(self.mask[n])
            text, mask = self.ids[n, :T].to(self.device), self.mask[n, :T].to(self.device)
            states = self.model.encode_pair(text, mask, self.images[i].to(self.device), rows=1)
            logits = self.model.itm_head(self.model.pool(states)).float()
            out.append(logits[:, 1] - logits[:, 0])
        return torch.cat(out)
