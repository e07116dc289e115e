"""Checkpoints: the groups of tensors, the file, and what one model takes from another."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import bare

import checkpoint
import runtime
from mome import Config, VLMo
from stages import VL
from texts import SPECIAL, wordpiece

SMALL = Config(
    dim=24, layers=3, heads=3, vl_layers=1, image_size=16, patch_size=4, vocab_size=50, max_text_len=12
)  # fmt: skip
TEXT = {"words", "text_norm", "text_position"}
HEADS = {"itc_image", "itc_text", "logit_scale", "pooler", "itm_head", "mlm_head"}
COPIED = {"blocks.*.experts.language", "blocks.*.experts.vl"}


def pair(old=None, new=None, drop=()):
    """A filled model's tensors without some groups, its config, and a new model of another one."""
    torch.manual_seed(0)
    first, second = VLMo(replace(SMALL, **(old or {}))), VLMo(replace(SMALL, **(new or {})))
    tensors = {
        name: torch.randn_like(tensor)
        for name, tensor in first.state_dict().items()
        if checkpoint.group(name) not in drop
    }
    return tensors, first.config, second


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_groups_are_heads_modules_and_the_experts_of_all_layers():
    names = {
        "words.weight": "words",
        "mlm_head.0.bias": "mlm_head",
        "blocks.2.norm.weight": "blocks.*.norm",
        "blocks.0.experts.vision.fc1.bias": "blocks.*.experts.vision",
        "blocks.1.attention.query.shared.weight": "blocks.*.attention.shared",
    }
    assert checkpoint.groups(names) == list(names.values())
    assert checkpoint.groups(["blocks.0.norm.bias", "blocks.1.norm.bias"]) == ["blocks.*.norm"]


# ---- What a model takes --------------------------------------------------------------------------


@pytest.mark.parametrize("switches", [{}, {"position": "relative", "layer_scale": 0.1}])
def test_a_model_of_the_same_shape_is_taken_whole(switches):
    tensors, config, model = pair(switches, switches)
    assert set(checkpoint.fit(model, tensors, config, "x.pt").values()) == {"taken"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_missing_experts_are_copies_of_the_vision_expert_and_the_rest_is_fresh():
    separate = {"attention": "separate"}
    drop = TEXT | HEADS | COPIED | {"blocks.*.attention.language"}  # what stage image leaves
    tensors, config, model = pair(separate, separate, drop)
    before = state(model)
    how = checkpoint.fit(model, tensors, config, "x.pt")
    copied = COPIED | {"blocks.*.attention.language"}
    assert {name for name, what in how.items() if what == "copied"} == copied
    assert {name for name, what in how.items() if what == "fresh"} == TEXT | HEADS
    for name, tensor in model.state_dict().items():
        source = name.replace(".language.", ".vision.").replace(".vl.", ".vision.")
        assert torch.equal(tensor, tensors.get(source, before[name]))


def test_image_positions_are_resampled_around_the_cls():
    tensors, config, model = pair(new={"image_size": 32})
    slope = 10 * torch.arange(4.0)[:, None] + torch.arange(4.0)  # over the 4 × 4 patches
    cls, patches = torch.full((1, 24), 9.0), slope.reshape(16, 1).expand(16, 24)
    tensors["image_position"] = torch.cat([cls, patches])
    assert checkpoint.fit(model, tensors, config, "x.pt")["image_position"] == "resampled"
    cls, grid = model.image_position[0], model.image_position[1:].view(8, 8, 24)
    place = (torch.arange(8.0) + 0.5) / 2 - 0.5
    expected = 10 * place[:, None] + place
    assert cls.eq(9).all()
    torch.testing.assert_close(grid[3:5, 3:5, 0], expected[3:5, 3:5], atol=0.6, rtol=0)


@pytest.mark.parametrize("length", [5, 20])
def test_text_positions_are_cut_or_continue_with_fresh_ones(length):
    tensors, config, model = pair(new={"max_text_len": length})
    fresh, kept = model.text_position.clone(), min(length, 12)
    assert checkpoint.fit(model, tensors, config, "x.pt")["text_position"] == "resampled"
    assert torch.equal(model.text_position[:kept], tensors["text_position"][:kept])
    assert torch.equal(model.text_position[kept:], fresh[kept:])


@pytest.mark.parametrize("reach", [12, 14, 40])
def test_a_relative_table_keeps_every_offset_that_both_know(reach):
    """The table says which offset it is for; every (query, key) finds what it found before."""
    old = {"position": "relative", "text_reach": 16}
    tensors, config, model = pair(old, old | {"text_reach": reach})
    before = VLMo(config)
    numbers = torch.arange(len(before.relative_table)).float()
    tensors["relative_table"] = table = numbers[:, None].expand(-1, 9).clone()
    checkpoint.fit(model, tensors, config, "x.pt")
    assert torch.equal(table[before.text_index], model.relative_table[model.text_index])
    across = int(before.image_index.max()) + 1  # text → image, image → text
    assert torch.equal(table[: across + 2], model.relative_table[: across + 2])


def test_a_relative_table_is_resampled_for_another_resolution():
    relative = {"position": "relative"}
    tensors, config, model = pair(relative, relative | {"image_size": 24})
    before, table = VLMo(config), tensors["relative_table"]
    slope = torch.arange(-3.0, 4)[:, None] * 10 + torch.arange(-3.0, 4)  # over the 7 × 7 offsets
    table[:49] = slope.flatten()[:, None]
    assert checkpoint.fit(model, tensors, config, "x.pt")["relative_table"] == "resampled"
    assert model.relative_table[60].abs().max() < 1e-4  # (0, 0) is the middle of 11 × 11, too
    for query, key in ((0, 1), (1, 0), (0, 0)):  # to, from and of [I_CLS]
        was, now = before.image_index[query, key], model.image_index[query, key]
        assert was != now and torch.equal(table[was], model.relative_table[now])


@pytest.mark.parametrize(
    "old, damage",
    [
        ({"dim": 48}, None), ({"layers": 4}, None), ({"experts": "shared"}, None),
        ({"vl_layers": 2}, None), ({"vocab_size": 60}, None), ({"layer_scale": 0.1}, None),
        ({}, "blocks.1.norm.weight"), ({}, "blocks.0.experts.language.fc1.bias"), ({}, "image_cls"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_changes_nothing(old, damage):
    tensors, config, model = pair(old)
    tensors.pop(damage, None)
    before = state(model)
    with pytest.raises(runtime.UserError):
        checkpoint.fit(model, tensors, config, "x.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_module_of_another_shape_is_refused():
    model = torch.nn.Linear(2, 2, bias=False)
    right, more = {"weight": torch.ones(2, 2)}, {"more": torch.zeros(1)}
    for tensors in (more, {"weight": torch.zeros(3, 2)}, right | more):
        with pytest.raises(runtime.UserError):
            checkpoint.load_exactly(model, tensors, "x.pt")
    assert not torch.equal(model.weight, right["weight"])
    checkpoint.load_exactly(model, right, "x.pt")
    assert torch.equal(model.weight, right["weight"])


# ---- The file ------------------------------------------------------------------------------------


def saved(path, frozen=()):
    """A checkpoint of a stage with some groups frozen → the stage."""
    stage = bare(VL, VLMo(SMALL), head=torch.nn.Linear(2, 2), extra={"choices": ["a", "b"]})
    stage.origin = {"words": "taken", "pooler": "fresh", "itm_head": "copied"}
    stage.tokenizer = wordpiece({piece: i for i, piece in enumerate(SPECIAL)})
    for name, parameter in stage.model.named_parameters():
        parameter.requires_grad_(checkpoint.group(name) not in frozen)
    args = SimpleNamespace(stage="vl", config="tiny", lr=0.5, dim=24)
    checkpoint.save(path, stage, args, runtime.Runtime(), 7, 0.25)
    return stage


def test_a_checkpoint_holds_what_was_learned_and_reads_back(tmp_path):
    stage = saved(tmp_path / "x.pt", TEXT | HEADS | {"blocks.*.experts.vl"})
    found = checkpoint.read(tmp_path / "x.pt")
    every = set(checkpoint.groups(stage.model.state_dict()))
    left_out = (TEXT | HEADS | {"blocks.*.experts.vl"}) - {"words"}
    assert set(checkpoint.groups(found.tensors)) == every - left_out
    written = stage.model.state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in found.tensors.items())
    assert torch.equal(found.head["weight"], stage.head.weight) and found.config == SMALL
    assert (found.stage, found.step, found.record, found.processes) == ("vl", 7, 0.25, 1)
    assert found.args["lr"] == 0.5 and found.extra == stage.extra and not found.resumed
    assert found.tokenizer.get_vocab() == stage.tokenizer.get_vocab() and found.optimizer is None


def test_beginning_from_a_checkpoint_leaves_fresh_groups_out(tmp_path):
    stage = saved(tmp_path / "x.pt")
    start = checkpoint.read(tmp_path / "x.pt")
    model, origin = checkpoint.begin(SMALL, start, seed=1, fresh=["pooler"])
    assert {name for name, how in origin.items() if how != "taken"} == {"pooler"}
    assert torch.equal(model.itm_head.weight, stage.model.itm_head.weight)
    new, nothing = checkpoint.begin(SMALL, None, seed=1)
    assert torch.equal(model.pooler.weight, new.pooler.weight) and nothing == {}


class Code:
    """Would make a folder, if a reader ran what it reads."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    saved(path)
    whole, content = path.read_bytes(), torch.load(path, weights_only=True)
    files = [b"", b"hello", b"PK\x03\x04 broken", b"\x80\x02}q\x00.", whole[:2000]]
    for broken in ({"state_dict": {}}, [1], content | {"config": {"dim": 24, "depth": 3}}, content | {"extra": Code(tmp_path / "made")}, {name: content[name] for name in content if name != "head"}):
        torch.save(broken, path)
        files.append(path.read_bytes())
    for file in files:
        path.write_bytes(file)
        with pytest.raises(runtime.UserError):
            checkpoint.read(path)
    with pytest.raises(runtime.UserError):
        checkpoint.read(tmp_path / "absent.pt")
    assert not (tmp_path / "made").exists()


def test_any_damage_to_a_checkpoint_is_refused_or_harmless(tmp_path):
    path = tmp_path / "x.pt"
    saved(path)
    whole = path.read_bytes()
    for position in range(0, len(whole), len(whole) // 150):
        flipped = bytes([whole[position] ^ 0xFF])
        path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
        try:
            checkpoint.read(path)
        except runtime.UserError:
            pass
