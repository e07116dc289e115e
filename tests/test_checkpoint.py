"""Checkpoints: the groups of tensors, the file, and what one model takes from another."""

import copy
import io
import re
import zipfile
import zlib
from dataclasses import replace
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import refused

import checkpoint
import positions
import runtime
from mome import VLMo
from runtime import UserError
from sides import bare
from stages import VL
from texts import SPECIAL, wordpiece

SMALL = replace(conftest.SMALL, max_text_len=12)
TEXT = {"words", "text_norm", "text_position"}
HEADS = {"itc_image", "itc_text", "logit_scale", "pooler", "itm_head", "mlm_head"}
COPIED = {"blocks.*.experts.language", "blocks.*.experts.vl", "blocks.*.attention.language"}


def pair(old, new, drop=()):
    """A filled model's tensors without some groups, its config, and a new model of another one."""
    torch.manual_seed(0)
    first, second = VLMo(replace(SMALL, **old)), VLMo(replace(SMALL, **new))
    tensors = {}
    for name, tensor in first.state_dict().items():
        if checkpoint.group(name) not in drop:
            tensors[name] = torch.randn_like(tensor)
    return tensors, first.config, second


# ---- What a model takes --------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [COPIED, {"blocks.*.attention.language"}])
def test_missing_experts_are_copies_of_the_vision_expert_or_not_and_the_rest_is_fresh(copied):
    drop = TEXT | HEADS | COPIED  # what stage image leaves
    old = {"attention": "separate", "layer_scale": 0.5}
    tensors, config, model = pair(old, old | {"layer_scale": 0.1}, drop)
    before = copy.deepcopy(model.state_dict())
    how = checkpoint.fit(model, tensors, config, "x.pt", copies=copied == COPIED)
    ways = {"taken": set(checkpoint.groups(tensors)), "copied": copied, "fresh": drop - copied}
    for name, tensor in model.state_dict().items():
        assert checkpoint.group(name) in ways[how[checkpoint.group(name)]]
        source = name.replace(".language.", ".vision.").replace(".vl.", ".vision.")
        source = source if checkpoint.group(name) in copied else name
        assert torch.equal(tensor, tensors.get(source, before[name]))
    assert how.keys() == set().union(*ways.values())
    assert len({tensor.data_ptr() for tensor in model.state_dict().values()}) == len(before)


@pytest.mark.parametrize("length", [5, 20])
def test_positions_are_resampled_around_the_cls_and_cut_or_continued_for_text(length):
    tensors, config, model = pair({}, {"image_size": 32, "max_text_len": length})
    fresh, kept = model.text_position.clone(), min(length, 12)
    slope = 10 * torch.arange(4.0)[:, None] + torch.arange(4.0)  # over the 4 × 4 patches
    cls, patches = torch.full((1, 24), 9.0), slope.reshape(16, 1).expand(16, 24)
    tensors["image_position"] = torch.cat([cls, patches])
    how = checkpoint.fit(model, tensors, config, "x.pt")
    assert how["image_position"] == how["text_position"] == "resampled"
    assert torch.equal(model.text_position[:kept], tensors["text_position"][:kept])
    assert torch.equal(model.text_position[kept:], fresh[kept:])
    cls, grid = model.image_position[0], model.image_position[1:].view(8, 8, 24)
    place = (torch.arange(8.0) + 0.5) / 2 - 0.5
    expected = 10 * place[:, None] + place
    assert cls.eq(9).all()
    torch.testing.assert_close(grid[3:5, 3:5, 0], expected[3:5, 3:5], atol=0.6, rtol=0)


@pytest.mark.parametrize("reach", [12, 14, 40])
def test_a_relative_table_keeps_offsets_of_words_and_resamples_those_of_patches(reach):
    """Every (query, key) of words, and of words and images, finds what it found before."""
    old = {"position": "relative", "text_reach": 16}
    tensors, config, model = pair(old, old | {"text_reach": reach, "image_size": 24})
    before = VLMo(config)
    numbers = torch.arange(len(before.relative_table)).float()
    tensors["relative_table"] = table = numbers[:, None] * torch.arange(1.0, 10)
    assert checkpoint.fit(model, tensors, config, "x.pt")["relative_table"] == "resampled"
    new = model.relative_table
    assert torch.equal(table[before.text_index], new[model.text_index])
    for at in ((0, 1), (1, 0), (0, 0)):  # to, from and of [I_CLS]
        assert torch.equal(table[before.image_index[at]], new[model.image_index[at]])
    assert torch.equal(table[52:54], new[124:126])  # text → image, image → text, after 11² + 3 rows
    assert new[60].equal(table[24])  # (0, 0) is the middle of 7 × 7, and of 11 × 11
    torch.testing.assert_close(new[61], table[25])  # the direct neighbour keeps its number


RELEASED = [  # what the released code makes of the same table at 4 × 4 → 6 × 6 patches
    0.01803189, 0.3936434, 0.08382576, 0.48780245, 0.13941536, 0.52897417,
    0.16496659, 0.52272997, 0.16777605, 0.52253765, 0.13922225, 0.57096595,
]  # fmt: skip


def test_patch_offsets_are_resampled_as_released():
    y, x = torch.meshgrid(torch.arange(-3.0, 4), torch.arange(-3.0, 4), indexing="ij")
    bumps = [torch.exp(-((y / (1 + c)) ** 2 + (x / (2 + c)) ** 2) / 4) for c in (0, 1)]
    noise = np.random.default_rng(zlib.crc32(b"small")).standard_normal((49, 2)) * 0.05
    table = torch.stack(bumps, dim=-1).view(49, 2) + torch.tensor(noise)
    table = torch.cat([table, torch.zeros(3 + 2 * 16 + 2, 2)])
    new = positions.fit_table(table, 4, 6, 16, 16)
    torch.testing.assert_close(new[:6].flatten(), torch.tensor(RELEASED).double(), atol=1e-6, rtol=0)
    assert new[:121].norm().item() == pytest.approx(8.5188788, abs=1e-6)


def test_vision_experts_become_shared_ones_and_shared_attention_separate():
    tensors, config, model = pair({}, {"experts": "shared", "attention": "separate"}, TEXT | HEADS | COPIED)
    how = checkpoint.fit(model, tensors, config, "x.pt")
    converted = {name for name, way in how.items() if way == "converted"}
    assert converted == {"blocks.*.experts.shared", "blocks.*.attention.vision"}
    for name, tensor in model.state_dict().items():
        part = "shared" if "attention" in name else "vision"
        if "blocks" in name:
            assert torch.equal(tensor, tensors[re.sub(r"\.(language|vision|shared)\.", f".{part}.", name)])


@pytest.mark.parametrize(
    "old, damage",
    [
        ({"dim": 48}, None), ({"layers": 4}, None), ({"attention": "separate"}, None),
        ({"vl_layers": 2}, None), ({"vocab_size": 60}, None), ({"layer_scale": 0.1}, None),
        ({}, "blocks.1.norm.weight"), ({}, "blocks.0.experts.language.fc1.bias"), ({}, "image_cls"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_changes_nothing(old, damage):
    tensors, config, model = pair(old, {})
    tensors.pop(damage, None)
    before = copy.deepcopy(model.state_dict())
    refused(checkpoint.fit, model, tensors, config, "x.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_module_of_another_shape_is_refused():
    model, right = torch.nn.Linear(2, 2, bias=False), {"weight": torch.ones(2, 2)}
    for wrong in ({}, {"weight": torch.zeros(3, 2)}, right | {"more": torch.zeros(1)}):
        refused(checkpoint.load_exactly, model, wrong, "x.pt")
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
    args = SimpleNamespace(stage="vl", config="tiny", lr=0.5, dim=24, keep_previous=True)
    checkpoint.save(path, stage, args, runtime.Runtime(), 7, 0.25)
    return stage


def test_a_checkpoint_holds_what_was_learned_and_reads_back(tmp_path):
    frozen = TEXT | HEADS | {"blocks.*.experts.vl"}
    stage = saved(tmp_path / "x.pt", frozen)
    found = checkpoint.read(tmp_path / "x.pt")
    written = stage.model.state_dict()
    left_out = frozen - {"words"}  # which were taken from another checkpoint
    assert set(checkpoint.groups(found.tensors)) == set(checkpoint.groups(written)) - left_out
    assert all(torch.equal(tensor, written[name]) for name, tensor in found.tensors.items())
    assert torch.equal(found.head["weight"], stage.head.weight) and found.config == SMALL
    assert (found.stage, found.step, found.record) == ("vl", 7, 0.25)
    assert found.args["lr"] == 0.5 and found.args["processes"] == 1 and found.extra == stage.extra and not found.resumed
    assert found.tokenizer.get_vocab() == stage.tokenizer.get_vocab() and found.optimizer is None

    # Another model begins from it
    model, origin = checkpoint.begin(SMALL, found, seed=1, fresh=["words"])
    new, nothing = checkpoint.begin(SMALL, None, seed=1)
    assert origin["words"] == "fresh" and origin["patches"] == "taken" and nothing == {}
    assert torch.equal(model.words.weight, new.words.weight)
    assert not torch.equal(new.words.weight, checkpoint.begin(SMALL, None, seed=2)[0].words.weight)
    assert torch.equal(model.patches.weight, stage.model.patches.weight)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    saved(path)
    whole, content = path.read_bytes(), torch.load(path, weights_only=True)
    packed = io.BytesIO()  # could not be mapped into memory
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    files = [b"", b"hello", b"PK\x03\x04 broken", b"\x80\x02}q\x00.", whole[:2000], packed.getvalue()]
    without_head = {name: content[name] for name in content if name != "head"}
    wrong = [{"state_dict": {}}, [1], without_head]
    wrong.append(content | {"extra": tmp_path})  # reading an object may run code
    wrong.append(content | {"config": {"dim": 24, "depth": 3}})
    for broken in wrong:
        torch.save(broken, path)
        files.append(path.read_bytes())
    for file in files:
        path.write_bytes(file)
        refused(checkpoint.read, path)
    refused(checkpoint.read, tmp_path / "absent.pt")

    # Any flipped bit is refused, or is not in the tensors
    untouched = checkpoint.Checkpoint(path, content)
    (tmp_path / "previous.pt").write_bytes(whole)
    found_out = 0
    for position in range(0, len(whole), len(whole) // 100):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            found = checkpoint.read(path)
        except UserError as error:
            assert "previous.pt is the one before it" in str(error)
            found_out += 1
            continue
        torch.testing.assert_close(found.tensors, untouched.tensors, rtol=0, atol=0)
    assert found_out > 80
