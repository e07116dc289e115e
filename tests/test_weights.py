"""Released files. The figures of released.json are outputs of the authors' implementation, for
weights and inputs made by a rule."""

import copy
import functools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, refused, shaken, tune
from files import CASES, released, shapes_of, write_lines
from torch import nn

import checkpoint
import nlvr2
import texts
import vqa
import weights
from mome import CONFIGS, classifier
from sides import bare


def imported(name, state=None):
    """A reference file, or another state dict of its kind → model, report."""
    state = released(name) if state is None else state
    return weights.from_beit(state) if "beit" in name else weights.from_vlmo(state, 4, 20)


@pytest.fixture
def convert(monkeypatch):
    """The command, which finds 17 answers in VQA 2.0, and which knows what it cannot read off the
    small reference files."""

    def questions(folder, split):
        numbers = range(100) if split == "train" else range(100, 153)
        return [SimpleNamespace(majority=f"Answer {k % 17}.") for k in numbers]

    known = functools.partial(weights.read_vlmo, heads=4, reach=20)
    monkeypatch.setattr(weights, "read_vlmo", known)
    monkeypatch.setattr(vqa, "questions", questions)
    return functools.partial(call, "weights")


def vocabulary(folder, size=100):
    """vocab.txt of the reference files' size."""
    path = folder / f"vocab-{size}.txt"
    write_lines(path, *texts.SPECIAL, *(f"[unused{k}]" for k in range(size - len(texts.SPECIAL))))
    return path


# ---- What a file computes ------------------------------------------------------------------------


@torch.no_grad()
def outputs(model, case):
    """What the reference names, of one of this project's models."""
    model.eval()
    rng, S = np.random.default_rng(case["input_seed"]), case["image_size"]
    lengths, B = case["text_lengths"], len(case["text_lengths"] or "BEI")
    images = torch.from_numpy(rng.standard_normal((2 if lengths else 1, B, 3, S, S))).float()
    if not lengths:
        model.norm = torch.nn.Identity()
        return {"hidden_before_final_norm": model.encode_image(images[0])}
    T, lengths = case["max_text_len"], torch.tensor(lengths)
    text = torch.from_numpy(rng.integers(5, case["vocab_size"], (B, T)))
    mask = torch.arange(T) < lengths[:, None]
    text[:, 0], text[torch.arange(B), lengths - 1], text[~mask] = 2, 3, 0
    batch = {"text": text, "mask": mask, "image": images[0]}
    if "vqa" in case["name"]:
        return {"vqa_logits": bare(vqa.VQA, model, head=model.head).predict(batch)}
    if "nlvr2" in case["name"]:
        batch["image"] = images.transpose(0, 1)  # (B, 2, 3, S, S)
        return {"nlvr2_logits": bare(nlvr2.NLVR2, model, head=model.head).predict(batch)}
    hidden = model.encode_pair(text, mask, images[0])
    return {
        "pair_text_hidden_valid": hidden[:, :T][mask],
        "pair_image_hidden": hidden[:, T:],
        "pair_pooled": model.pool(hidden),
        "itm_logits": model.itm_head(model.pool(hidden)),
        "mlm_logits_valid": model.mlm_head(hidden[:, :T][mask]),
        "text_hidden_valid": model.encode_text(text, mask)[mask],
        "image_hidden": model.encode_image(images[0]),
        "itc_text": model.embed_text(text, mask),
        "itc_image": model.embed_image(images[0]),
        "logit_scale": model.logit_scale.exp(),
    }


@pytest.mark.parametrize("number, name", list(enumerate(CASES)))
def test_a_checkpoint_computes_what_the_released_file_did(number, name, convert, tmp_path, capsys):
    file, out, kind = tmp_path / "released.pt", tmp_path / "out.pt", name.split("-")[0]
    state, old = released(name), number > 3  # as PyTorch 1.5 wrote files
    prefixed = {f"module.{key}": tensor for key, tensor in state.items()}
    containers = {"state_dict": state, "epoch": 3}, {"module": prefixed}, {"model": state}, state
    torch.save(containers[number % 4], file, _use_new_zipfile_serialization=not old)
    flags = [] if kind == "beit" else ["--vocab", vocabulary(tmp_path)]
    flags += ["--answers", tmp_path] if kind == "vqa" else []
    convert(file, "-o", out, *flags)
    table = capsys.readouterr().out
    assert "  taken " in table and ("  ignored " in table) == (kind != "retrieval")

    saved = checkpoint.read(out)
    assert saved.stage == {"pretrained": "vl", "beit": "image"}.get(kind, kind)
    assert (saved.tokenizer is None) == (kind == "beit")
    choices = [f"answer {k}" for k in range(17)]
    assert saved.extra == ({"choices": choices} if kind == "vqa" else {})
    model, _ = checkpoint.begin(saved.config, saved, 0)
    if saved.head:
        model.head = classifier(saved.config, weights.TASKS[kind] * 48, len(saved.head["3.bias"]))
        checkpoint.load_exactly(model.head, saved.head, out)
    found, same = outputs(model, CASES[name]), outputs(imported(name)[0], CASES[name])
    for key, wanted in CASES[name]["outputs"].items():
        assert torch.equal(found[key], same[key]), key
        if key == "logit_scale":
            assert found[key].item() == pytest.approx(wanted, rel=1e-6)
            continue
        assert (found[key].flatten()[:12] - torch.tensor(wanted["head"])).abs().max() < 1e-5, key
        assert found[key].norm().item() == pytest.approx(wanted["l2"], rel=1e-5)
        assert found[key].sum().item() == pytest.approx(wanted["sum"], rel=1e-4, abs=1e-3)


def test_imported_tasks_are_evaluated_and_fine_tuned(convert, tmp_path):
    file, out = tmp_path / "released.pt", tmp_path / "out.pt"
    vocab, answers = ["--vocab", vocabulary(tmp_path)], ["--answers", tmp_path]
    torch.save(released("vqa-relative"), file)
    command = ["--task", "vqa", "--checkpoint", out, "--split", "val"]
    for known in (vocab, answers):
        convert(file, "-o", out, "--image-size", 24, *known)
        refused(call, "evaluate", *command)  # what the import did not get is asked for
    call("evaluate", *command, *vocab)

    torch.save(released("nlvr2-relative"), file)
    convert(file, "-o", out)
    run = ["--init", out, "--image-size", 16, *vocab, "--batch-size", 2, "--epochs", 1e-3]
    tune("nlvr2", tmp_path / "run", *run)


def test_absolute_beit():
    kept = {key: t for key, t in released("beit-shared-table").items() if "rel" not in key}
    state = {"pos_embed": torch.randn(1, 17, 48)} | kept
    refused(weights.from_beit, state)  # nothing tells the number of heads
    model, rows = weights.from_beit(state, heads=4)
    assert model.config.position == "absolute" and model.config.layer_scale == 0.1
    assert torch.equal(model.image_position, state["pos_embed"][0])
    assert rows["image_position"] == ("taken", 17 * 48) and rows["norm"][0] == "fresh"


def test_a_file_of_stage_text_has_no_vl_experts_and_may_be_of_half_precision():
    state = {}
    for key, tensor in released("pretrained-relative").items():
        if "_vl" not in key and not key.startswith(("itm", "itc", "logit")):
            state[key] = tensor.bfloat16()
    model, rows = weights.from_vlmo(state, reach=20)
    assert model.config.vl_layers == 2 and rows["blocks.*.experts.vl"][0] == "copied"
    assert rows["itm_head"][0] == "fresh" and weights.read_vlmo(state, reach=20).stage == "text"
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.pooler.weight, state["pooler.dense.weight"].float())
    assert torch.equal(model.types[2], state["token_type_embeddings.weight"][1].float())


def test_published_sizes_are_known_by_their_shapes():
    for name, size, image_size in [
        ("pretrained-relative", "base", 384),
        ("pretrained-absolute", "base_plus", 224),
        ("pretrained-relative", "large", 224),
        ("beit-per-block-tables", "base", 224),
    ]:
        config, side = CONFIGS[size], image_size // 16
        D, heads, offsets = config.dim, config.heads, (2 * side - 1) ** 2 + 3
        sizes = {48: D, 144: 3 * D, 192: 4 * D, 8: 16, 17: 1 + side**2, 100: 30522, 12: 40}
        sizes |= {94: offsets + 2 * 196 + 2, 16: heads * config.layers, 52: offsets, 4: heads}
        with torch.device("meta"):
            state = {}
            for key, shape in shapes_of(name, config.layers, config.vl_layers).items():
                state[key] = torch.empty([sizes.get(size, size) for size in shape])
            read = weights.read_beit if "beit" in name else weights.read_vlmo
            found = read(state).config
        same = {"position": found.position, "layer_scale": found.layer_scale}
        assert found == replace(config, image_size=image_size, **same)


# ---- Refusals ------------------------------------------------------------------------------------

LACKS = {  # names, or beginnings of names, of what a file must not lack
    "pretrained-relative": "transformer. transformer.blocks.2. transformer.blocks.3. "
    "transformer.blocks.3.mlp_vl transformer.blocks.0.gamma_1 text_embeddings.token_type "
    "mlm_score.bias relative_position_bias_table",
    "beit-per-block-tables": "blocks. blocks.0.attn.relative blocks.2.attn.relative blocks.3.mlp",
}
WRONG = {  # of another shape, or left over
    "relative_position_bias_table": torch.ones(96, 16),
    "transformer.blocks.1.attn.qkv.weight": torch.ones(144, 40),
    "vqa_classifier.3.weight": torch.ones(5, 96),
    "transformer.extra": torch.ones(3),
    "blocks.1.attn.relative_position_bias_table": torch.ones(52, 3),  # of BEiT
    "epoch": 3,
}


def test_a_file_that_is_not_as_released_is_refused():
    for name, starts in LACKS.items():
        for start in starts.split():
            state = {key: t for key, t in released(name).items() if not key.startswith(start)}
            refused(imported, name, state)
    for key, tensor in WRONG.items():
        name = "beit-per-block-tables" if key.startswith("blocks") else "vqa-relative"
        refused(imported, name, released(name) | {key: tensor})


def test_broken_files_and_wrong_flags_are_refused(convert, tmp_path):
    whole, file, out = tmp_path / "whole.pt", tmp_path / "file.pt", tmp_path / "out.pt"
    state, other = released("vqa-relative"), released("nlvr2-relative")
    torch.save(state, whole)

    def refuse(path, *flags, out=out):
        refused(convert, path, "-o", out, *flags)

    refuse(tmp_path / "missing.pt")
    for content in (b"no weights", whole.read_bytes()[:-100], whole.read_bytes()[:5000]):
        file.write_bytes(content)
        refuse(file)
    code = SimpleNamespace()  # or anything else that a pickle can make
    for content in ([1, 2], {}, {"state_dict": state, "callbacks": code}):
        torch.save(content, file)
        refuse(file)
    refuse(whole, "--image-size", 50)  # patches of 8 do not fit
    refuse(whole, "--vocab", vocabulary(tmp_path, 99))
    fewer = {key: t[:16] for key, t in state.items() if key.startswith("vqa_classifier.3.")}
    for content in (other, state | fewer):  # no answers, or others
        torch.save(content, file)
        refuse(file, "--answers", tmp_path)
    for place in (whole, tmp_path / "no" / "out.pt", tmp_path):  # never the released file itself
        refuse(whole, out=place)
    assert not out.exists() and len(torch.load(whole)) == len(state)


# ---- ViT and MAE ---------------------------------------------------------------------------------


NAMES = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj": "attn.proj"}
NAMES |= {"linear": "mlp.fc", "embed.": "patch_embed.proj."}  # {here: in files of timm and MAE}


def vit(image, D=32):
    """A small ViT of PyTorch's layers → its tensors as timm and MAE name them, keys' biases among
    them, and its rows after the final norm."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 4, 4 * D, 0, "gelu", 1e-6, batch_first=True, norm_first=True)
    blocks, embed = nn.ModuleList([layer, copy.deepcopy(layer)]), nn.Conv2d(3, D, 16, 16)
    parts = shaken(nn.ModuleDict({"embed": embed, "blocks": blocks, "norm": nn.LayerNorm(D, 1e-6)}))
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 5, D), "mask_token": (1, 1, D)}
    shapes |= {"head.weight": (9, D), "decoder_embed.weight": (8, D)}  # which nothing here needs
    state = {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    patches = embed(image).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(image), 1, D), patches], dim=1) + state["pos_embed"]
    for block in blocks:
        x = block(x)
    for name, tensor in parts.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    return state, parts["norm"](x)


def test_a_vit_or_mae_computes_what_it_did():
    """Without the keys' biases, which the softmax cancels."""
    image = torch.randn(2, 3, 32, 32)
    state, expected = vit(image)
    model, report = weights.from_beit(state, heads=4)
    rows = model.eval().encode_image(image)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)
    assert {report[name][0] for name in ("norm", "image_position", "patches")} == {"taken"}
    assert report["types"][0] == "fresh" and report["decoder_embed.weight"][0] == "ignored"
