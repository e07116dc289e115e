"""The losses: numbers worked out by hand, and one process = many, in float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import losses
from mome import Config, VLMo
from train import VisionLanguageStage

SMALL = Config(dim=16, layers=2, heads=2, vl_layers=1, image_size=8, patch_size=4, vocab_size=40, max_text_len=16)


# ---- By hand ---------------------------------------------------------------------------------------------------------


def test_itc_by_hand():
    i2t = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    t2i = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    rows = lambda a, b: (math.log(1 + math.exp(-a)) + math.log(1 + math.exp(-b))) / 2
    loss = losses.itc_loss(i2t, t2i, torch.eye(2, dtype=torch.bool))
    assert loss.item() == pytest.approx((rows(2, 0) + rows(1, 1)) / 2)


def test_itc_leaves_out_the_same_item_and_the_same_caption():
    scores = torch.randn(4, 4, dtype=torch.float64)
    ids = torch.tensor([[1, 10], [2, 20], [1, 30], [4, 20]])  # 0 and 2 share the item, 1 and 3 the caption
    same = losses.same_pairs(ids)
    assert same.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    rows = [-(scores[i, i] - torch.logsumexp(scores[i][~same[i] | (torch.arange(4) == i)], 0)) for i in range(4)]
    assert losses.itc_loss(scores, scores, same).item() == pytest.approx(sum(rows).item() / 4)


def test_item_and_caption_hashes_are_not_mixed_up():
    assert not losses.same_pairs(torch.tensor([[1, 2], [2, 1]]))[0, 1]


def test_similarities_are_scaled_cosines():
    image, text = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
    i2t, t2i = losses.similarities(image, text, torch.tensor(3.0))
    torch.testing.assert_close(i2t, 3 * image @ text.T)
    torch.testing.assert_close(t2i, i2t.T)


def test_similarities_and_itc_stay_in_float32_under_autocast():
    image, text = torch.nn.functional.normalize(torch.randn(2, 5, 64), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        i2t, t2i = losses.similarities(image, text, torch.tensor(100.0))
    assert i2t.dtype == torch.float32
    torch.testing.assert_close(i2t, 100 * image @ text.T)


def test_negatives_are_drawn_from_the_softmax_over_candidates():
    torch.manual_seed(0)
    scores = torch.tensor([[9.0, 1.0, 2.0, 0.5]]).repeat(20_000, 1)
    candidate = torch.tensor([[False, True, True, True]]).expand(20_000, 4)
    drawn, found = losses.draw_negatives(scores, candidate)
    share = torch.bincount(drawn, minlength=4) / 20_000
    assert found.all()
    torch.testing.assert_close(
        share, torch.tensor([0.0, *torch.tensor([1.0, 2.0, 0.5]).softmax(0)]), atol=0.015, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negatives_survive_scores_that_would_underflow(dtype):
    """Zeroing the own pair after the softmax would leave rows of zeros: exp(−1000) is 0."""
    scores = torch.full((50, 3), -1000.0, dtype=dtype)
    scores[:, 0] = 0.0
    drawn, found = losses.draw_negatives(scores, torch.tensor([[False, True, True]]).expand(50, 3))
    assert found.all() and set(drawn.tolist()) == {1, 2}


def test_scores_that_are_not_numbers_draw_a_candidate_all_the_same():
    drawn, _ = losses.draw_negatives(torch.tensor([[math.nan, math.inf, 0.0]]), torch.tensor([[True, False, True]]))
    assert drawn.item() in (0, 2)


def test_a_row_without_candidates_is_not_found():
    drawn, found = losses.draw_negatives(torch.randn(2, 3), torch.tensor([[False] * 3, [True, False, False]]))
    assert found.tolist() == [False, True] and drawn[1] == 0 and 0 <= drawn[0] < 3


def test_no_negative_shares_its_item_or_caption():
    for seed in range(50):
        torch.manual_seed(seed)
        ids = torch.stack([torch.randint(0, 4, (12,)), torch.randint(0, 6, (12,))], dim=1)
        same = losses.same_pairs(ids)
        drawn, found = losses.draw_negatives(20 * torch.randn(12, 12), losses.candidates(same, "global"))
        for row in found.nonzero().flatten().tolist():
            assert not (ids[row] == ids[drawn[row]]).any()


def test_itm_by_hand_with_a_row_that_was_not_found():
    logits = torch.tensor([[0.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
    loss = losses.itm_loss(logits, torch.tensor([True, False, False]), torch.tensor([True, True, False]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2)


def test_mlm_of_no_token_is_zero_and_has_a_gradient():
    logits = torch.zeros(0, 7, requires_grad=True)
    loss = losses.masked_token_loss(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 7)


def test_mlm_is_a_mean_over_tokens():
    logits, labels = torch.randn(5, 7), torch.tensor([0, 3, 6, 1, 1])
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(losses.masked_token_loss(logits, labels), expected)


# ---- One process = many ----------------------------------------------------------------------------------------------


def batch_of(pairs=6):
    """Pairs with very different numbers of masked tokens (the first three: none), short and long texts, and ids of
    which two share an item and two a caption."""
    g = torch.Generator().manual_seed(5)
    integers = lambda low, high, *shape: torch.randint(low, high, shape, generator=g)
    mask = torch.arange(16) < torch.tensor([3, 9, 16, 5, 12, 7])[:pairs, None]
    text, labels = integers(5, 40, pairs, 16), torch.full((pairs, 16), -100)
    labels[3, 1:12], labels[4, 2], labels[5, 3:5] = integers(5, 40, 11), 7, 9  # on W = 2 and 3: none on process 0
    ids = torch.tensor([[1, 11], [2, 12], [3, 13], [1, 14], [5, 12], [6, 16]])
    return {
        "image": integers(0, 256, pairs, 3, 8, 8).byte(),
        "text": text,
        "mask": mask,
        "masked": text.clone(),
        "labels": labels,
        "ids": ids,
    }


def most_similar(scores, candidate):
    """In place of the draw: the same negatives however many processes there are."""
    return scores.detach().masked_fill(~candidate, -math.inf).argmax(1), candidate.any(1)


def gradients(switches, names, alone):
    """The gradients and values of the losses `names`, one after the other and summed, as DDP would have them."""
    losses.draw_negatives = most_similar
    torch.manual_seed(0)
    stage = VisionLanguageStage(VLMo(replace(SMALL, **switches)).double(), ["itc", "itm", "mlm"])
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    batch = batch_of()
    if alone:  # a row that has no candidate on any process
        batch["ids"] = torch.tensor([[1, 1], [1, 2], [3, 1], [1, 4], [5, 1], [1, 6]])
    b = 6 // losses.world()
    batch = {name: tensor[losses.rank() * b :][:b] for name, tensor in batch.items()}
    answers = {}
    for chosen in [[name] for name in names] + [names]:
        stage.zero_grad()
        values = stage(batch)
        loss = sum(values[name] for name in chosen)
        loss.backward()
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in stage.parameters()])
        flat, value = flat.clone(), loss.detach().clone()
        if losses.world() > 1:
            dist.all_reduce(flat), dist.all_reduce(value)
        answers["+".join(chosen)] = (flat / losses.world(), value / losses.world())
    return answers


def several(cases):
    return [gradients(*case) for case in cases]


CASES = [
    ({}, ["itc", "itm", "mlm"], False),
    ({"position": "relative", "layer_scale": 0.1}, ["itc", "itm", "mlm"], False),
    ({"vl_layers": 0, "attention": "separate"}, ["itc", "itm", "mlm"], True),
]


def both():
    return [exchanged(12), several(CASES)]  # several() replaces the draw


@pytest.fixture(scope="module", params=[2, 3])
def many(request, processes):
    """Of each of two, and of three, processes: what both() returns."""
    return processes(request.param, both)


def test_gradients_equal_those_of_one_process(many, monkeypatch):
    monkeypatch.setattr(losses, "draw_negatives", losses.draw_negatives)  # restored after the test
    expected = several(CASES)
    [_, found] = many[0]
    for one, many in zip(expected, found):
        assert one.keys() == many.keys() and len(one) == 4
        for name in one:
            (gradient, value), (gradient_many, value_many) = one[name], many[name]
            assert gradient.norm() > 1e-3
            assert (gradient - gradient_many).norm() <= 1e-9 * gradient.norm(), name
            assert abs(value - value_many) <= 1e-9 * abs(value), name


def temperature_gradient():
    """Of ITC, with respect to 1/σ alone, on this process's share of six fixed pairs."""
    image, text = torch.nn.functional.normalize(
        torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    b = 6 // losses.world()
    mine = slice(losses.rank() * b, losses.rank() * b + b)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(12).view(6, 2)[mine]
    i2t, t2i = losses.similarities(image.double()[mine], text.double()[mine], scale)
    losses.itc_loss(i2t, t2i, losses.same_pairs(ids)).backward()
    return scale.grad


def gather_leaves_its_own_gradient_alone():
    x, w = torch.ones(2, requires_grad=True), torch.zeros(2 * losses.world(), requires_grad=True)
    (losses.gather(x) + w).backward(torch.full((2 * losses.world(),), 3.0))
    return (w.grad == 3).all().item() and (x.grad == 3 * losses.world()).all().item()


def exchanged(world_pairs):
    """What arrives by the exchange, beside what a gather of everything would have picked; and drawn items."""
    torch.manual_seed(losses.rank())
    b = world_pairs // losses.world()
    image = torch.randint(0, 256, (b, 3, 5, 4), dtype=torch.uint8)
    text = torch.randint(0, 99, (b, 2, 7))
    ids = torch.stack([torch.randint(0, 3, (b,)), torch.randint(0, 50, (b,))], dim=1)
    everyone = losses.gather(ids)
    right = True
    for _ in range(20):
        drawn, found = losses.draw_negatives(
            10 * torch.randn(b, world_pairs), losses.candidates(losses.same_pairs(ids), "global")
        )
        right &= torch.equal(losses.exchange(image, drawn), losses.gather(image)[drawn])
        right &= torch.equal(losses.exchange(text, drawn), losses.gather(text)[drawn])
        right &= not (everyone[drawn] == ids).any(1)[found].any().item()
        nearby = losses.candidates(losses.same_pairs(ids), "local")
        drawn, found = losses.draw_negatives(torch.randn(b, world_pairs), nearby)
        right &= (drawn[found] // b == losses.rank()).all().item()
    one_owner = torch.zeros(b, dtype=torch.int64)  # everyone asks process 0 for its first sample
    right &= torch.equal(losses.exchange(image, one_owner), losses.gather(image)[one_owner])
    only_own = losses.candidates(torch.zeros(b, world_pairs, dtype=torch.bool), "local")
    own = losses.own_columns(b, "cpu")
    right &= gather_leaves_its_own_gradient_alone()
    right &= only_own[:, own].all().item() and only_own.sum().item() == b * b
    return right, temperature_gradient()


def test_exchange_brings_what_a_full_gather_would(many):
    answers = [answer for answer, _ in many]
    assert all(right for right, _ in answers)
    mean = sum(gradient for _, gradient in answers) / len(many)
    assert abs(mean - temperature_gradient()) <= 1e-9 * abs(mean)


# ---- A weight of 0 ---------------------------------------------------------------------------------------------------

ABLATIONS = [
    {},
    {"vl_layers": 0},
    {"vl_layers": 2},
    {"experts": "shared"},
    {"attention": "separate"},
    {"attention": "separate", "vl_layers": 0},
    {"attention": "separate", "vl_layers": 0, "experts": "shared"},
    {"position": "relative", "layer_scale": 0.1},
]


@pytest.mark.parametrize(
    "active",
    [["itc"], ["itm"], ["mlm"], ["itc", "itm"], ["itc", "mlm"], ["itm", "mlm"], ["itc", "itm", "mlm"]],
    ids="+".join,
)
def test_every_trainable_parameter_gets_a_gradient(active):
    for switches in ABLATIONS:
        torch.manual_seed(0)
        stage = VisionLanguageStage(VLMo(replace(SMALL, **switches)), active)
        values = stage(batch_of())
        assert list(values) == [name for name in ("itc", "mlm", "itm") if name in active] + ["scale"]
        sum(values[name] for name in active).backward()
        for name, parameter in stage.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, (switches, name)


@pytest.mark.parametrize("active", [["itm"], ["mlm"]])
def test_a_single_loss_freezes_the_heads_of_the_others(active):
    stage = VisionLanguageStage(VLMo(SMALL), active)
    frozen = {
        name.split(".")[1]
        for name, p in stage.named_parameters()
        if not p.requires_grad and not name.startswith("model.blocks")
    }
    heads = {"itm": {"pooler", "itm_head"}, "mlm": {"mlm_head"}}
    assert frozen == {"itc_image", "itc_text", "logit_scale"} | set().union(
        *(h for name, h in heads.items() if name not in active)
    )


def test_one_pair_alone_trains_without_negatives():
    stage = VisionLanguageStage(VLMo(SMALL), ["itc", "itm", "mlm"])
    values = stage({name: tensor[2:3] for name, tensor in batch_of().items()})
    sum(values.values()).backward()
    assert all(torch.isfinite(value) for value in values.values()) and values["itc"].item() == 0
