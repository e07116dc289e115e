"""The trunk: its equations, its routing, its masks, its positions, its size."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mome import CONFIGS, Branch, Config, GELULinear, MoME, VLMo, relative_index

SMALL = Config(
    dim=24, layers=3, heads=3, vl_layers=1, image_size=16, patch_size=4, vocab_size=50, max_text_len=12
)  # fmt: skip
VARIANTS = {
    "absolute": {},
    "relative": {"position": "relative", "layer_scale": 0.1},
    "no vl experts": {"vl_layers": 0},
    "shared experts": {"experts": "shared"},
    "separate attention": {"attention": "separate"},
    "all fusing": {"vl_layers": 3},
}
variants = pytest.mark.parametrize("switches", VARIANTS.values(), ids=VARIANTS)


def model_and_batch(switches=None):
    """A small model in float64 with no parameter left at a symmetric start, and a batch of three
    pairs."""
    torch.manual_seed(0)
    model = VLMo(replace(SMALL, **(switches or {}))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    text = torch.randint(5, 50, (3, 12))
    mask = torch.arange(12) < torch.tensor([12, 7, 2])[:, None]
    return model, text, mask, torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---- Size and configuration ----------------------------------------------------------------------


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
    with pytest.raises(ValueError):
        replace(SMALL, **fields)


# ---- Equations (1) and (2) -----------------------------------------------------------------------


def plain_block(block, x, experts, mask, bias):
    """Eq. (1) and (2) the obvious way: one row at a time through its expert, softmax written out.
    experts: the name of each row's."""
    B, S, D = x.shape
    a, H = block.attention, block.attention.heads
    y = block.norm(x)
    q, k, v = (router["shared"](y).view(B, S, H, D // H) for router in (a.query, a.key, a.value))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(D / H) + bias
    scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(B, S, D)
    branches = block.attention_branch, block.expert_branch
    gamma_1, gamma_2 = (1.0 if branch.gamma is None else branch.gamma for branch in branches)
    x = x + gamma_1 * a.out["shared"](y)
    rows = []
    for row in range(S):
        expert = block.experts[experts[row]]
        h = F.layer_norm(x[:, row], (D,), expert.norm.weight, expert.norm.bias, eps=1e-6)
        h = expert.fc1(h)
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        rows.append(x[:, row] + gamma_2 * expert.fc2(h))
    return torch.stack(rows, dim=1)


def table_row(q, k, T, side, reach):
    """The row of the relative table for rows q, k of an input, by the rules one at a time."""
    I = (2 * side - 1) ** 2 + 3
    last = I + 2 * reach + 2
    if q < T and k < T:
        cls = {(True, True): last - 1, (True, False): last - 3, (False, True): last - 2}
        return cls.get((q == 0, k == 0), I + reach + k - q)
    if q < T or k < T:
        return I if q < T else I + 1
    q, k = q - T, k - T
    if q == 0 or k == 0:
        return I - 1 if q == k else I - 3 if q == 0 else I - 2
    (yq, xq), (yk, xk) = divmod(q - 1, side), divmod(k - 1, side)
    return (yq - yk + side - 1) * (2 * side - 1) + xq - xk + side - 1


@pytest.mark.parametrize("variant", ["absolute", "relative"])
def test_the_trunk_is_equations_1_and_2(variant):
    model, text, mask, image = model_and_batch(VARIANTS[variant])
    words, patches = model.embed_words(text), model.embed_patches(image, 1)
    seen = torch.ones(3, 17, dtype=torch.bool)
    below, pair = ["language"] * 12 + ["vision"] * 17, torch.cat([words, patches], dim=1)
    cases = [  # output; embedded rows, T, keys; experts of the lower layers, and of the top one
        (model.encode_image(image), patches, 0, seen, below[12:], below[12:]),
        (model.encode_text(text, mask), words, 12, mask, below[:12], below[:12]),
        (model.encode_pair(text, mask, image), pair, 12, torch.cat([mask, seen], 1), below, ["vl"] * 29),
    ]
    for found, x, T, keys, lower, top in cases:
        S, bias = x.shape[1], torch.zeros(3, 3, 1, 1)
        if variant == "relative":
            index = torch.tensor([[table_row(q, k, T, 4, 196) for k in range(S)] for q in range(S)])
            bias = model.relative_table[index].view(S, S, 3, 3).permute(2, 3, 0, 1)  # (L, H, S, S)
        for block, experts, layer_bias in zip(model.blocks, (lower, lower, top), bias):
            x = plain_block(block, x, experts, keys, layer_bias)
        close(found, model.norm(x))


def test_relative_table_has_a_row_for_every_case_and_no_two_cases_share_one():
    text, image, size = relative_index(text_len=6, side=3, reach=6)
    assert size == 28 + 2 * 6 + 2
    assert image.min() == 0 and image.max() == 27 and text.max() == size - 1
    assert not set(text.flatten().tolist()) & (set(image.flatten().tolist()) | {28, 29})


@pytest.mark.parametrize("learns", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1)])
def test_gelu_computed_twice_has_the_gradients_of_gelu_kept(learns):
    torch.manual_seed(0)
    shapes = (2, 5, 8), (3, 8), (3,)
    x, weight, bias = parts = [torch.randn(shape).double() for shape in shapes]
    inputs = [part.requires_grad_() for part, on in zip(parts, learns) if on]
    wanted, found = F.linear(F.gelu(x), weight, bias), GELULinear.apply(x, weight, bias)
    assert torch.equal(wanted, found)
    grad = torch.randn(2, 5, 3).double()
    wanted, found = (torch.autograd.grad(output, inputs, grad) for output in (wanted, found))
    for one, other in zip(wanted, found):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# ---- The three inputs ----------------------------------------------------------------------------


@variants
def test_computing_only_leading_rows_changes_nothing(switches):
    model, text, mask, image = model_and_batch(switches)
    pair = model.encode_pair(text, mask, image)
    close(model.encode_pair(text, mask, image, rows=12), pair[:, :12])
    close(model.encode_pair(text, mask, image, rows=1), pair[:, :1])
    close(model.encode_text(text, mask, rows=1), model.encode_text(text, mask)[:, :1])
    close(model.encode_image(image, rows=1), model.encode_image(image)[:, :1])


@variants
def test_padding_is_never_read(switches):
    model, text, mask, image = model_and_batch(switches)
    other = torch.where(mask, text, (text + 17) % 50)
    close(model.encode_text(other, mask)[mask], model.encode_text(text, mask)[mask])
    real, pair = F.pad(mask, (0, 17), value=True), model.encode_pair(text, mask, image)
    close(model.encode_pair(other, mask, image)[real], pair[real])
    # Less padding: the two short texts cut to 7
    text, mask, image = text[1:, :7], mask[1:, :7], image[1:]
    close(model.encode_pair(text, mask, image)[F.pad(mask, (0, 17), value=True)], pair[1:][real[1:]])
    close(model.encode_text(text, mask)[mask], model.encode_text(F.pad(text, (0, 5)), F.pad(mask, (0, 5)))[:, :7][mask])


def reached(model, output, start):
    """Parts of names, below `start`, of the parameters that get a gradient from an output."""
    model.zero_grad()
    output.sum().backward()
    return {
        name.removeprefix(start).split(".")[0]
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.any() and name.startswith(start)
    }


def test_each_input_trains_its_own_experts_projections_and_embeddings():
    model, text, mask, image = model_and_batch(VARIANTS["separate attention"])
    inputs = {
        "vision": lambda: model.encode_image(image),
        "language": lambda: model.encode_text(text, mask),
        "vl": lambda: model.encode_pair(text, mask, image),
    }
    embeddings = {"vision": {"patches", "image_cls", "image_position"}, "language": {"words", "text_norm", "text_position"}}
    embeddings["vl"] = embeddings["vision"] | embeddings["language"]
    for name, encode in inputs.items():
        below = {"vision", "language"} if name == "vl" else {name}
        assert reached(model, encode(), "") == embeddings[name] | {"types", "blocks", "norm"}
        assert reached(model, encode(), "blocks.2.experts.") == {name}
        for layer in "01":
            assert reached(model, encode(), f"blocks.{layer}.experts.") == below
            assert reached(model, encode(), f"blocks.{layer}.attention.query.") == below
        assert reached(model, encode(), "blocks.2.attention.query.") == {"shared"}


def test_images_are_normalised_by_the_model_and_the_second_one_has_its_own_type():
    model, text, mask, image = model_and_batch()
    close(model.encode_image(image), model.encode_image(image.double() / 127.5 - 1))
    second = model.encode_pair(text, mask, image, image_type=2)
    assert not torch.allclose(second, model.encode_pair(text, mask, image))


@variants
def test_a_hidden_patch_cannot_change_the_output_but_its_place_can(switches):
    model, _, _, image = model_and_batch(switches)
    hidden, embedding = torch.zeros(3, 16, dtype=torch.bool), torch.randn(24, dtype=torch.float64)
    hidden[:, 5] = True  # row 1, column 1 of 4 × 4
    other = image.clone()
    other[:, :, 4:8, 4:8] = 255 - other[:, :, 4:8, 4:8]
    encoded = model.encode_image(image, masked=hidden, mask_embedding=embedding)
    assert torch.equal(encoded, model.encode_image(other, masked=hidden, mask_embedding=embedding))
    moved = hidden.roll(1, 1)
    assert not torch.equal(encoded, model.encode_image(image, masked=moved, mask_embedding=embedding))
    nothing = model.encode_image(image, masked=hidden & False, mask_embedding=embedding)
    assert torch.equal(nothing, model.encode_image(image))


# ---- Parts ---------------------------------------------------------------------------------------


def test_drop_path_drops_whole_branches_keeps_the_mean_and_grows_with_depth():
    torch.manual_seed(0)
    branch, x = Branch(SMALL, drop=0.25), torch.ones(20_000, 2, 24)
    values = branch(x).flatten(1)
    assert ((values == 0).all(1) | torch.isclose(values, torch.tensor(1 / 0.75)).all(1)).all()
    assert abs(values.mean().item() - 1) < 0.02
    assert torch.equal(branch.eval()(x), x)
    blocks = MoME(replace(SMALL, drop_path=0.2)).blocks
    assert [block.expert_branch.drop for block in blocks] == pytest.approx([0.0, 0.1, 0.2])


def test_scale_is_held_at_100_and_can_come_back():
    model, _, _, _ = model_and_batch()
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    scale = model.scale()
    scale.backward()
    assert scale.item() == pytest.approx(100) and model.logit_scale.grad.item() == pytest.approx(100)


def test_embeddings_are_unit_vectors_of_the_cls_rows_in_float32_under_autocast():
    model, text, mask, image = model_and_batch(VARIANTS["relative"])
    expected = F.normalize(model.encode_text(text, mask)[:, 0] @ model.itc_text.weight.T, dim=-1)
    close(model.embed_text(text, mask), expected)
    close(model.embed_image(image).norm(dim=-1), torch.ones(3, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        low = model.float().embed_text(text, mask)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected.float(), atol=0.05, rtol=0)
