"""What one checkpoint gives to another model: taken, resampled, copied, fresh, or refused."""

from dataclasses import replace

import pytest
import torch

import runtime
import weights
from mome import Config, VLMo

SMALL = Config(dim=24, layers=3, heads=3, vl_layers=1, image_size=16, patch_size=4, vocab_size=50, max_text_len=12)
EVERYTHING = list(weights.OPTIONAL - {"blocks.*.attention.language"})


def pair(old=None, new=None, drop=()):
    """A filled model's tensors without some groups, its config, and a fresh model of another config."""
    torch.manual_seed(0)
    first, second = VLMo(replace(SMALL, **(old or {}))), VLMo(replace(SMALL, **(new or {})))
    tensors = {name: torch.randn_like(t) for name, t in first.state_dict().items() if weights.group(name) not in drop}
    return tensors, first.config, second


def test_groups_are_heads_modules_and_the_experts_of_all_layers():
    names = ["words.weight", "logit_scale", "mlm_head.0.bias", "blocks.2.norm.weight",
             "blocks.0.experts.vision.fc1.bias", "blocks.1.experts.vision.norm.weight",
             "blocks.0.attention.query.shared.weight"]  # fmt: skip
    assert weights.groups(names) == ["words", "logit_scale", "mlm_head", "blocks.*.norm", "blocks.*.experts.vision",
                                     "blocks.*.attention.shared"]  # fmt: skip


@pytest.mark.parametrize("switches", [{}, {"position": "relative", "layer_scale": 0.1}, {"attention": "separate"}])
def test_a_model_of_the_same_shape_is_taken_whole(switches):
    tensors, config, model = pair(switches, switches)
    assert set(weights.fit(model, tensors, config, "x.pt").values()) == {"taken"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_missing_experts_start_from_the_vision_expert_and_heads_afresh():
    tensors, config, model = pair(drop=EVERYTHING)  # what stage image leaves
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    how = weights.fit(model, tensors, config, "x.pt")
    assert {name for name, what in how.items() if what == "copied"} == {
        "blocks.*.experts.language",
        "blocks.*.experts.vl",
    }
    assert {name for name, what in how.items() if what == "fresh"} == {
        "words", "text_norm", "text_position", "itc_image", "itc_text", "logit_scale", "pooler", "itm_head", "mlm_head"
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        source = name.replace(".language.", ".vision.").replace(".vl.", ".vision.")
        assert torch.equal(tensor, tensors[source] if source in tensors else before[name])


def test_separate_attention_of_text_starts_from_that_of_images():
    switches = {"attention": "separate"}
    tensors, config, model = pair(switches, switches, drop=["blocks.*.attention.language"])
    assert weights.fit(model, tensors, config, "x.pt")["blocks.*.attention.language"] == "copied"
    query = model.blocks[0].attention.query
    assert torch.equal(query["language"].weight, query["vision"].weight)


def test_image_positions_are_resampled_around_the_cls():
    tensors, config, model = pair(new={"image_size": 32})
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    tensors["image_position"] = torch.cat([torch.full((1, 24), 9.0), (10 * y + x).reshape(16, 1).expand(16, 24)])
    assert weights.fit(model, tensors, config, "x.pt")["image_position"] == "resampled"
    cls, grid = model.image_position[0], model.image_position[1:].view(8, 8, 24)
    assert cls.eq(9).all()
    inner = 10 * ((torch.arange(8.0) + 0.5) / 2 - 0.5)[:, None] + ((torch.arange(8.0) + 0.5) / 2 - 0.5)
    torch.testing.assert_close(grid[3:5, 3:5, 0], inner[3:5, 3:5], atol=0.6, rtol=0)  # a slope stays a slope


@pytest.mark.parametrize("length", [5, 20])
def test_text_positions_are_cut_or_go_on_afresh(length):
    tensors, config, model = pair(new={"max_text_len": length})
    fresh = model.text_position.clone()
    assert weights.fit(model, tensors, config, "x.pt")["text_position"] == "resampled"
    kept = min(length, 12)
    assert torch.equal(model.text_position[:kept], tensors["text_position"][:kept])
    assert torch.equal(model.text_position[kept:], fresh[kept:])


@pytest.mark.parametrize("reach", [12, 14, 40])
def test_a_relative_table_keeps_every_offset_that_both_know(reach):
    """The table says which offset it is for; after fitting, every (query, key) finds what it found before."""
    old, new = {"position": "relative", "text_reach": 16}, {"position": "relative", "text_reach": reach}
    tensors, config, model = pair(old, new)
    before = VLMo(config)
    tensors["relative_table"] = torch.arange(len(before.relative_table)).float()[:, None].expand(-1, 9).clone()
    weights.fit(model, tensors, config, "x.pt")
    assert torch.equal(tensors["relative_table"][before.text_index], model.relative_table[model.text_index])
    assert torch.equal(tensors["relative_table"][before.image_index], model.relative_table[model.image_index])
    across = before.image_index.max() + 1
    assert torch.equal(tensors["relative_table"][across : across + 2], model.relative_table[across : across + 2])


def test_a_relative_table_is_resampled_for_another_resolution():
    tensors, config, model = pair({"position": "relative"}, {"position": "relative", "image_size": 24})
    before = VLMo(config)
    slope = torch.arange(-3.0, 4)[:, None] * 10 + torch.arange(-3.0, 4)  # over the 7 × 7 offsets
    tensors["relative_table"][:49] = slope.flatten()[:, None]
    assert weights.fit(model, tensors, config, "x.pt")["relative_table"] == "resampled"
    assert model.relative_table[60].abs().max() < 1e-4  # (0, 0) is the middle of 11 × 11, too
    for query, key in ((0, 1), (1, 0), (0, 0)):  # to, from and of [I_CLS]
        was, now = before.image_index[query, key], model.image_index[query, key]
        assert was != now and torch.equal(tensors["relative_table"][was], model.relative_table[now])


@pytest.mark.parametrize(
    "old, damage, says",
    [
        ({"dim": 48}, None, "x.pt has dim 48, and this run 24"),
        ({"layers": 4}, None, "has layers 4"),
        ({"experts": "shared"}, None, "has experts shared"),
        ({"vl_layers": 2}, None, "x.pt has blocks.1.experts.vl.* is --vl-layers another"),
        ({"vocab_size": 60}, None, r"words.weight is \(60, 24\) there and \(50, 24\) here"),
        ({"layer_scale": 0.1}, None, "x.pt has layer_scale 0.1, and this run 0.0"),
        ({}, "blocks.1.norm.weight", "lacks blocks.1.norm.weight"),
        ({}, "blocks.0.experts.language.fc1.bias", "lacks blocks.0.experts.language.fc1.bias"),
        ({}, "image_cls", "lacks image_cls"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(old, damage, says):
    tensors, config, model = pair(old)
    tensors.pop(damage, None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(runtime.UserError, match=says):
        weights.fit(model, tensors, config, "x.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_saved_is_what_was_taken_and_what_learns():
    model = VLMo(SMALL).requires_grad_(False)
    model.blocks[0].experts["language"].fc1.bias.requires_grad_(True)
    saved = weights.learned(model, ["words"])
    always = set(weights.groups(model.state_dict())) - weights.OPTIONAL
    assert set(weights.groups(saved)) == {"words", "blocks.*.experts.language"} | always
    assert not {"mlm_head", "itc_text", "blocks.*.experts.vl"} & always and "blocks.*.experts.vision" in always
    assert {name.split(".")[1] for name in saved if name.startswith("blocks")} == {"0", "1", "2"}  # whole groups


@pytest.mark.parametrize(
    "tensors",
    [{"a": torch.zeros(2)}, {"weight": torch.zeros(3, 2)}, {"weight": torch.zeros(2, 2), "more": torch.zeros(1)}],
)
def test_a_module_of_another_shape_is_refused_by_name(tensors):
    model = torch.nn.Linear(2, 2, bias=False)
    before = model.weight.clone()
    with pytest.raises(runtime.UserError, match="x.pt is of another shape: (a|weight|more) is"):
        weights.load_exactly(model, tensors, "x.pt")
    assert torch.equal(model.weight, before)
