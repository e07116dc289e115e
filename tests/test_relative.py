"""Attention with relative positions: equal to what is written out, and keeping nothing of S × S."""

import math

import pytest
import torch

import relative
from relative import RelativeAttention


def written_out(q, k, v, table, index, mask):
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + table[:, index]
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


def inputs(B=5, H=3, R=4, S=7, d=6, dtype=torch.float64):
    """Heads of transposed rows, as the model has them, a table of 9 rows, and 1 to 5 keys a sample."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, n, H, d, dtype=dtype).transpose(1, 2) for n in (R, S, S))
    mask = torch.arange(S) < torch.arange(1, B + 1)[:, None, None, None]
    return q, k, v, torch.randn(H, 9, dtype=dtype), torch.randint(0, 9, (R, S)), mask


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("at_a_time", [1, 2, 5])
def test_it_is_attention_as_written_out(monkeypatch, masked, at_a_time):
    chunks = [slice(i, i + at_a_time) for i in range(0, 5, at_a_time)]
    monkeypatch.setattr(relative, "chunks", lambda q, k: chunks)
    q, k, v, table, index, mask = inputs()
    leaves, mask = [x.requires_grad_() for x in (q, k, v, table)], mask if masked else None
    plain = written_out(*leaves, index, mask)
    weight = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * weight).sum(), leaves)
    ours = RelativeAttention.apply(*leaves, index, mask)
    found = torch.autograd.grad((ours * weight).sum(), leaves)
    for a, b in zip((ours, *found), (plain, *expected)):
        assert (a - b).abs().max() < 1e-9


def test_the_batch_is_taken_in_chunks_that_cover_it():
    q, k = torch.empty(7, 12, 237, 1), torch.empty(7, 12, 237, 1)
    assert relative.chunks(q, k) == [slice(i, i + 1) for i in range(7)]
    few = relative.chunks(q[:, :, :1], k)  # one query a sample
    assert len(few) == 1 and len(q[few[0]]) == 7


def test_nothing_of_s_by_s_is_kept_for_the_backward_pass():
    q, k, v, table, index, mask = inputs(R=7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        RelativeAttention.apply(q.requires_grad_(), k, v, table, index, mask)
    floats = [tuple(x.shape) for x in kept if x.is_floating_point()]
    assert floats == [(5, 3, 7, 6)] * 3 + [(3, 9)]  # q, k, v, table


def test_in_bf16_it_is_as_exact_as_attention_written_out():
    """Errors against float64 of what comes out, and of all gradients."""
    exact = inputs(R=7, d=32)
    exact = [1.5 * x if x.is_floating_point() else x for x in exact]  # sharp attention
    weight = torch.randn(5, 3, 7, 32, dtype=torch.float64)

    def outcome(attention, half, table_type):
        q, k, v, table, index, mask = exact
        leaves = [x.to(half).requires_grad_() for x in (q, k, v)] + [table.to(table_type).requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16, enabled=half is torch.bfloat16):
            y = attention(*leaves, index, mask)
        return [y, *torch.autograd.grad((y.double() * weight).sum(), leaves)]

    right = outcome(written_out, torch.float64, torch.float64)
    ours = outcome(RelativeAttention.apply, torch.bfloat16, torch.float32)
    plain = outcome(written_out, torch.bfloat16, torch.float32)
    for a, b, c in zip(right, ours, plain):
        assert (b - a).norm() < 1.5 * (c - a).norm() < 0.1 * a.norm()
