"""Relative positions, as the released base and large models have them: a table of scores for each
layer and head, added to q·k, and attention that keeps none of them for the backward pass.

Shape letters: B batch, b of it at a time, H heads, R query rows, S key rows (T text tokens, then
1+N patches), d = D/H, P rows of the table.
"""

import math

import torch
import torch.nn.functional as F


def relative_index(text_len, side, reach):
    """Rows of the relative-position table for each (query, key), written query → key: BEiT's 2D
    offsets, then VLMo's text offsets.

    Returns text (T, T), image (1+N, 1+N) and the number of rows. With I = (2·side−1)² + 3: rows
    below I−3 are patch offsets; I−3, I−2, I−1 are [I_CLS] → patch, patch → [I_CLS], [I_CLS] →
    [I_CLS]; I and I+1 text → image and image → text; I+reach+(key−query) words; the last three are
    [T_CLS] → word, word → [T_CLS], [T_CLS] → [T_CLS].
    """
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).view(-1, 2)  # (N, 2): y, x
    offset = grid[:, None] - grid[None] + side - 1  # (N, N, 2), query − key
    I, N, T = (2 * side - 1) ** 2 + 3, side * side, text_len
    image = torch.empty(1 + N, 1 + N, dtype=torch.int64)
    image[1:, 1:] = offset[..., 0] * (2 * side - 1) + offset[..., 1]
    image[0, :], image[:, 0], image[0, 0] = I - 3, I - 2, I - 1  # in this order: the corner last

    size = I + 2 * reach + 2
    position = torch.arange(T)
    text = I + reach + position[None] - position[:, None]  # key − query
    text[0, :], text[:, 0], text[0, 0] = size - 3, size - 2, size - 1
    return text, image, size


def pair_index(text, image):
    """The same for a pair: text (T, T), image (1+N, 1+N) → (T+1+N, T+1+N)."""
    T, patches = len(text), len(image)
    across = image.max() + 1  # the table's row of (text, image); that of (image, text) is the next
    upper = torch.cat([text, across.expand(T, patches)], dim=1)
    lower = torch.cat([(across + 1).expand(patches, T), image], dim=1)
    return torch.cat([upper, lower])


def scores_of(table, index):
    """table (H, P), index (R, S) → the scores (H, R, S) that are added to q·k."""
    return table.index_select(1, index.flatten()).unflatten(1, index.shape)


class RelativeAttention(torch.autograd.Function):
    """softmax(q·kᵀ/√d + scores)·v. The backward pass computes the softmax again, for a few samples
    at a time, so that nothing of S × S is kept in between."""

    @staticmethod
    def forward(ctx, q, k, v, table, index, mask):
        """q (B, H, R, d); k, v (B, H, S, d); table (H, P); index (R, S) int64; mask None or (B, 1,
        1, S) bool, True = may be read → (B, H, R, d)."""
        scores = scores_of(table, index).to(q.dtype)
        y = torch.empty_like(q)
        for some in chunks(q, k):
            bias = scores if mask is None else scores.masked_fill(~mask[some], -math.inf)
            y[some] = F.scaled_dot_product_attention(q[some], k[some], v[some], bias)
        ctx.save_for_backward(q, k, v, table, index, mask)
        return y

    @staticmethod
    def backward(ctx, to_y):
        """to_y: the gradient of the loss with respect to y; likewise every name with to_."""
        q, k, v, table, index, mask = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[-1])
        scores = scores_of(table, index).to(q.dtype).to(table.dtype)  # rounded as in the forward pass
        to_q, to_k, to_v = (torch.empty_like(x) for x in (q, k, v))
        to_scores = torch.zeros_like(scores)
        for some in chunks(q, k):
            # The forward pass once more: probabilities (b, H, R, S), at least float32
            p = scores + (q[some] * scale) @ k[some].mT
            if mask is not None:
                p.masked_fill_(~mask[some], -math.inf)
            p = p.softmax(-1)

            # y = p·v, and the softmax has the gradient p·(to_p − Σ p·to_p)
            to_v[some] = p.to(v.dtype).mT @ to_y[some]
            to_p = (to_y[some] @ v[some].mT).to(p.dtype)
            to_s = torch.ops.aten._softmax_backward_data(to_p, p, -1, p.dtype)
            to_scores += to_s.sum(0)
            to_s = to_s.to(q.dtype)
            to_q[some] = to_s @ k[some] * scale
            to_k[some] = to_s.mT @ q[some] * scale
        to_table = torch.zeros_like(table).index_add_(1, index.flatten(), to_scores.flatten(1))
        return to_q, to_k, to_v, to_table, None, None


def chunks(q, k):
    """Slices of the batch, with so few samples each that their scores fit into a CPU's cache, or
    are small next to a GPU's memory."""
    at_once = 2**26 if q.is_cuda else 2**20
    step = max(1, at_once // (q.shape[1] * q.shape[2] * k.shape[2]))
    return [slice(first, first + step) for first in range(0, len(q), step)]
