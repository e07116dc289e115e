"""The losses of pre-training (Sections 3.3 and 3.4) as functions of tensors, and what they need of the
other processes.

Shape letters: b local batch, W processes, B = W·b global batch, D dim, V vocabulary, M masked
tokens.

Each process returns W times its share of a mean over the global batch. DDP averages gradients over
W processes, so the gradient is that of one process on the whole batch, and the average of the
returned values is the value of the loss. Without a process group W is 1 and nothing is sent.
Collective calls: all processes must make them in the same order.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


# ---- Between processes ---------------------------------------------------------------------------


class Gather(torch.autograd.Function):
    """All processes' rows, (b, …) → (B, …). Backward sums over processes: every loss reads all rows."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(world())[rank()]


def gather(x):
    """x (b, …), equally many rows per process → (B, …) in their order, differentiable."""
    return Gather.apply(x) if world() > 1 else x


def global_mean(total, count):
    """W · total / (sum of count over processes): W times this process's share of a mean, as above; 0
    if nothing is counted. count: a number or a tensor; of a step in parts, a part's on average."""
    count = total.new_ones(()) * count  # a tensor on the device, without making the host wait
    if world() > 1:
        dist.all_reduce(count)
    return world() * total / count.clamp(min=1e-6)


def over_processes(sums):
    """Sums (n,) of this process → those of all processes, as numbers."""
    return gather(sums[None]).sum(0).tolist()


def pad_alike(x):
    """x (…, T) → the same, padded with zeros to the longest T of all processes."""
    if world() == 1:
        return x
    longest = torch.tensor(x.shape[-1], device=x.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return F.pad(x, (0, int(longest) - x.shape[-1]))  # the host waits: processes exchange sizes


def exchange(x, drawn):
    """Rows x_global[drawn], moved from each owner to the process that drew them and to no other.

    x (b, …) local rows; drawn (b,) global indices → (b, …). A process receives b rows, whatever W.
    """
    if world() == 1:
        return x[drawn]
    b, me = len(x), rank()
    asked = gather(drawn).view(-1, b)  # (W, b): what each process asks for
    owner = asked // b  # (W, b)
    mine = owner == me  # (W, b): what I send, grouped by the process that asked
    send = x[asked[mine] - me * b]  # the host waits to know how many I send
    received = x.new_empty(x.shape)  # grouped by owner
    process = torch.arange(len(owner), device=x.device)
    to_receive = (owner[me] == process[:, None]).sum(1)  # (W,) rows from each process
    to_send = mine.sum(1)  # (W,) rows to each process
    to_receive, to_send = torch.stack([to_receive, to_send]).tolist()  # it waits again
    dist.all_to_all_single(received, send, to_receive, to_send)
    by_owner = owner[me].argsort(stable=True)  # the places in `drawn` of what was received
    return received[by_owner.argsort()]


# ---- Image-text contrast -------------------------------------------------------------------------


def same_pairs(ids):
    """ids (b, K) int64: what makes two pairs the same, say (item, caption) → (b, B) bool: those
    that share any.

    A pair shares all with itself. Pairs of one item or with one caption are no negatives of each
    other.
    """
    return (ids[:, None] == gather(ids)[None]).any(-1)


def similarities(image, text, scale):
    """s/σ of Eq. (3), (4). image, text (b, D) unit vectors, scale 1/σ → image-to-text,
    text-to-image, (b, B) each."""
    with torch.autocast(image.device.type, enabled=False):
        return scale * image @ gather(text).T, scale * text @ gather(image).T


def itc_loss(i2t, t2i, same):
    """Cross-entropy of Eq. (4), a mean over both directions and the b own rows, which is W times
    their share of the mean over B. i2t, t2i (b, B); same (b, B) bool, True = left out of the
    softmax, except for a row's own column."""
    own = rank() * len(same) + torch.arange(len(same), device=same.device)  # (b,): each row's own column
    left_out = same.scatter(1, own[:, None], False)
    i2t = i2t.masked_fill(left_out, -math.inf)
    t2i = t2i.masked_fill(left_out, -math.inf)
    return (F.cross_entropy(i2t, own) + F.cross_entropy(t2i, own)) / 2


# ---- Image-text matching -------------------------------------------------------------------------


def candidates(same, negatives):
    """Who may be a negative of whom, bool (b, B). negatives: "global" (Section 3.3), "local" (Table 6)."""
    if negatives == "global":
        return ~same
    b, local = len(same), torch.zeros_like(same)
    local[:, rank() * b : (rank() + 1) * b] = True  # this process's pairs
    return ~same & local


def draw_negatives(scores, candidate):
    """Draws one hard negative per row, with probability softmax(scores) over its candidates.

    scores, candidate (b, B) → drawn (b,), global indices; their probabilities (b,); found (b,)
    bool, False where a row has no candidate, so that its draw means nothing. The softmax is in at
    least float32. Non-finite scores draw something, too: that a run has diverged shows in its
    losses, which log.py checks.
    """
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).nan_to_num()
    found = candidate.any(1)
    scores = scores.masked_fill(~candidate & found[:, None], -math.inf)  # a row without a candidate stays as it is
    p = scores.softmax(1)
    # The largest p / Exp(1) is a draw from p. torch.multinomial checks p, for which the host would wait
    drawn = (p / torch.empty_like(p).exponential_()).argmax(1)
    return drawn, p.gather(1, drawn[:, None])[:, 0], found


def itm_loss(logits, matched, found, count):
    """Cross-entropy of matched or not, mean over the pairs that were found.

    logits (n, 2), class 1 = matched; matched (n,) bool; found (n,) bool, False = weight zero.
    count: how many were found, as in global_mean.
    """
    loss = F.cross_entropy(logits, matched.long(), reduction="none")  # (n,)
    return global_mean((loss * found).sum(), count)


# ---- Masked language and image modeling ----------------------------------------------------------


def masked_token_loss(logits, labels, count):
    """MLM over words, MIM over visual tokens: cross-entropy, mean over masked tokens (Sections 3.3,
    3.4).

    logits (M, V), labels (M,) int64; M may differ between processes and be 0. count: M, as in
    global_mean.
    """
    total = F.cross_entropy(logits, labels, reduction="sum")
    return global_mean(total, count)
