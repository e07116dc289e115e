"""The trunk: its equations, its routing, its masks, its positions, its size."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mome import CONFIGS, Branch, Config, GELULinear, MoME, VLMo, relative_index

SMALL = Config(dim=24, layers=3, heads=3, vl_layers=1, image_size=16, patch_size=4, vocab_size=50, max_text_len=12)
VARIANTS = {
    "absolute": {},
    "relative": {"position": "relative", "layer_scale": 0.1},
    "no vl experts": {"vl_layers": 0},
    "shared experts": {"experts": "shared"},
    "separate attention": {"attention": "separate"},
    "separate everywhere": {"attention": "separate", "vl_layers": 0},
    "all fusing": {"vl_layers": 3},
}
variants = pytest.mark.parametrize("switches", VARIANTS.values(), ids=VARIANTS)


def model_and_batch(switches=None, seed=0):
    """A small model in float64 with no parameter left at a symmetric start, and a batch of three pairs."""
    torch.manual_seed(seed)
    model = VLMo(replace(SMALL, **(switches or {}))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    text = torch.randint(5, 50, (3, 12))
    mask = torch.arange(12) < torch.tensor([12, 7, 2])[:, None]
    image = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    return model, text, mask, image


def reached(model, output):
    """Names of the parameters that get a gradient from an output."""
    model.zero_grad()
    output.sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


# ---- Size and configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, switches, millions",
    [("base", VARIANTS["relative"], 175.4), ("base_plus", {}, 166.6), ("large", VARIANTS["relative"], 561.5)],
)
def test_trunk_has_as_many_parameters_as_the_released_one(name, switches, millions):
    with torch.device("meta"):
        trunk = MoME(replace(CONFIGS[name], **switches))
    assert round(sum(p.numel() for p in trunk.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    "fields",
    [{"dim": 25}, {"image_size": 18}, {"vl_layers": 4}, {"position": "rotary"}, {"experts": "none"}, {"drop_path": 1.0},
     {"max_text_len": 1}, {"position": "relative", "text_reach": 5}, {"layers": 0, "vl_layers": 0}],
)  # fmt: skip
def test_fields_that_do_not_fit_are_refused(fields):
    with pytest.raises(ValueError):
        replace(SMALL, **fields)


# ---- Equations (1) and (2) -------------------------------------------------------------------------------------------


def plain_block(block, x, T, expert_of, mask=None, bias=0.0):
    """Eq. (1) and (2) the obvious way: one row at a time through its expert, softmax written out."""
    B, S, D = x.shape
    a, H = block.attention, block.attention.heads
    y = block.norm(x)
    q, k, v = (router["shared"](y).view(B, S, H, D // H) for router in (a.query, a.key, a.value))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(D / H) + bias
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(B, S, D)
    gamma_1, gamma_2 = (1.0 if b.gamma is None else b.gamma for b in (block.attention_branch, block.expert_branch))
    x = x + gamma_1 * a.out["shared"](y)
    rows = []
    for row in range(S):
        expert = block.experts[expert_of(row)]
        h = F.layer_norm(x[:, row], (D,), expert.norm.weight, expert.norm.bias, eps=1e-6)
        h = expert.fc1(h)
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        rows.append(x[:, row] + gamma_2 * expert.fc2(h))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("layer, pair_expert", [(0, None), (2, "vl")])
@pytest.mark.parametrize("switches", [VARIANTS["absolute"], VARIANTS["relative"]], ids=["absolute", "relative"])
def test_block_is_equations_1_and_2(switches, layer, pair_expert):
    model, _, _, _ = model_and_batch(switches)
    block, x = model.blocks[layer], torch.randn(3, 29, 24, dtype=torch.float64)
    mask = torch.rand(3, 29) > 0.3
    mask[:, 0] = True
    modality = {
        "pair": lambda row: pair_expert or ("language" if row < 12 else "vision"),
        "image": lambda row: "vision",
        "text": lambda row: "language",
    }
    for kind, T in {"pair": 12, "image": 0, "text": 29}.items():
        expected = plain_block(block, x, T, modality[kind], mask)
        torch.testing.assert_close(block(x, kind, T, mask[:, None, None]), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("learns", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1)])
def test_gelu_computed_twice_has_the_gradients_of_gelu_kept(learns):
    torch.manual_seed(0)
    parts = [
        torch.randn(shape).double().requires_grad_(bool(on)) for shape, on in zip(((2, 5, 8), (3, 8), (3,)), learns)
    ]
    x, weight, bias = parts
    wanted, found = F.linear(F.gelu(x), weight, bias), GELULinear.apply(x, weight, bias)
    assert torch.equal(wanted, found)
    inputs, grad = [part for part in parts if part.requires_grad], torch.randn(2, 5, 3).double()
    for one, other in zip(torch.autograd.grad(wanted, inputs, grad), torch.autograd.grad(found, inputs, grad)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_relative_bias_is_added_to_the_scores():
    model, text, mask, image = model_and_batch(VARIANTS["relative"])
    torch.nn.init.normal_(model.relative_table)
    x = torch.cat([model.embed_words(text), model.embed_patches(image, 1)], dim=1)
    keys = F.pad(mask, (0, 17), value=True)
    H = model.config.heads
    for layer, block in enumerate(model.blocks):
        bias = torch.empty(H, 29, 29, dtype=torch.float64)
        for q in range(29):
            for k in range(29):
                bias[:, q, k] = model.relative_table[
                    table_row(q, k, T=12, side=4, reach=196), layer * H : (layer + 1) * H
                ]
        vl = layer == 2
        x = plain_block(block, x, 12, lambda row: "vl" if vl else "language" if row < 12 else "vision", keys, bias)
    torch.testing.assert_close(model.encode_pair(text, mask, image), model.norm(x), rtol=1e-10, atol=1e-10)


def table_row(q, k, T, side, reach):
    """The row of the relative table for rows q, k of a pair, by the rules one at a time."""
    I = (2 * side - 1) ** 2 + 3
    last = I + 2 * reach + 2
    if q < T and k < T:
        return {(True, True): last - 1, (True, False): last - 3, (False, True): last - 2}.get(
            (q == 0, k == 0), I + reach + k - q
        )
    if q < T or k < T:
        return I if q < T else I + 1
    q, k = q - T, k - T
    if q == 0 or k == 0:
        return I - 1 if q == k else I - 3 if q == 0 else I - 2
    (yq, xq), (yk, xk) = divmod(q - 1, side), divmod(k - 1, side)
    return (yq - yk + side - 1) * (2 * side - 1) + xq - xk + side - 1


def test_relative_table_has_a_row_for_every_case_and_no_two_cases_share_one():
    text, image, size = relative_index(text_len=6, side=3, reach=6)
    assert size == 28 + 2 * 6 + 2
    assert image.min() == 0 and image.max() == 27 and text.max() == size - 1
    assert not set(text.flatten().tolist()) & (set(image.flatten().tolist()) | {28, 29})


# ---- The three inputs ------------------------------------------------------------------------------------------------


@variants
def test_computing_leading_rows_alone_changes_nothing(switches):
    model, text, mask, image = model_and_batch(switches)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    close(model.encode_pair(text, mask, image, rows=12), model.encode_pair(text, mask, image)[:, :12])
    close(model.encode_pair(text, mask, image, rows=1), model.encode_pair(text, mask, image)[:, :1])
    close(model.encode_text(text, mask, rows=1), model.encode_text(text, mask)[:, :1])
    close(model.encode_image(image, rows=1), model.encode_image(image)[:, :1])


@variants
def test_padding_is_never_read(switches):
    model, text, mask, image = model_and_batch(switches)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    other = torch.where(mask, text, (text + 17) % 50)
    images = torch.ones(3, 17, dtype=torch.bool)
    close(model.encode_text(other, mask)[mask], model.encode_text(text, mask)[mask])
    pair_mask = torch.cat([mask, images], dim=1)
    close(model.encode_pair(other, mask, image)[pair_mask], model.encode_pair(text, mask, image)[pair_mask])
    # less padding: the two short texts cut to 7
    short = model.encode_pair(text[1:, :7], mask[1:, :7], image[1:])
    close(short[pair_mask[1:, [*range(7), *range(12, 29)]]], model.encode_pair(text, mask, image)[1:][pair_mask[1:]])
    close(model.encode_text(text[1:, :7], mask[1:, :7])[mask[1:, :7]], model.encode_text(text, mask)[1:][mask[1:]])


def test_each_input_trains_its_own_experts():
    model, text, mask, image = model_and_batch()
    experts = lambda names: {(n.split(".")[1], n.split(".")[3]) for n in names if ".experts." in n}
    assert experts(reached(model, model.encode_image(image))) == {(l, "vision") for l in "012"}
    assert experts(reached(model, model.encode_text(text, mask))) == {(l, "language") for l in "012"}
    pair = {(l, e) for l in "01" for e in ("language", "vision")} | {("2", "vl")}
    assert experts(reached(model, model.encode_pair(text, mask, image))) == pair


def test_inputs_of_one_modality_leave_the_other_embeddings_alone():
    model, text, mask, image = model_and_batch()
    assert not reached(model, model.encode_image(image)) & {"words.weight", "text_position", "text_norm.weight"}
    assert not reached(model, model.encode_text(text, mask)) & {"patches.weight", "image_position", "image_cls"}


def test_ablations_are_configuration():
    experts = lambda **switches: [sorted(block.experts) for block in MoME(replace(SMALL, **switches)).blocks]
    assert experts() == [["language", "vision"]] * 2 + [["language", "vision", "vl"]]
    assert experts(vl_layers=0) == [["language", "vision"]] * 3
    assert experts(experts="shared") == [["shared"]] * 3
    separate = MoME(replace(SMALL, attention="separate"))
    assert [sorted(block.attention.query) for block in separate.blocks] == [["language", "vision"]] * 2 + [["shared"]]


def test_separate_attention_projects_text_and_image_with_parameters_of_their_own():
    model, text, mask, image = model_and_batch(VARIANTS["separate attention"])
    projections = lambda names: {n.split(".")[4] for n in names if n.startswith("blocks.0.attention.")}
    assert projections(reached(model, model.encode_image(image))) == {"vision"}
    assert projections(reached(model, model.encode_text(text, mask))) == {"language"}
    assert projections(reached(model, model.encode_pair(text, mask, image))) == {"language", "vision"}


def test_images_are_normalised_by_the_model():
    model, _, _, image = model_and_batch()
    torch.testing.assert_close(model.encode_image(image), model.encode_image(image.double() / 127.5 - 1))


def test_the_second_image_has_a_type_of_its_own():
    model, text, mask, image = model_and_batch()
    assert not torch.allclose(model.encode_pair(text, mask, image, image_type=2), model.encode_pair(text, mask, image))


# ---- Parts -----------------------------------------------------------------------------------------------------------


def test_drop_path_drops_whole_branches_and_keeps_the_mean():
    torch.manual_seed(0)
    branch = Branch(replace(SMALL), drop=0.25)
    x = torch.ones(20_000, 2, 24)
    y = branch(x)
    values = y.flatten(1)
    assert ((values == 0).all(1) | torch.isclose(values, torch.tensor(1 / 0.75)).all(1)).all()
    assert abs(y.mean().item() - 1) < 0.02
    assert torch.equal(branch.eval()(x), x)


def test_drop_path_grows_with_depth():
    blocks = MoME(replace(SMALL, drop_path=0.2)).blocks
    assert [block.expert_branch.drop for block in blocks] == pytest.approx([0.0, 0.1, 0.2])


def test_scale_is_held_at_100_and_can_come_back():
    model, _, _, _ = model_and_batch()
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    scale = model.scale()
    assert scale.item() == pytest.approx(100)
    scale.backward()
    assert model.logit_scale.grad.item() == pytest.approx(100)


def test_embeddings_are_unit_vectors_of_the_cls_rows():
    model, text, mask, image = model_and_batch()
    expected = F.normalize(model.encode_text(text, mask)[:, 0] @ model.itc_text.weight.T, dim=-1)
    torch.testing.assert_close(model.embed_text(text, mask), expected)
    torch.testing.assert_close(model.embed_image(image).norm(dim=-1), torch.ones(3, dtype=torch.float64))


def test_bfloat16_autocast_gives_float32_embeddings():
    model, text, mask, image = model_and_batch(VARIANTS["relative"])
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        low = model.embed_text(text, mask)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, model.embed_text(text, mask), atol=0.05, rtol=0)


@variants
def test_a_hidden_patch_cannot_change_the_output_but_its_place_can(switches):
    model, _, _, image = model_and_batch(switches)
    hidden, stand_in = torch.zeros(3, 16, dtype=torch.bool), torch.randn(24, dtype=torch.float64)
    hidden[:, 5] = True  # row 1, column 1 of 4 × 4
    other = image.clone()
    other[:, :, 4:8, 4:8] = 255 - other[:, :, 4:8, 4:8]
    encode = lambda image, hidden: model.encode_image(image, masked=hidden, mask_embedding=stand_in)
    assert torch.equal(encode(image, hidden), encode(other, hidden))
    assert not torch.equal(encode(image, ~hidden), encode(other, ~hidden))  # there, it is all that is seen
    assert not torch.equal(encode(image, hidden), encode(image, hidden.roll(1, 1)))
    assert torch.equal(encode(image, hidden & False), model.encode_image(image))
