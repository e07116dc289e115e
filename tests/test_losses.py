"""The losses: numbers worked out by hand, and one process = many, in float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import bare

import losses
import runtime
import train
from mome import Config, VLMo
from stages import VL

SMALL = Config(dim=16, layers=2, heads=2, vl_layers=1, image_size=8, patch_size=4, vocab_size=40)


# ---- By hand -------------------------------------------------------------------------------------


def test_itc_by_hand():
    i2t = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    t2i = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    rows = [math.log(1 + math.exp(-margin)) for margin in (2, 0, 1, 1)]
    loss = losses.itc_loss(i2t, t2i, torch.eye(2, dtype=torch.bool))
    assert loss.item() == pytest.approx(sum(rows) / 4)


def test_itc_leaves_out_the_same_item_and_the_same_caption():
    scores = torch.randn(4, 4, dtype=torch.float64)
    ids = torch.tensor([[1, 10], [2, 1], [1, 30], [4, 1]])  # 0, 2 share the item; 1, 3 the caption
    same = losses.same_pairs(ids)  # the caption 1 is not the item 1
    assert same.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    kept = ~same | torch.eye(4, dtype=torch.bool)
    rows = [torch.logsumexp(scores[i][kept[i]], 0) - scores[i, i] for i in range(4)]
    assert losses.itc_loss(scores, scores, same).item() == pytest.approx(sum(rows).item() / 4)


def test_similarities_are_scaled_cosines_in_float32_under_autocast():
    image, text = F.normalize(torch.randn(2, 5, 64), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        i2t, t2i = losses.similarities(image, text, torch.tensor(100.0))
    assert i2t.dtype == torch.float32 and torch.equal(t2i, 100 * text @ image.T)
    torch.testing.assert_close(i2t, 100 * image @ text.T)


def test_negatives_are_drawn_from_the_softmax_over_candidates():
    torch.manual_seed(0)
    scores = torch.tensor([[9.0, 1.0, 2.0, 0.5]]).repeat(20_000, 1)
    candidate = torch.tensor([[False, True, True, True]]).expand(20_000, 4)
    drawn, found = losses.draw_negatives(scores, candidate)
    share = torch.bincount(drawn, minlength=4) / 20_000
    expected = F.pad(torch.tensor([1.0, 2.0, 0.5]).softmax(0), (1, 0))
    assert found.all()
    torch.testing.assert_close(share, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negatives_survive_scores_that_would_underflow(dtype):
    """Zeroing the own pair after the softmax would leave rows of zeros: exp(−1000) is 0."""
    scores = torch.full((50, 3), -1000.0, dtype=dtype)
    scores[:, 0] = 0.0
    candidate = torch.tensor([[False, True, True]]).expand(50, 3)
    drawn, found = losses.draw_negatives(scores, candidate)
    assert found.all() and set(drawn.tolist()) == {1, 2}


def test_rows_of_no_number_draw_a_candidate_and_rows_without_one_are_not_found():
    scores = torch.tensor([[math.nan, math.inf, 0.0], [1.0, 2.0, 3.0], [0.0, 9.0, 9.0]])
    candidate = torch.tensor([[True, False, True], [False] * 3, [True, False, False]])
    drawn, found = losses.draw_negatives(scores, candidate)
    assert found.tolist() == [True, False, True]
    assert drawn[0] in (0, 2) and 0 <= drawn[1] < 3 and drawn[2] == 0


def test_itm_by_hand_with_a_row_that_was_not_found():
    logits = torch.tensor([[0.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
    matched, found = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert losses.itm_loss(logits, matched, found).item() == pytest.approx(expected)


def test_mlm_is_a_mean_over_tokens_and_of_no_token_zero_with_a_gradient():
    logits, labels = torch.randn(5, 7, requires_grad=True), torch.tensor([0, 3, 6, 1, 1])
    loss = losses.masked_token_loss(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    loss = losses.masked_token_loss(logits[:0], labels[:0])
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


# ---- One process = many --------------------------------------------------------------------------


def batch_of():
    """Six pairs with very different numbers of masked tokens (the first three: none), short and
    long texts, and ids of which two share an item and two a caption."""
    torch.manual_seed(5)
    mask = torch.arange(16) < torch.tensor([3, 9, 16, 5, 12, 7])[:, None]
    text, labels = torch.randint(5, 40, (6, 16)), torch.full((6, 16), -100)
    labels[3, 1:12] = torch.randint(5, 40, (11,))
    labels[4, 2], labels[5, 3:5] = 7, 9
    ids = torch.tensor([[1, 11], [2, 12], [3, 13], [1, 14], [5, 12], [6, 16]])
    image = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    return {"image": image, "text": text, "mask": mask, "masked": text, "labels": labels, "ids": ids}


def my_share(batch):
    """Of two or three processes, the first one has no masked token."""
    b = 6 // losses.world()
    return {name: tensor[losses.rank() * b :][:b] for name, tensor in batch.items()}


def vl(names, switches):
    torch.manual_seed(0)
    model = VLMo(replace(SMALL, **switches))
    return bare(VL, model, loss_weights=dict.fromkeys(names, 1.0), negatives="global")


def most_similar(scores, candidate):
    """In place of the draw: the same negatives however many processes there are."""
    return scores.detach().masked_fill(~candidate, -math.inf).argmax(1), candidate.any(1)


def over_processes(x):
    if losses.world() > 1:
        dist.all_reduce(x)
    return x / losses.world()


def gradients(switches, lonely):
    """Gradients and values of each loss and of their sum, as DDP would have them."""
    losses.draw_negatives = most_similar
    names = ["itc", "itm", "mlm"]
    stage = vl(names, switches).double()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    batch = batch_of()
    if lonely:  # a row without a candidate on any process
        batch["ids"] = torch.tensor([[1, 1], [1, 2], [3, 1], [1, 4], [5, 1], [1, 6]])
    answers = {}
    for chosen in [[name] for name in names] + [names]:
        stage.zero_grad()
        values = stage(my_share(batch))
        loss = sum(values[name] for name in chosen)
        loss.backward()
        all_parameters = [torch.zeros_like(p) if p.grad is None else p.grad for p in stage.parameters()]
        flat = torch.cat([grad.flatten() for grad in all_parameters])
        answers["+".join(chosen)] = over_processes(flat), over_processes(loss.detach().clone())
    return answers


CASES = [
    ({}, False),
    ({"position": "relative", "layer_scale": 0.1}, False),
    ({"vl_layers": 0, "attention": "separate"}, True),
]


def several():
    return [gradients(*case) for case in CASES]


def exchanged(count=12):
    """Whether the exchange brings what a gather of everything would, and sends nothing else."""
    torch.manual_seed(losses.rank())
    b = count // losses.world()
    image = torch.randint(0, 256, (b, 3, 5, 4), dtype=torch.uint8)
    text = torch.randint(0, 99, (b, 2, 7))
    ids = torch.stack([torch.randint(0, 3, (b,)), torch.randint(0, 50, (b,))], dim=1)
    same, everyone, right = losses.same_pairs(ids), losses.gather(ids), []
    for _ in range(20):
        drawn, found = losses.draw_negatives(
            10 * torch.randn(b, count), losses.candidates(same, "global")
        )
        right += [torch.equal(losses.exchange(x, drawn), losses.gather(x)[drawn]) for x in (image, text)]
        right.append(not (everyone[drawn] == ids).any(1)[found].any().item())  # not the same pair
        drawn, found = losses.draw_negatives(torch.randn(b, count), losses.candidates(same, "local"))
        right.append((drawn[found] // b == losses.rank()).all().item())
    first = torch.zeros(b, dtype=torch.int64)  # everyone asks process 0 for its first sample
    right.append(torch.equal(losses.exchange(image, first), losses.gather(image)[first]))
    local = losses.candidates(torch.zeros(b, count, dtype=torch.bool), "local")
    mine = local[:, losses.own_columns(b, "cpu")]
    return all(right) and mine.all().item() and local.sum().item() == b * b


def gather_sums_gradients():
    """The gradient of gather is the sum over processes, and that of another reader stays."""
    count = 2 * losses.world()
    x, other = torch.ones(2, requires_grad=True), torch.zeros(count, requires_grad=True)
    (losses.gather(x) + other).backward(torch.full((count,), 3.0))
    return (other.grad == 3).all().item() and (x.grad == 3 * losses.world()).all().item()


def all_of_it():
    return [exchanged(), gather_sums_gradients(), several()]  # several() replaces the draw


@pytest.mark.parametrize("world", [2, 3])
def test_many_processes_have_the_gradients_of_one(world, processes, monkeypatch):
    monkeypatch.setattr(losses, "draw_negatives", losses.draw_negatives)  # restored after the test
    expected = several()
    for right, summed, found in processes(world, all_of_it):
        assert right and summed
        for one, many in zip(expected, found, strict=True):
            for name, (gradient, value) in one.items():
                gradient_many, value_many = many[name]
                assert gradient.norm() > 1e-3
                assert (gradient - gradient_many).norm() <= 1e-9 * gradient.norm(), name
                assert abs(value - value_many) <= 1e-9 * abs(value), name


# ---- A weight of 0 -------------------------------------------------------------------------------


TOP = "blocks.1."
UNREAD = {  # what only this loss reads; the experts are those of the top layer
    "itc": {"itc_image", "itc_text", "logit_scale", TOP + "experts.vision", TOP + "experts.language"},
    "itm": {"pooler", "itm_head"},
    "mlm": {"mlm_head"},
}
SEPARATE = {"vl_layers": 0, "attention": "separate"}  # of a pair, the top layer computes only text
IDLE = {TOP + part for part in ("experts.vision", "attention.query.vision", "attention.out.vision")}


@pytest.mark.parametrize("first", [0, 3])  # pairs without a masked token, and with some
@pytest.mark.parametrize(
    "names, switches, frozen",
    [
        ("itc", {}, UNREAD["itm"] | UNREAD["mlm"] | {TOP + "experts.vl"}),
        ("itm", {"position": "relative"}, UNREAD["itc"] | UNREAD["mlm"]),
        ("mlm", {}, UNREAD["itc"] | UNREAD["itm"]),
        ("itm mlm", SEPARATE, {"itc_image", "itc_text", "logit_scale"} | IDLE),
        ("itm mlm", {"experts": "shared"}, {"itc_image", "itc_text", "logit_scale"}),
        ("itc itm mlm", {}, set()), ("itc itm mlm", SEPARATE, set()),
    ],
)  # fmt: skip
def test_what_no_loss_reads_is_frozen_whatever_the_batch(names, switches, frozen, first):
    stage = vl(names.split(), switches)
    batch = {name: tensor[first : first + 3] for name, tensor in batch_of().items()}
    train.freeze_unread(stage, [batch], runtime.Runtime())
    for name, parameter in stage.model.named_parameters():
        unread = any(f"{name}.".startswith(f"{part}.") for part in frozen)
        assert parameter.requires_grad != unread, name


def test_one_pair_trains_without_negatives():
    names = ["itc", "itm", "mlm"]
    values = vl(names, {})({name: tensor[2:3] for name, tensor in batch_of().items()})
    sum(values[name] for name in names).backward()
    assert all(torch.isfinite(values[name]) for name in names) and values["itc"].item() == 0
