"""The losses: numbers worked out by hand, and one process = many, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import RELATIVE, SMALL, vl_stage

import losses
from loader import with_counts
from sides import pairs


def test_itc_is_cross_entropy_both_ways_without_the_same_item_and_the_same_caption():
    i2t, t2i = torch.randn(2, 4, 4, dtype=torch.float64)
    ids = torch.tensor([[1, 10], [2, 1], [1, 30], [4, 1]])  # 0, 2 share the item; 1, 3 the caption
    same = losses.same_pairs(ids)  # the caption 1 is not the item 1
    assert same.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    total = 0.0
    for scores in (i2t, t2i):
        for own, others in enumerate([[1, 3], [0, 2], [1, 3], [0, 2]]):
            margins = scores[own, others] - scores[own, own]
            total += math.log(1 + margins.exp().sum().item())
    assert losses.itc_loss(i2t, t2i, same).item() == pytest.approx(total / 8)


def test_similarities_are_scaled_cosines_in_float32_under_autocast():
    image, text = F.normalize(torch.randn(2, 5, 64), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        i2t, t2i = losses.similarities(image, text, torch.tensor(100.0))
    torch.testing.assert_close(i2t, 100 * image @ text.T)
    torch.testing.assert_close(t2i, 100 * text @ image.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negatives_are_drawn_from_the_softmax_over_candidates(dtype):
    """Over candidates only: next to exp(1000) all others would underflow."""
    scores = torch.tensor([[1000.0, 1.0, 2.0, 0.5]], dtype=dtype).repeat(20_000, 1)
    candidate = torch.tensor([[False, True, True, True]]).expand(20_000, 4)
    drawn, p, found = losses.draw_negatives(scores, candidate)
    share = torch.bincount(drawn, minlength=4) / 20_000
    expected = F.pad(torch.tensor([1.0, 2.0, 0.5]).softmax(0), (1, 0))
    assert found.all() and share[0] == 0
    torch.testing.assert_close(share, expected, atol=0.015, rtol=0)
    torch.testing.assert_close(p, expected[drawn])


def test_rows_of_no_number_draw_a_candidate_and_rows_without_one_are_not_found():
    scores = torch.tensor([[math.nan, math.inf, 0.0], [1.0, 2.0, 3.0], [0.0, 9.0, 9.0]])
    candidate = torch.tensor([[True, False, True], [False] * 3, [True, False, False]])
    drawn, p, found = losses.draw_negatives(scores, candidate)
    assert found.tolist() == [True, False, True]
    assert drawn[0] in (0, 2) and 0 <= drawn[1] < 3 and drawn[2] == 0


def test_itm_is_a_mean_over_the_pairs_that_were_found():
    logits = torch.tensor([[0.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
    matched, found = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert losses.itm_loss(logits, matched, found, found.sum()).item() == pytest.approx(expected)


def test_mlm_is_a_mean_over_tokens_and_of_no_token_zero_with_a_gradient():
    logits, labels = torch.randn(5, 7, requires_grad=True), torch.tensor([0, 3, 6, 1, 1])
    loss = losses.masked_token_loss(logits, labels, len(labels))
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    loss = losses.masked_token_loss(logits[:0], labels[:0], 0)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


NAMES = ["itc", "itm", "mlm"]
CASES = [  # fields of the Config, and whether some row has no candidate on any process
    ({}, False),
    (RELATIVE, False),
    ({"vl_layers": 0, "attention": "separate"}, True),
]


def batch_of_six():
    """Six pairs: the first three have no masked token; two share an item, two a caption."""
    batch = pairs(SMALL, 6)
    batch["labels"][:3] = -100
    batch["ids"] = torch.tensor([[1, 11], [2, 12], [3, 13], [1, 14], [5, 12], [6, 16]])
    return batch


def most_similar(scores, candidate):
    """In place of the draw: the same negatives however many processes there are."""
    drawn = scores.detach().masked_fill(~candidate, -math.inf).argmax(1)
    return drawn, torch.ones(len(drawn)), candidate.any(1)


def gradients():
    """{case and loss: gradient of all parameters, and value}, of this process's share of the
    batch. Of several processes, the first one has no masked token."""
    losses.draw_negatives = most_similar
    answers, b = {}, 6 // losses.world()
    for case, (switches, lonely) in enumerate(CASES):
        stage, batch = vl_stage(**switches), batch_of_six()
        if lonely:
            batch["ids"] = torch.tensor([[1, 1], [1, 2], [3, 1], [1, 4], [5, 1], [1, 6]])
        [share] = with_counts([{name: tensor[losses.rank() * b :][:b] for name, tensor in batch.items()}])
        values = stage(share)
        for name in NAMES:
            of = torch.autograd.grad(
                values[name], list(stage.parameters()), retain_graph=True,
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            flat = torch.cat([gradient.flatten() for gradient in of])
            both = flat, values[name].detach()
            answers[f"{case} {name}"] = [losses.gather(x[None]).mean(0) for x in both]  # as DDP has them
    return answers


def on_each_process():
    """What is sent between processes, then gradients."""
    torch.manual_seed(losses.rank())
    b = 12 // losses.world()
    for x in (torch.randint(0, 256, (b, 3, 5, 4), dtype=torch.uint8), torch.randn(b, 2, 7)):
        for drawn in (torch.zeros(b, dtype=torch.int64), *torch.randint(0, 12, (20, b))):
            assert torch.equal(losses.exchange(x, drawn), losses.gather(x)[drawn])
    local = losses.candidates(torch.zeros(b, 12, dtype=torch.bool), "local")
    mine = torch.arange(12) // b == losses.rank()
    assert torch.equal(local, mine.expand(b, 12))

    # The gradient of gather is the sum over processes, and that of another reader stays
    x, other = torch.ones(b, requires_grad=True), torch.zeros(12, requires_grad=True)
    later = 2 * other  # in the backward pass
    (losses.gather(x) + later).backward(torch.full((12,), 3.0))
    assert (other.grad == 6).all() and (x.grad == 3 * losses.world()).all()
    return gradients()  # which replaces the draw


@pytest.mark.parametrize("world", [2, 3])
def test_many_processes_have_the_gradients_of_one(world, processes, monkeypatch):
    monkeypatch.setattr(losses, "draw_negatives", losses.draw_negatives)  # restored after the test
    expected = gradients()
    for found in processes(world, on_each_process):
        for name, (gradient, value) in expected.items():
            gradient_many, value_many = found[name]
            assert gradient.norm() > 1e-3
            assert (gradient - gradient_many).norm() <= 1e-9 * gradient.norm(), name
            assert abs(value - value_many) <= 1e-9 * abs(value), name
