"""Released files. The figures of released.json are outputs of the authors' implementation, for
weights and inputs made by a rule."""

import functools
import json
import math
import os
import re
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, bare, call
from test_vqa import vqa as vqa_files

import checkpoint
import evaluate
import finetune
import nlvr2
import shapes
import texts
import train
import vqa
import weights
from mome import CONFIGS, classifier
from runtime import UserError

CASES = json.loads(Path(__file__).with_name("released.json").read_text())
CASES = {case["name"]: case for case in CASES}


def filled(key, shape):
    """A tensor of the reference files."""
    tensor = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape) * 0.05
    tensor += 1.0 * (key.endswith("weight") and len(shape) == 1) + 0.5 * ("gamma_" in key)
    tensor += math.log(1 / 0.07) * key.startswith("logit_")
    return torch.tensor(tensor, dtype=torch.float32)


def shapes_of(name, layers=4, vl_layers=1):
    """{key: shape} of a reference file, or of one with more layers."""
    shapes = {}
    for shape, keys in CASES[name]["tensors"].items():
        sizes = tuple(int(size) for size in shape.split("x") if size)
        for key in keys:
            first = 0 if "*" in key else layers - vl_layers  # "blocks.3." has the VL expert
            for i in range(first, layers):
                shapes[re.sub(r"blocks\.[*3]\.", f"blocks.{i}.", key)] = sizes
    return shapes


@functools.cache
def released(name):
    """The state dict of a reference file."""
    return {key: filled(key, shape) for key, shape in shapes_of(name).items()}


def imported(name, state=None, **settings):
    """A reference file, or another state dict of its kind → model, report."""
    state = released(name) if state is None else state
    if "beit" in name:
        return weights.from_beit(state, **settings)
    return weights.from_vlmo(state, heads=4, reach=20, **settings)


@pytest.fixture
def small_files(monkeypatch):
    """Lets the command know what cannot be read off the small reference files."""
    known = functools.partial(weights.read_vlmo, heads=4, reach=20)
    monkeypatch.setattr(weights, "read_vlmo", known)


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


@pytest.mark.parametrize("name", CASES)
def test_released_weights_compute_what_they_did(name):
    found = outputs(imported(name)[0], CASES[name])
    for key, wanted in CASES[name]["outputs"].items():
        if key == "logit_scale":
            assert found[key].item() == pytest.approx(wanted, rel=1e-6)
            continue
        assert (found[key].flatten()[:12] - torch.tensor(wanted["head"])).abs().max() < 1e-5, key
        assert found[key].norm().item() == pytest.approx(wanted["l2"], rel=1e-5)
        assert found[key].sum().item() == pytest.approx(wanted["sum"], rel=1e-4, abs=1e-3)


def vocabulary(folder, size=100):
    """vocab.txt of the reference files' size, which knows letters."""
    letters = [chr(ord("a") + k) for k in range(26)]
    pieces = [*texts.SPECIAL, *letters, *("##" + letter for letter in letters)]
    pieces += [f"[unused{k}]" for k in range(size - len(pieces))]
    path = folder / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n")
    return path


def answers(folder, count=17):
    """VQA 2.0's files with answers that come nine times each."""
    ids = range(9 * count)
    for subset, share in (("train2014", ids[:100]), ("val2014", ids[100:])):
        vqa_files(folder, subset, share)
        path = folder / f"v2_mscoco_{subset}_annotations.json"
        content = json.loads(path.read_text())
        for entry in content["annotations"]:
            entry["multiple_choice_answer"] = f"Answer {entry['question_id'] % count}."
        path.write_text(json.dumps(content))
    return folder


CONTAINERS = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "module": lambda state: {"module": {f"module.{key}": t for key, t in state.items()}},
    "model": lambda state: {"model": state},
    "plain": lambda state: state,
    "old": lambda state: {"model": state},  # as PyTorch 1.5 wrote files
}


@pytest.mark.parametrize("name, container", [*zip(CASES, [*CONTAINERS, "plain", "old"])])
def test_a_checkpoint_computes_the_same_to_the_bit(
    name, container, small_files, tmp_path, monkeypatch, capsys
):
    file, out = tmp_path / "released.pt", tmp_path / "out.pt"
    content = CONTAINERS[container](released(name))
    torch.save(content, file, _use_new_zipfile_serialization=container != "old")
    flags = [] if "beit" in name else ["--vocab", vocabulary(tmp_path)]
    flags += ["--answers", answers(tmp_path)] if "vqa" in name else []
    call(monkeypatch, weights, file, "-o", out, *flags)
    table = capsys.readouterr().out
    assert "  taken " in table and ("  ignored " in table) == ("retrieval" not in name)

    saved, kind = checkpoint.read(out), name.split("-")[0]
    assert saved.stage == {"pretrained": "vl", "beit": "image"}.get(kind, kind)
    assert (saved.tokenizer is None) == ("beit" in name)
    choices = [f"answer {k}" for k in range(17)]
    assert saved.extra == ({"choices": choices} if kind == "vqa" else {})
    before = imported(name)[0]
    after, _ = checkpoint.begin(saved.config, saved, 0)
    if saved.head:
        after.head = classifier(saved.config, weights.TASKS[kind] * 48, len(saved.head["3.bias"]))
        checkpoint.load_exactly(after.head, saved.head, out)
    before, after = outputs(before, CASES[name]), outputs(after, CASES[name])
    for key in CASES[name]["outputs"]:
        assert torch.equal(before[key], after[key]), key


@torch.no_grad()
def submission(kind, name, vocab):
    """What a reference file answers on split val of the built-in world, sample by sample."""
    model, _ = imported(name, image_size=24)
    stage = bare(kind, model, head=model.head, choices=[f"answer {k}" for k in range(17)]).eval()
    source = sys.modules[kind.__module__].read(["shapes"], "val", 24)
    words, chosen = texts.Words(texts.load_tokenizer(vocab), 12), []
    for i in range(len(source)):
        text, mask = words.encode(source[i].text)
        image = torch.from_numpy(np.array(source.image(i))).movedim(-1, -3)  # of NLVR2 (2, 3, S, S)
        batch = {"image": image[None], "text": text[None], "mask": mask[None]}
        chosen.append(stage.predict(batch).argmax().item())
    return stage.submission(chosen, source)


@pytest.mark.parametrize("kind", [vqa.VQA, nlvr2.NLVR2])
def test_imported_tasks_are_evaluated_and_fine_tuned(
    kind, small_files, small_world, tmp_path, monkeypatch
):
    file, out, vocab = tmp_path / "released.pt", tmp_path / "out.pt", vocabulary(tmp_path)
    predictions, task = tmp_path / "predictions", kind.__name__.lower()
    torch.save(released(f"{task}-relative"), file)
    known = ["--answers", answers(tmp_path)] if task == "vqa" else []
    call(monkeypatch, weights, file, "-o", out, "--image-size", 24, *known)
    command = ["--task", task, "--checkpoint", out, "--split", "val"]
    call(monkeypatch, evaluate, *command, "--vocab", vocab, "--predictions", predictions)
    assert predictions.read_text() == submission(kind, f"{task}-relative", vocab)

    # What the import did not get is asked for
    with pytest.raises(UserError, match="--vocab"):
        call(monkeypatch, evaluate, *command)
    if task == "vqa":
        call(monkeypatch, weights, file, "-o", out, "--vocab", vocab)
        with pytest.raises(UserError, match="--answers"):
            call(monkeypatch, evaluate, *command)
    else:  # the built-in world has other answers than VQA 2.0, but the same truth values
        monkeypatch.setitem(shapes.SCENES, "test", 2)
        run = ["--task", task, "--init", out, "--image-size", 16, "--batch-size", 2]
        run += ["--vocab", vocab, "--epochs", 1e-3, "--out", tmp_path / "run"]
        call(monkeypatch, finetune, *run)
        assert (tmp_path / "run" / "last.pt").exists()


def test_stages_text_and_vl_run_from_beit(small_world, tmp_path, monkeypatch, capsys):
    name, out = "beit-per-block-tables", tmp_path / "beit.pt"
    torch.save({"model": released(name)}, tmp_path / "beit.pth")
    call(monkeypatch, weights, tmp_path / "beit.pth", "-o", out)
    run = ["--init", out, "--batch-size", 4, "--steps", 2, "--warmup", 1]
    run += ["--vocab-size", 300, "--max-text-len", 24]
    call(monkeypatch, train, "--stage", "text", *run, "--out", tmp_path / "text")
    call(monkeypatch, train, "--stage", "vl", *run, "--out", tmp_path / "vl")
    assert "copied" in capsys.readouterr().out
    saved = checkpoint.read(tmp_path / "text" / "last.pt").tensors
    for key, tensor in imported(name)[0].state_dict().items():  # stage text leaves them as they are
        if "attention" in key or "vision" in key:
            assert torch.equal(saved[key], tensor)


def test_absolute_beit():
    state = {"pos_embed": torch.randn(1, 17, 48)}
    for key, tensor in released("beit-shared-table").items():
        if not re.search("rel_pos|gamma", key):
            state[key] = tensor
    with pytest.raises(UserError):
        weights.from_beit(state)  # nothing tells the number of heads
    model, rows = weights.from_beit(state, heads=4)
    assert model.config.position == "absolute" and model.config.layer_scale == 0
    assert torch.equal(model.image_position, state["pos_embed"][0])
    assert rows["image_position"] == ("taken", 17 * 48) and rows["norm"][0] == "fresh"


def test_a_file_of_stage_text_has_no_vl_experts():
    state = {}
    for key, tensor in released("pretrained-relative").items():
        if "_vl" not in key and not key.startswith(("itm", "itc", "logit")):
            state[key] = tensor
    model, rows = weights.from_vlmo(state, reach=20)
    assert model.config.vl_layers == 2 and rows["blocks.*.experts.vl"][0] == "copied"
    assert rows["itm_head"][0] == "fresh" and weights.read_vlmo(state, reach=20).stage == "text"


def test_tensors_of_half_precision_are_taken():
    state = {key: tensor.bfloat16() for key, tensor in released("retrieval-absolute").items()}
    model, _ = weights.from_vlmo(state, heads=4)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.pooler.weight, state["pooler.dense.weight"].float())
    assert torch.equal(model.types[2], state["token_type_embeddings.weight"][1].float())


# Names, or beginnings of names, of what a file must not lack
VLMO_LACKS = """transformer.blocks.2. transformer.blocks.3. transformer.blocks.3.mlp_vl transformer.
transformer.blocks.0.gamma_1 text_embeddings.token_type itc_text_proj mlm_score.bias
relative_position_bias_table""".split()
BEIT_LACKS = "blocks. blocks.0.attn.relative blocks.2.attn.relative blocks.3.mlp.fc2.bias".split()
OF_VLMO = [  # of another shape, or left over
    ("text_embeddings.token_type_embeddings.weight", torch.ones(5, 48)),
    ("pooler.dense.bias", torch.ones(47)),
    ("relative_position_bias_table", torch.ones(96, 16)),
    ("transformer.blocks.1.attn.qkv.weight", torch.ones(144, 40)),
    ("vqa_classifier.3.weight", torch.ones(5, 96)),
    ("transformer.extra", torch.ones(3)),
    ("epoch", 3),
]
OF_BEIT = [
    ("blocks.1.attn.relative_position_bias_table", torch.ones(52, 3)),
    ("text.weight", torch.ones(3)),
]


@pytest.mark.parametrize(
    "name, key, tensor",
    [
        *(("pretrained-relative", key, None) for key in VLMO_LACKS),
        *(("beit-per-block-tables", key, None) for key in BEIT_LACKS),
        *(("vqa-relative", *wrong) for wrong in OF_VLMO),
        *(("beit-per-block-tables", *wrong) for wrong in OF_BEIT),
    ],
)
def test_a_file_that_is_not_as_released_is_refused_by_name(name, key, tensor):
    kept = {other: t for other, t in released(name).items() if not other.startswith(key)}
    state = kept if tensor is None else released(name) | {key: tensor}
    named = None if tensor is None else key.rsplit(".", 1)[-1]
    with pytest.raises(UserError, match=named):
        imported(name, state)


class Runs:
    """Would end the process when it is unpickled."""

    def __reduce__(self):
        return os._exit, (1,)


def test_broken_files_and_wrong_flags_are_refused_in_one_line(small_files, tmp_path, monkeypatch):
    whole, file, out = tmp_path / "whole.pt", tmp_path / "file.pt", tmp_path / "out.pt"
    state = released("vqa-relative")
    torch.save(state, whole)

    def refused(*flags, path=file):
        with pytest.raises(UserError) as error:
            call(monkeypatch, weights, path, "-o", out, *flags)
        assert "\n" not in str(error.value) and not out.exists()

    refused(path=tmp_path / "missing.pt")
    for content in (b"", whole.read_bytes()[:-100], whole.read_bytes()[:5000], b"no weights"):
        file.write_bytes(content)
        refused()
    for content in ([1, 2], {}, {"state_dict": state, "callbacks": Runs()}):  # code is not run
        torch.save(content, file)
        refused()
    refused("--image-size", 50, path=whole)  # patches of 8 do not fit
    refused("--vocab", vocabulary(tmp_path, 99), path=whole)
    refused("--answers", answers(tmp_path, 16), path=whole)
    torch.save(released("nlvr2-relative"), file)
    refused("--answers", answers(tmp_path))
    for place in (whole, tmp_path / "no" / "out.pt", tmp_path):  # never the released file itself
        with pytest.raises(UserError):
            call(monkeypatch, weights, whole, "-o", place)
    assert not list(tmp_path.glob("*.tmp")) and len(torch.load(whole)) == len(state)
    call(monkeypatch, weights, whole, "-o", out)
    ours, out = out, tmp_path / "again.pt"
    refused(path=ours)


def published(name, size, image_size):
    """{key: shape} of a published file: of a reference file, in its sizes."""
    config, side = CONFIGS[size], image_size // 16
    D, L, H, image_rows = config.dim, config.layers, config.heads, (2 * side - 1) ** 2 + 3
    sizes = {48: D, 96: 2 * D, 144: 3 * D, 192: 4 * D, 8: 16, 100: 30522, 12: 40, 10: 21841}
    sizes |= {94: image_rows + 394, 16: H * L, 52: image_rows, 4: H}
    sizes[17] = 3129 if "vqa" in name else 1 + side * side
    shapes = shapes_of(name, L, config.vl_layers)
    return {key: tuple(sizes.get(size, size) for size in shapes[key]) for key in shapes}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, size, image_size",
    [
        ("pretrained-relative", "base", 224), ("pretrained-absolute", "base_plus", 224),
        ("pretrained-relative", "large", 224), ("vqa-relative", "base", 480),
        ("beit-per-block-tables", "base", 224),
    ],
)  # fmt: skip
def test_the_published_sizes_are_imported_in_little_memory(name, size, image_size, tmp_path):
    file, out = tmp_path / "released.pt", tmp_path / "out.pt"
    wanted = published(name, size, image_size)
    torch.save({"model": {key: filled(key, shape) for key, shape in wanted.items()}}, file)
    began, most = time.perf_counter(), 0
    run = subprocess.Popen([sys.executable, ROOT / "weights.py", file, "-o", out])
    while run.poll() is None:
        status = Path(f"/proc/{run.pid}/status").read_text()
        most = max([most, *(1024 * int(kb) for kb in re.findall(r"RssAnon:\s+(\d+) kB", status))])
        time.sleep(0.02)
    took, bytes_there = time.perf_counter() - began, file.stat().st_size
    print(f"{name} {size}: {took:.1f} s, {most / 1e6:.0f} MB, file {bytes_there / 1e6:.0f} MB")
    assert run.returncode == 0 and most < 1.5 * bytes_there
    config = checkpoint.read(out).config
    same = {"position": config.position, "layer_scale": config.layer_scale}
    assert config == replace(CONFIGS[size], image_size=image_size, **same)
