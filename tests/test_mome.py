"""The trunk: its equations, its routing, its masks, its positions, its size."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import RELATIVE, SMALL, refused, shaken

from mome import CONFIGS, Branch, GELULinear, MoME, VLMo
from relative import scores_of

VARIANTS = {
    "absolute": {},
    "relative": RELATIVE,
    "no vl experts": {"vl_layers": 0},
    "shared experts": {"experts": "shared"},
    "separate attention": {"attention": "separate"},
    "all fusing": {"vl_layers": 3},
}


def model_and_batch(switches=None):
    """A small model in float64, and three pairs, whose texts are shorter than the model allows."""
    torch.manual_seed(0)
    model = shaken(VLMo(replace(SMALL, **(switches or {})))).double()
    text = torch.randint(5, 50, (3, 9))
    mask = torch.arange(9) < torch.tensor([9, 7, 2])[:, None]
    return model, text, mask, torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name, variant, millions",
    [("base", "relative", 175.4), ("base_plus", "absolute", 166.6), ("large", "relative", 561.5)],
)
def test_trunk_has_as_many_parameters_as_the_released_one(name, variant, millions):
    with torch.device("meta"):
        trunk = MoME(replace(CONFIGS[name], **VARIANTS[variant]))
    assert round(sum(p.numel() for p in trunk.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    "fields",
    [{"dim": 25}, {"image_size": 18}, {"vl_layers": 4}, {"position": "rotary"}, {"experts": "none"},
     {"drop_path": 1.0}, {"max_text_len": 1}, {"position": "relative", "text_reach": 5},
     {"layers": 0, "vl_layers": 0}],
)  # fmt: skip
def test_fields_that_do_not_fit_are_refused(fields):
    refused(replace, SMALL, **fields, error=ValueError)


def test_matrices_start_from_a_normal_distribution_and_biases_from_zero():
    torch.manual_seed(0)
    for name, weight in VLMo(replace(SMALL, dim=96, init_std=0.05)).named_parameters():
        if weight.numel() > 4000:
            assert weight.std().item() == pytest.approx(0.05, rel=0.1), name
        elif name.endswith("bias"):
            assert not weight.any(), name


def plain_expert(expert, x):
    return expert.fc2(F.gelu(expert.fc1(expert.norm(x))))


def by_row(modules, names, x, apply=lambda module, x: module(x)):
    """Each row of x (B, S, D) through the module of its own name."""
    rows = [apply(modules[name], x[:, row]) for row, name in enumerate(names)]
    return torch.stack(rows, dim=1)


def plain_block(block, x, projections, experts, mask, bias):
    """Eq. (1) and (2) the obvious way. projections, experts: the name of each row's."""
    B, S, D = x.shape
    a, H = block.attention, block.attention.heads
    y = block.norm(x)
    q, k, v = (by_row(r, projections, y).view(B, S, H, D // H) for r in (a.query, a.key, a.value))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(D / H) + bias
    scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(B, S, D)
    branches = block.attention_branch, block.expert_branch
    gamma_1, gamma_2 = (1.0 if branch.gamma is None else branch.gamma for branch in branches)
    x = x + gamma_1 * by_row(a.out, projections, y)
    return x + gamma_2 * by_row(block.experts, experts, x, plain_expert)


def plain_routes(config, layer, kinds):
    """The names of each row's projections and expert. kinds: what each row is."""
    fuses, shared = layer >= config.layers - config.vl_layers, ["shared"] * len(kinds)
    experts = ["vl"] * len(kinds) if fuses and len(set(kinds)) == 2 else kinds
    projections = kinds if config.attention == "separate" and not fuses else shared
    return projections, shared if config.experts == "shared" else experts


@pytest.mark.parametrize("switches", VARIANTS.values(), ids=VARIANTS)
def test_the_trunk_is_equations_1_and_2_for_all_rows_and_for_the_leading_ones(switches):
    model, text, mask, image = model_and_batch(switches)
    words, patches = model.embed_words(text), model.embed_patches(image, 1)
    seen = torch.ones(3, 17, dtype=torch.bool)
    both, kinds = torch.cat([mask, seen], dim=1), ["language"] * 9 + ["vision"] * 17
    pair = torch.cat([words, patches], dim=1)
    cases = [  # kind of the input, its encoder; embedded rows, keys that may be read, kinds of rows
        ("image", partial(model.encode_image, image), patches, seen, kinds[9:]),
        ("text", partial(model.encode_text, text, mask), words, mask, kinds[:9]),
        ("pair", partial(model.encode_pair, text, mask, image), pair, both, kinds),
    ]
    for kind, encode, x, keys, kinds in cases:
        biases = [0.0] * 3
        if model.config.position == "relative":
            biases = [scores_of(*positions) for positions in model.positions(kind, kinds.count("language"))]
        for layer, (block, bias) in enumerate(zip(model.blocks, biases)):
            x = plain_block(block, x, *plain_routes(model.config, layer, kinds), keys, bias)
        for rows in (None, 1, 9):
            close(encode(rows=rows), model.norm(x)[:, :rows])
    longer = model.encode_text(F.pad(text, (0, 15)), F.pad(mask, (0, 15)))  # the longest
    close(model.encode_text(text, mask)[mask], longer[:, :9][mask])


def test_gelu_computed_twice_has_the_right_gradients():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).double() for shape in ((2, 5, 8), (3, 8), (3,)))
    parts = [part.requires_grad_() for part in (x, weight, bias)]
    assert torch.autograd.gradcheck(GELULinear.apply, parts)


def test_images_are_normalised_by_the_model_and_a_hidden_patch_cannot_change_the_output():
    model, _, _, image = model_and_batch()
    close(model.encode_image(image), model.encode_image(image.double() / 127.5 - 1))
    hidden, embedding = torch.zeros(3, 16, dtype=torch.bool), torch.randn(24).double()
    hidden[:, 5] = True  # row 1, column 1 of 4 × 4
    other = image.clone()
    other[:, :, 4:8, 4:8] = 255 - other[:, :, 4:8, 4:8]
    encode = partial(model.encode_image, mask_embedding=embedding)
    assert torch.equal(encode(image, masked=hidden), encode(other, masked=hidden))
    assert not torch.equal(encode(image, masked=hidden), encode(image, masked=hidden.roll(1, 1)))
    assert torch.equal(encode(image, masked=hidden & False), model.encode_image(image))


def test_drop_path_drops_whole_branches_keeps_the_mean_and_grows_with_depth():
    torch.manual_seed(0)
    branch, x = Branch(SMALL, drop=0.25), torch.ones(20_000, 2, 24)
    values = branch(x).flatten(1)
    assert ((values == 0).all(1) | torch.isclose(values, torch.tensor(1 / 0.75)).all(1)).all()
    assert abs(values.mean().item() - 1) < 0.02
    assert torch.equal(branch.eval()(x), x)
    blocks = MoME(replace(SMALL, drop_path=0.2)).blocks
    assert [block.expert_branch.drop for block in blocks] == pytest.approx([0.0, 0.1, 0.2])


def test_text_embeddings_have_dropout_at_the_rate_of_drop_path():
    torch.manual_seed(0)
    model, text = MoME(replace(SMALL, drop_path=0.25)), torch.randint(50, (200, 12))
    with torch.no_grad():
        trained, plain = (model.train(mode).embed_words(text) - model.types[0] for mode in (True, False))
    dropped = trained.abs() < 1e-6
    assert abs(dropped.float().mean() - 0.25) < 0.01 and not (plain.abs() < 1e-6).all(-1).any()
    torch.testing.assert_close(trained[~dropped], plain[~dropped] / 0.75, atol=1e-5, rtol=1e-4)


def test_scale_is_held_at_100_and_can_come_back():
    model, _, _, _ = model_and_batch()
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    scale = model.scale()
    scale.backward()
    assert scale.item() == model.logit_scale.grad.item() == pytest.approx(100)


def test_embeddings_are_unit_vectors_in_float32_under_autocast():
    model, text, mask, _ = model_and_batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = model.float().embed_text(text, mask)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))  # float32, too
