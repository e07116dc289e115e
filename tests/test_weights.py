"""What one checkpoint gives to another model: taken, resampled, copied, fresh, or refused. And released files: the
figures of tests/released.json are outputs of the authors' implementation, for weights and inputs made by a rule."""

import json
import math
import os
import re
import subprocess
import sys
import time
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_data import vqa
from test_train import call

import data
import evaluate
import finetune
import runtime
import train
import weights
from mome import CONFIGS, NLVR2, VQA, Config, VLMo

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


# ---- Released files --------------------------------------------------------------------------------------------------

CASES = {case["name"]: case for case in json.loads(Path(__file__).with_name("released.json").read_text())}


def filled(key, shape):
    """A tensor of the reference files."""
    tensor = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape) * 0.05
    tensor += 1.0 * (key.endswith("weight") and len(shape) == 1) + 0.5 * ("gamma_" in key)
    return torch.tensor(tensor + math.log(1 / 0.07) * key.startswith("logit_"), dtype=torch.float32)


def released(name):
    """The state dict of a reference file."""
    state = {}
    for shape, keys in CASES[name]["tensors"].items():
        for key in keys:
            for layer in range(CASES[name]["layers"]) if "*" in key else [0]:
                key_here = key.replace("*", str(layer))
                state[key_here] = filled(key_here, [int(size) for size in shape.split("x") if size])
    return state


def imported(name):
    case = CASES[name]
    if "beit" in name:
        return weights.from_beit(released(name))
    return weights.from_vlmo(released(name), case["heads"], case["text_relative_reach"])


def inputs(case):
    rng, B, S = np.random.default_rng(case["input_seed"]), len(case["text_lengths"] or "BEI"), case["image_size"]
    images = [
        torch.from_numpy(rng.standard_normal((B, 3, S, S))).float() for _ in range(2 if case["text_lengths"] else 1)
    ]
    if not case["text_lengths"]:
        return images[0]
    T, lengths = case["max_text_len"], torch.tensor(case["text_lengths"])
    text = torch.from_numpy(rng.integers(5, case["vocab_size"], (B, T)))
    mask = torch.arange(T) < lengths[:, None]
    text[:, 0], text[torch.arange(B), lengths - 1] = 2, 3
    return {"image": torch.stack(images, 1), "text": text.masked_fill(~mask, 0), "mask": mask}


@torch.no_grad()
def outputs(model, case):
    """What the reference names, of one of this project's models."""
    model.eval()
    batch = inputs(case)
    if torch.is_tensor(batch):
        model.norm = torch.nn.Identity()
        return {"hidden_before_final_norm": model.encode_image(batch)}
    text, mask, image = batch["text"], batch["mask"], batch["image"][:, 0]
    if isinstance(model, NLVR2):
        return {"nlvr2_logits": model(batch)}
    if isinstance(model, VQA):
        return {"vqa_logits": model(batch | {"image": image})}
    pair, T = model.encode_pair(text, mask, image), text.shape[1]
    return {
        "pair_text_hidden_valid": pair[:, :T][mask],
        "pair_image_hidden": pair[:, T:],
        "pair_pooled": model.pool(pair),
        "itm_logits": model.itm_head(model.pool(pair)),
        "mlm_logits_valid": model.mlm_head(pair[:, :T][mask]),
        "text_hidden_valid": model.encode_text(text, mask)[mask],
        "image_hidden": model.encode_image(image),
        "itc_text": model.embed_text(text, mask),
        "itc_image": model.embed_image(image),
        "logit_scale": model.logit_scale.exp(),
    }


@pytest.mark.parametrize("name", CASES)
def test_released_weights_compute_what_they_did(name):
    model, _ = imported(name)
    ours = outputs(model, CASES[name])
    for key, wanted in CASES[name]["outputs"].items():
        if key == "logit_scale":
            assert ours[key].item() == pytest.approx(wanted, rel=1e-6)
            continue
        assert (ours[key].flatten()[:12] - torch.tensor(wanted["head"])).abs().max() < 1e-5, key
        assert ours[key].norm().item() == pytest.approx(wanted["l2"], rel=1e-5)
        assert ours[key].sum().item() == pytest.approx(wanted["sum"], rel=1e-4, abs=1e-3)


def vocabulary(folder, size=100):
    """vocab.txt of the reference files' size, which knows letters."""
    letters = [chr(ord("a") + k) for k in range(26)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    path = folder / "vocab.txt"
    path.write_text("\n".join(pieces + [f"[unused{k}]" for k in range(size - len(pieces))]) + "\n")
    return path


def answers(folder):
    """VQA 2.0's files with 17 answers that come nine times."""
    ids = range(17 * 9)
    vqa(folder, "train2014", ids[:100])
    vqa(folder, "val2014", ids[100:])
    for subset in ("train2014", "val2014"):
        path = folder / f"v2_mscoco_{subset}_annotations.json"
        content = json.loads(path.read_text())
        for entry in content["annotations"]:
            entry["multiple_choice_answer"] = f"Answer {entry['question_id'] % 17}."
        path.write_text(json.dumps(content))
    return folder


CONTAINERS = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "module": lambda state: {"module": {f"module.{key}": tensor for key, tensor in state.items()}},
    "model": lambda state: {"model": state},
    "bare": lambda state: state,
    "old": lambda state: {"model": state},
}


@pytest.mark.parametrize("name, container", list(zip(CASES, [*CONTAINERS, "bare", "old"])))
def test_a_file_becomes_a_checkpoint_that_computes_the_same_to_the_bit(name, container, tmp_path, monkeypatch, capsys):
    case, file, out = CASES[name], tmp_path / "released.pt", tmp_path / "out.pt"
    torch.save(CONTAINERS[container](released(name)), file, _use_new_zipfile_serialization=container != "old")
    flags = [] if "beit" in name else ["--heads", 4, "--vocab", vocabulary(tmp_path)]
    flags += ["--reach", 20] if "relative" in name else []
    flags += ["--answers", answers(tmp_path)] if "vqa" in name else []
    call(monkeypatch, weights, file, "-o", out, *flags)
    table = capsys.readouterr().out
    assert "  taken " in table and ("  ignored " in table) == ("retrieval" not in name)

    content, config, tokenizer = evaluate.read_checkpoint(out)
    before, after = imported(name)[0], weights.rebuild(content["model"], config, out)[0]
    if content["stage"] in ("vqa", "nlvr2"):
        after, words, choices = evaluate.load_task(content["stage"], out, None, "cpu")
        assert words.tokenizer.to_str() == tokenizer.to_str()
        assert "  taken        0.2 M" in table and f"{content['stage']}_classifier" in table
        assert choices == ([f"answer {k}" for k in range(17)] if "vqa" in name else ["False", "True"])
    else:
        assert content["stage"] == {"p": "vl", "r": "retrieval", "b": "image"}[name[0]]
    before, after = outputs(before, case), outputs(after, case)
    for key in case["outputs"]:
        assert torch.equal(before[key], after[key]), key


@torch.no_grad()
def predicted(task, tokenizer):
    """What the authors' weights say of split test of the built-in world, sample by sample."""
    model, _ = weights.from_vlmo(released(f"{task}-relative"), 4, 20, image_size=48)
    source, words, lines = data.read_task(task, ["shapes"], "test", 48), data.Words(tokenizer, 12), []
    for i in range(len(source)):
        text, mask = words.encode(source[i].text)
        image = data.to_tensor(source.image(i), lambda image: data.resize(image, 48))
        choice = model.eval()({"image": image[None], "text": text[None], "mask": mask[None]}).argmax().item()
        if task == "vqa":
            lines.append({"question_id": source[i].id, "answer": f"answer {choice}"})
        else:
            lines.append(f"{source[i].id},{bool(choice)}\n")
    return json.dumps(lines) if task == "vqa" else "".join(lines)


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_imported_tasks_answer_through_evaluate_and_are_fine_tuned(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "SPLITS", {"train": 100_000, "val": 10, "test": 10})
    file, out, vocab = tmp_path / "released.pt", tmp_path / "out.pt", vocabulary(tmp_path)
    torch.save(released(f"{task}-relative"), file)
    call(monkeypatch, weights, file, "-o", out, "--reach", 20, "--image-size", 48)
    assert "--vocab" in capsys.readouterr().out
    with pytest.raises(runtime.UserError, match="--vocab" if task == "nlvr2" else "--answers"):
        call(monkeypatch, evaluate, "--task", task, "--checkpoint", out)
    flags = ["--answers", answers(tmp_path)] if task == "vqa" else []
    call(monkeypatch, weights, file, "-o", out, "--reach", 20, "--image-size", 48, *flags)
    assert "resampled" in capsys.readouterr().out
    with pytest.raises(runtime.UserError, match="has 99 entries, and .* embeds 100"):
        wrong = vocabulary(tmp_path, 99)
        call(monkeypatch, evaluate, "--task", task, "--checkpoint", out, "--vocab", wrong)
    vocabulary(tmp_path)
    predictions = tmp_path / "predictions"
    call(monkeypatch, evaluate, "--task", task, "--checkpoint", out, "--vocab", vocab, "--predictions", predictions)
    assert predictions.read_text() == predicted(task, data.load_tokenizer(vocab))
    if task == "vqa":
        call(monkeypatch, weights, file, "-o", out, "--reach", 20, "--vocab", vocab)
        with pytest.raises(runtime.UserError, match="without its answers"):
            call(monkeypatch, finetune, "--task", task, "--init", out, "--image-size", 32, "--out", tmp_path / "run")
    else:  # the built-in world has other answers
        run = ["--task", task, "--init", out, "--image-size", 16, "--batch-size", 2, "--epochs", 1e-5]
        with pytest.raises(runtime.UserError, match="without its vocabulary"):
            call(monkeypatch, finetune, *run, "--out", tmp_path / "run")
        call(monkeypatch, finetune, *run, "--out", tmp_path / "run", "--vocab", vocab)


@pytest.mark.parametrize("name", ["beit-per-block-tables", "beit-shared-table"])
def test_stages_text_and_vl_run_from_beit(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "SPLITS", {"train": 1000, "val": 10, "test": 10})
    torch.save({"model": released(name)}, tmp_path / "beit.pth")
    call(monkeypatch, weights, tmp_path / "beit.pth", "-o", tmp_path / "beit.pt")
    small = ["--init", tmp_path / "beit.pt", "--batch-size", 4, "--steps", 2, "--warmup", 1, "--vocab-size", 300]
    small += ["--max-text-len", 24, "--eval-every", 0]
    call(monkeypatch, train, "--stage", "text", *small, "--out", tmp_path / "text")
    call(monkeypatch, train, "--stage", "vl", *small, "--out", tmp_path / "vl")
    assert "copied" in capsys.readouterr().out
    saved = runtime.load(tmp_path / "text" / "last.pt")["model"]
    for key, tensor in imported(name)[0].state_dict().items():  # the vision part as it was, the language expert copied
        if "attention" in key or "vision" in key:
            assert torch.equal(saved[key], tensor)


def test_absolute_beit(tmp_path):
    state = {key: tensor for key, tensor in released("beit-shared-table").items() if "rel_pos" not in key}
    state = {key: tensor for key, tensor in state.items() if "gamma" not in key} | {"pos_embed": torch.randn(1, 17, 48)}
    with pytest.raises(runtime.UserError, match="give --heads"):
        weights.from_beit(state)
    model, rows = weights.from_beit(state, heads=4)
    assert model.config.position == "absolute" and model.config.layer_scale == 0
    assert torch.equal(model.image_position, state["pos_embed"][0]) and rows["image_position"] == ("taken", 17 * 48)


def test_a_file_of_stage_text_has_no_vl_experts():
    state = released("pretrained-relative")
    for key in list(state):
        if "_vl" in key or key.startswith(("itm", "itc", "logit")):
            del state[key]
    model, rows = weights.from_vlmo(state, reach=20)
    assert model.config.vl_layers == 1 and rows["blocks.*.experts.vl"][0] == "copied" and rows["itm_head"][0] == "fresh"
    assert weights.stage_of(weights.read_vlmo(state, 4, 20)) == "text"


def having(key, tensor):
    return lambda state: state | {key: tensor}


def without(*keys):
    return lambda state: {key: t for key, t in state.items() if not key.startswith(keys)}


@pytest.mark.parametrize(
    "damage, says",
    [
        (without("transformer.blocks.2."), "it lacks transformer.blocks.2"),
        (without("transformer.blocks.3."), "relative_position_bias_table has 16 columns, which does not fit 3 layers"),
        (without("transformer.blocks.3.mlp_vl"), "it lacks transformer.blocks.3.mlp_vl"),
        (without("transformer.blocks.3.norm2_vl.bias"), "it lacks transformer.blocks.3.norm2_vl.bias"),
        (without("transformer.blocks.1.mlp_text"), "it lacks transformer.blocks.1.mlp_text.fc1.weight"),
        (without("itc_text_proj"), "it lacks itc_text_proj.fc.weight"),
        (without("mlm_score.bias"), "it lacks mlm_score.bias"),
        (without("text_embeddings.token_type"), "it lacks text_embeddings.token_type_embeddings.weight"),
        (without("text_embeddings.word"), "it lacks text_embeddings.word_embeddings.weight"),
        (without("transformer.cls_token"), "it lacks transformer.cls_token"),
        (without("transformer."), "it holds neither VLMo's weights nor BEiT's"),
        (without("transformer.blocks.0.gamma_1"), "it lacks transformer.blocks.0.gamma_1"),
        (without("transformer.blocks.3.mlp_vl.fc1.weight"), "it lacks transformer.blocks.3.mlp_vl.fc1.weight"),
        (without("relative_position_bias_table"), "it lacks relative_position_bias_table, or transformer.pos_embed"),
        (lambda state: {key.replace("transformer.", ""): t for key, t in state.items()}, "it lacks rel_pos_bias."),
        (having("text_embeddings.position_embeddings.weight", torch.ones(512, 48)), "has 512 rows"),
        (having("text_embeddings.position_embeddings.weight", torch.ones(12, 5)), "(…, 48) fits the rest"),
        (having("text_embeddings.token_type_embeddings.weight", torch.ones(5, 48)), "(2, 48) fits the"),
        (having("relative_position_index", torch.ones(26, 26)), "and its relative_position_index of 25"),
        (having("pooler.dense.bias", torch.ones(48).long()), "pooler.dense.bias is torch.int64"),
        (having("pooler.dense.weight", torch.eye(48).to_sparse()), "pooler.dense.weight is torch.float32"),
        (having("transformer.extra", torch.ones(3)), "it has transformer.extra, which no released"),
        (having("vqa_classifier.3.weight", torch.ones(5, 96)), "it lacks vqa_classifier.0.weight"),
        (having("pooler.dense.bias", torch.ones(47)), "pooler.dense.bias has the shape (47,): (48,)"),
        (having("transformer.blocks.1.attn.qkv.weight", torch.ones(144, 40)), "qkv.weight has the sha"),
        (having("transformer.cls_token", torch.ones(48)), "transformer.cls_token has the shape (48,)"),
        (having("relative_position_bias_table", torch.ones(96, 16)), "no resolution has as many rows"),
        (having("epoch", 3), "epoch is no tensor"),
        (lambda state: {}, "holds no tensors by name"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_as_released_is_refused_by_name(damage, says, tmp_path, monkeypatch):
    file, out = tmp_path / "released.pt", tmp_path / "out.pt"
    torch.save(damage(released("pretrained-relative")), file)
    with pytest.raises(runtime.UserError) as error:
        call(monkeypatch, weights, file, "-o", out, "--reach", 20)
    assert says in str(error.value) and str(file) in str(error.value) and not out.exists()


@pytest.mark.parametrize(
    "damage, says",
    [
        (without("blocks.0.attn.relative_position_bias_table"), "it lacks blocks.0.attn.relative_position_bias_table"),
        (without("blocks.2.attn.relative_position_bias_table"), "it lacks blocks.2.attn.relative_position_bias_table"),
        (without("blocks.3.mlp.fc2.bias"), "it lacks blocks.3.mlp.fc2.bias"),
        (without("patch_embed"), "it lacks patch_embed.proj.weight"),
        (having("blocks.1.attn.relative_position_bias_table", torch.ones(52, 3)), "(52, 4) fits the rest"),
        (having("text.weight", torch.ones(3)), "it has text.weight, which no released file has"),
    ],
)  # fmt: skip
def test_beit_that_is_not_as_released_is_refused_by_name(damage, says):
    with pytest.raises(runtime.UserError) as error:
        weights.from_beit(damage(released("beit-per-block-tables")))
    assert says in str(error.value)


def test_tensors_of_any_precision_and_layout_are_taken(tmp_path):
    """Halves, views of one storage, columns; and archives whose parts are compressed."""
    state, file = released("retrieval-absolute"), tmp_path / "file.pt"
    state["itc_text_proj.fc.weight"] = state["itc_image_proj.fc.weight"].T
    state["pooler.dense.weight"] = state["pooler.dense.weight"].bfloat16()
    torch.save(state, file)
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    for path in (file, tmp_path / "small.pt"):
        model, _ = weights.from_vlmo(weights.read_released(path), 4, 20)
        assert torch.equal(model.itc_text.weight, state["itc_image_proj.fc.weight"].T)
        assert torch.equal(model.pooler.weight, state["pooler.dense.weight"].float())
        assert torch.equal(model.types[2], state["token_type_embeddings.weight"][1])
        assert torch.equal(model.blocks[1].attention.key["shared"].weight,
                           state["transformer.blocks.1.attn.qkv.weight"][48:96])  # fmt: skip


class Runs:
    def __reduce__(self):
        return os.system, ("true",)


def test_broken_files_and_wrong_flags_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    whole, file, out = tmp_path / "whole.pt", tmp_path / "file.pt", tmp_path / "out.pt"
    torch.save(released("vqa-relative"), whole)

    def wrong(says, *flags, path=file):
        with pytest.raises((runtime.UserError, data.DataError)) as error:
            call(monkeypatch, weights, path, "-o", out, *flags)
        assert says in str(error.value) and "\n" not in str(error.value) and not out.exists()

    wrong("no such file")
    for content in (b"", whole.read_bytes()[:-100], whole.read_bytes()[:5000], b"no weights"):
        file.write_bytes(content)
        wrong("cannot be read as a file of torch.save")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "something else")
    wrong("cannot be read as a file of torch.save")
    for new in (True, False):
        for protocol in (2, 4):
            content = {"state_dict": released("vqa-relative"), "callbacks": Runs()}
            torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
            wrong("could run any code: only tensors are read")
    torch.save(released("nlvr2-relative") | {"nlvr2_classifier.3.bias": torch.ones(5)}, file)
    wrong("nlvr2_classifier.3.bias has the shape (5,): (2,) fits", "--reach", 20)
    wrong("has 16 columns", "--reach", 20, "--heads", 0, path=whole)
    wrong("must be at least 1", "--reach", 20, "--image-size", 0, path=whole)
    wrong("with 196 positions of text (--reach)", path=whole)
    wrong("16 columns, which does not fit 4 layers of 3 heads", "--reach", 20, "--heads", 3, path=whole)
    wrong("image_size one of patch_size", "--reach", 20, "--image-size", 50, path=whole)
    wrong("has 99 entries", "--reach", 20, "--vocab", vocabulary(tmp_path, 99), path=whole)
    vqa(tmp_path, "train2014", range(9))
    wrong("v2_OpenEnded_mscoco_val2014_questions.json", "--reach", 20, "--answers", tmp_path, path=whole)
    vqa(tmp_path, "val2014", ())
    wrong("has 1 answers, and", "--reach", 20, "--answers", tmp_path, path=whole)
    torch.save(released("nlvr2-relative"), file)
    wrong("--answers is of VQA", "--reach", 20, "--answers", tmp_path)
    torch.save(released("pretrained-absolute"), file)
    wrong("give --heads")
    wrong("--reach is of VLMo's relative positions", "--heads", 4, "--reach", 20)
    with pytest.raises(runtime.UserError, match="would replace the released file itself"):
        call(monkeypatch, weights, whole, "-o", whole, "--reach", 20)
    (tmp_path / "folder").mkdir()
    for nowhere in (tmp_path / "no" / "out.pt", tmp_path / "folder"):
        with pytest.raises(runtime.UserError, match="could not be written"):
            call(monkeypatch, weights, whole, "-o", nowhere, "--reach", 20)
    assert not list(tmp_path.glob("*.tmp"))
    call(monkeypatch, weights, whole, "-o", out, "--reach", 20)
    whole, out = out, tmp_path / "again.pt"
    wrong("is a checkpoint of this project already", path=whole)


def published(size, task, image_size, patch=16, V=30522):
    """Keys and shapes of a published file, as its authors' code names them."""
    D, L, F = {"base": (768, 12, 2), "base_plus": (544, 24, 3), "large": (1024, 24, 3)}[size]
    H, side, relative = 12 if size == "base" else 16, image_size // patch, size != "base_plus"
    linear = lambda name, out, width: {f"{name}.weight": (out, width), f"{name}.bias": (out,)}
    norm = lambda name, width=D: {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    shapes = {"transformer.cls_token": (1, 1, D), "transformer.patch_embed.proj.weight": (D, 3, patch, patch),
              "transformer.patch_embed.proj.bias": (D,), "text_embeddings.word_embeddings.weight": (V, D),
              "text_embeddings.position_embeddings.weight": (40, D), "token_type_embeddings.weight": (2, D),
              "text_embeddings.token_type_embeddings.weight": (2, D)}  # fmt: skip
    shapes |= norm("transformer.norm") | norm("text_embeddings.LayerNorm") | linear("pooler.dense", D, D)
    if relative:
        shapes["relative_position_bias_table"] = ((2 * side - 1) ** 2 + 3 + 2 * 196 + 2, H * L)
    else:
        shapes["transformer.pos_embed"] = (1, 1 + side * side, D)
    for i in range(L):
        block = f"transformer.blocks.{i}"
        shapes |= {f"{block}.attn.qkv.weight": (3 * D, D), f"{block}.attn.q_bias": (D,), f"{block}.attn.v_bias": (D,)}
        shapes |= norm(f"{block}.norm1") | linear(f"{block}.attn.proj", D, D)
        shapes |= {f"{block}.gamma_{k}": (D,) for k in (1, 2) if relative}
        for expert in ("text", "imag", "vl")[: 2 + (i >= L - F)]:
            shapes |= norm(f"{block}.norm2_{expert}")
            shapes |= linear(f"{block}.mlp_{expert}.fc1", 4 * D, D) | linear(f"{block}.mlp_{expert}.fc2", D, 4 * D)
    if task == "vqa":
        head = linear("vqa_classifier.0", 2 * D, D) | norm("vqa_classifier.1", 2 * D)
        return shapes | head | linear("vqa_classifier.3", 3129, 2 * D)
    shapes |= {f"itc_{kind}_proj.fc.weight": (D, D) for kind in ("text", "image", "vl_text", "vl_image")}
    shapes |= linear("mlm_score.transform.dense", D, D) | norm("mlm_score.transform.LayerNorm")
    shapes |= {"mlm_score.decoder.weight": (V, D), "mlm_score.bias": (V,), "logit_scale": (), "logit_vl_scale": ()}
    return shapes | linear("itm_score.fc", 2, D)


def published_beit():
    """Of base, fine-tuned on ImageNet-22k: the trunk and vision expert of VLMo's, and a table in each block."""
    shapes = {"head.weight": (21841, 768), "head.bias": (21841,), "fc_norm.weight": (768,), "fc_norm.bias": (768,)}
    for key, shape in published("base", "", 224).items():
        if key.startswith("transformer.") and not re.search("_(text|vl)|transformer.norm", key):
            shapes[key.removeprefix("transformer.").replace("_imag", "")] = shape
    return shapes | {f"blocks.{i}.attn.relative_position_bias_table": (27 * 27 + 3, 12) for i in range(12)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, task, image_size",
    [("base", "", 224), ("base_plus", "", 224), ("large", "", 224), ("base", "vqa", 480), ("base", "beit", 224)],
)
def test_the_published_sizes_are_imported_in_little_memory(size, task, image_size, tmp_path):
    file, out = tmp_path / "released.pt", tmp_path / "out.pt"
    shapes = published_beit() if task == "beit" else published(size, task, image_size)
    torch.save({"model": {key: filled(key, shape) for key, shape in shapes.items()}}, file)
    torch.load(file, weights_only=True)  # from now on, the file is in the page cache: the time is the program's
    began, most = time.perf_counter(), 0
    run = subprocess.Popen([sys.executable, ROOT / "weights.py", file, "-o", out], stdout=subprocess.PIPE, text=True)
    while run.poll() is None:
        status = Path(f"/proc/{run.pid}/status").read_text()
        most = max([most, *(1024 * int(kb) for kb in re.findall(r"RssAnon:\s+(\d+) kB", status))])
        time.sleep(0.02)
    took, bytes_there = time.perf_counter() - began, file.stat().st_size
    print(run.stdout.read())
    print(f"{size} {task}: {took:.1f} s, {most / 1e6:.0f} MB of anonymous memory, file {bytes_there / 1e6:.0f} MB")
    assert run.returncode == 0 and most < 1.5 * bytes_there
    content, config, _ = evaluate.read_checkpoint(out)
    assert replace(config, max_text_len=40) == replace(
        CONFIGS[size], image_size=image_size, text_reach=196, position=config.position, layer_scale=config.layer_scale
    )
    key = "blocks.11.mlp.fc1.weight" if task == "beit" else "transformer.blocks.11.mlp_imag.fc1.weight"
    assert torch.equal(content["model"]["blocks.11.experts.vision.fc1.weight"], filled(key, shapes[key]))
