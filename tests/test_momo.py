"""MoMo: only visible tokens reach the encoder, what is hidden is scored at its own place, the
gradients of two modalities add up."""

import random
import re
from dataclasses import replace

import pytest
import torch
from conftest import (
    BRIEF, SIZE, assert_close_metrics, bare, batch_of, call, main_of, metrics, pictures
)  # fmt: skip
from PIL import Image

import checkpoint
import finetune
import momo
import runtime
import shapes
import texts
import train
from mome import CONFIGS, Config, VLMo
from momo import MoMoImage, MoMoText, MoMoVL
from runtime import UserError
from texts import IGNORE

SMALL = Config(
    dim=24, layers=2, heads=3, image_size=16, patch_size=4, vocab_size=50, max_text_len=24,
    experts="shared",
)  # fmt: skip
SHAPE = (1, 16, 2)
INPUTS = {"image": ("image", "hidden"), "text": ("masked", "labels", "mask")}


def pairs_of(config, lengths, seed=0):
    """A batch of pairs of which three quarters are hidden."""
    batch, rng = batch_of(config, lengths, seed), random.Random(seed)
    hidden = [momo.hide_patches(0.75, 16, rng) for _ in lengths]
    labels = torch.full_like(batch["text"], IGNORE)
    for row, length in enumerate(lengths):
        at = momo.hide(0.75, rng, range(1, length - 1))
        labels[row, at] = batch["text"][row, at]
    masked = batch["text"].masked_fill(labels != IGNORE, 4)
    return batch | {"hidden": torch.stack(hidden), "labels": labels, "masked": masked}


def part_of(batch, modality):
    return batch if modality == "pair" else {name: batch[name] for name in INPUTS[modality]}


def model_and_decoder(modality, config=SMALL, shape=SHAPE):
    torch.manual_seed(0)
    return VLMo(config).double(), momo.Decoder(config, shape, modality).double()


MODALITIES = {MoMoImage: ["image"], MoMoText: ["text", "image"], MoMoVL: ["pair", "text"]}
LOSSES = {
    MoMoImage: ["mim"],
    MoMoText: ["mlm", "mim"],
    MoMoVL: ["cmm mim", "cmm mlm", "itc", "itm", "mlm"],
}


def stage_of(kind, **attributes):
    """A stage with a decoder per modality, and a batch for each."""
    torch.manual_seed(0)
    names = MODALITIES[kind]
    stage = bare(kind, VLMo(SMALL), negatives="global", aligned=["itc", "itm"], normalised=False)
    stage.head = torch.nn.ModuleDict({name: momo.Decoder(SMALL, SHAPE, name) for name in names})
    stage.loss_weights = dict.fromkeys(LOSSES[kind], 1.0)
    for name, value in attributes.items():
        setattr(stage, name, value)
    batches = pairs_of(SMALL, [9, 3, 14, 6]), pairs_of(SMALL, [12, 24, 7, 20], seed=1)
    return stage.double(), list(map(part_of, batches, names))


# ---- Hiding, the encoder, the decoders -----------------------------------------------------------


def test_what_is_hidden_does_not_reach_the_encoder():
    (model, decoder), batch = model_and_decoder("pair"), pairs_of(SMALL, [9, 14, 5])
    pixels, logits = momo.reconstruct(model, decoder, batch)
    hidden = batch["hidden"].view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = batch | {"image": torch.where(hidden, 255 - batch["image"], batch["image"])}
    other["masked"] = torch.where(batch["labels"] != IGNORE, 7, batch["masked"])
    other_pixels, other_logits = momo.reconstruct(model, decoder, other)
    assert torch.equal(pixels, other_pixels) and torch.equal(logits, other_logits)
    seen = batch | {"image": torch.where(hidden, batch["image"], 255 - batch["image"])}
    assert not torch.allclose(momo.reconstruct(model, decoder, seen)[1], logits)


def test_the_encoder_computes_only_visible_rows_and_padding_changes_none():
    (model, _), x = model_and_decoder("pair"), torch.randn(3, 10, 24, dtype=torch.double)
    visible = torch.zeros(3, 10, dtype=torch.bool)
    visible[0, [0, 3, 4]] = visible[1, [0, 2, 5, 6, 9]] = visible[2, [1]] = True
    rows, place, real = momo.encode_visible(model, x, visible)
    assert rows.shape == (3, 5, 24) and real.sum(1).tolist() == [3, 5, 1]
    for i in range(3):
        expected, at, _ = momo.encode_visible(model, x[i : i + 1], visible[i : i + 1])
        assert at[0].tolist() == visible[i].nonzero()[:, 0].tolist()
        torch.testing.assert_close(rows[i][real[i]], expected[0])
        assert torch.equal(place[i][real[i]], at[0])


def plain_decoder(modality, words=0):
    """A decoder without layers, in which a hidden row says where it stands, among words 0 … T,
    [I_CLS], patches, and a visible row says 47."""
    config = replace(SMALL, dim=64, heads=1)
    model, decoder = model_and_decoder(modality, config, (1, 64, 1))
    places = torch.eye(64, dtype=torch.double)
    with torch.no_grad():
        decoder.enter.weight.zero_(), decoder.enter.bias.copy_(9 * places[47])
        decoder.mask_token.zero_()
        decoder.blocks, decoder.norm = torch.nn.ModuleList(), torch.nn.Identity()
        for position, first in ((decoder.text_position, 0), (decoder.image_position, words)):
            if position is not None:
                position.copy_(places[first : first + len(position)])
        if modality != "image":
            decoder.words.weight.copy_(places), decoder.words.bias.zero_()
            decoder.word_bias.zero_(), model.words.weight.copy_(places[: config.vocab_size])
        decoder.pixels.weight.copy_(places[:48]), decoder.pixels.bias.zero_()
    return model, decoder


def test_what_the_decoder_says_of_a_place_is_scored_against_that_place():
    """What comes out for hidden tokens and patches are the numbers of their places."""
    batch = pairs_of(SMALL, [9, 14, 5])
    at = batch["hidden"].nonzero()[:, 1]
    pixels, logits = momo.reconstruct(*plain_decoder("pair", words=24), batch)
    assert logits.argmax(1).tolist() == (batch["labels"] != IGNORE).nonzero()[:, 1].tolist()
    assert torch.equal(pixels.argmax(1) - 25, at)  # after [I_CLS], which is number 24
    pixels, _ = momo.reconstruct(*plain_decoder("image"), part_of(batch, "image"))
    assert torch.equal(pixels.argmax(1) - 1, at)
    numbers = torch.arange(16).view(1, 1, 4, 4).expand(3, 3, 4, 4)
    image = numbers.repeat_interleave(4, 2).repeat_interleave(4, 3)  # each patch holds its number
    wanted = momo.patch_values(image, batch["hidden"], False)
    assert torch.equal(((wanted + 1) * 127.5).round().long()[:, 0], at)


@pytest.mark.parametrize("modality", ["image", "text", "pair"])
def test_a_sample_is_reconstructed_alike_on_its_own_and_in_a_batch(modality):
    (model, decoder), batch = model_and_decoder(modality), pairs_of(SMALL, [9, 14, 5])
    inputs = part_of(batch, modality)
    together = momo.reconstruct(model, decoder, inputs)
    single = []
    for i in range(3):
        one = {name: tensor[i : i + 1] for name, tensor in inputs.items()}
        single.append(momo.reconstruct(model, decoder, one))
    for k, whole in enumerate(together):
        if whole is not None:
            pieces = torch.cat([each[k] for each in single])
            torch.testing.assert_close(whole, pieces, rtol=1e-10, atol=1e-12)


def test_masks_have_exact_counts():
    tokenizer = texts.train_tokenizer(shapes.World("train", 0, count=50).corpus(), 300)
    for ratio in (0.15, 0.75):
        words = momo.HiddenWords(tokenizer, 24, ratio)
        for seed, caption in enumerate(["", "red", "a small red circle above a large blue square"]):
            ids, mask = words.encode(caption)
            masked, labels = words.mask_words(ids, random.Random(seed))
            tokens, hidden = int(mask.sum()) - 2, labels != IGNORE
            assert hidden.sum() == (max(1, round(ratio * tokens)) if tokens else 0)
            assert torch.equal(labels[hidden], ids[hidden]) and (masked[hidden] == words.mask).all()
            assert torch.equal(masked[~hidden], ids[~hidden])
            assert not hidden[0] and not hidden[ids == words.sep].any()
    assert all(momo.hide_patches(0.75, 196, random.Random(i)).sum() == 147 for i in range(20))


# ---- Losses, gradients, measures -----------------------------------------------------------------


class Pictures(list):
    """A source of uint8 (3, S, S)."""

    def image(self, i):
        return Image.fromarray(self[i].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("normalised", [False, True])
def test_loss_and_measure_are_squared_errors_of_hidden_patches(normalised):
    image = torch.randint(0, 256, (2, 3, 16, 16)).byte()
    values = momo.patch_values(image, torch.ones(2, 16).bool(), normalised)
    if normalised:
        torch.testing.assert_close(values.mean(1), torch.zeros(32), atol=1e-5, rtol=0)
        torch.testing.assert_close(values.var(1), torch.ones(32), atol=1e-4, rtol=0)
    at = torch.stack([momo.hide_patches(0.75, 16, random.Random(f"mask {i}")) for i in range(2)])
    stage, _ = stage_of(MoMoImage, normalised=normalised)
    inputs = {"image": image, "hidden": at}
    wanted, seen = (momo.patch_values(image, which, normalised) for which in (at, ~at))
    pixels, _ = momo.reconstruct(stage.model, stage.head["image"], inputs)
    error = (pixels - wanted).square().mean().item()
    assert stage(inputs)["mim"].item() == pytest.approx(error)
    guess = seen.unflatten(0, (2, 4)).mean(1).repeat_interleave(12, 0)
    expected = {"error": error, "mean patch's error": (guess - wanted).square().mean().item()}
    found = momo.masked_pixels(stage, Pictures(image), "cpu")
    assert found == pytest.approx(expected | {"masked patches": 24})


@pytest.mark.parametrize("kind", [MoMoText, MoMoVL])
def test_gradients_of_both_modalities_add_up(kind):
    """CMGA: a step on both has the sum of the gradients that two steps in turn have."""

    def gradients(turns, step):
        stage, batches = stage_of(kind, takes_turns=turns, step=step)
        torch.manual_seed(3)  # the same negatives
        values = stage(*batches)
        sum(values[name] for name in stage.loss_weights if name in values).backward()
        return {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}

    both, first, second = (gradients(*how) for how in ((False, 5), (True, 2), (True, 3)))
    assert both.keys() == first.keys() | second.keys()
    assert both["model.words.weight"].any(dim=1).all()  # the output's weights, too: all words learn
    assert "model.blocks.0.attention.query.shared.weight" in first.keys() & second.keys()
    for name, gradient in both.items():
        parts = [each[name] for each in (first, second) if name in each]
        torch.testing.assert_close(sum(parts), gradient, rtol=1e-9, atol=1e-12)
        assert gradient.any(), name  # what is trained has something to learn from


@pytest.mark.parametrize("kind", MODALITIES)
def test_each_stage_trains_what_its_losses_read(kind):
    blocks = {"blocks.*.norm", "blocks.*.attention.shared", "blocks.*.experts.shared"}
    image = {"patches", "image_cls", "image_position"}
    text = {"words", "text_norm", "text_position"}
    pair = {"itc_image", "itc_text", "logit_scale", "pooler", "itm_head"}
    more = {MoMoImage: set(), MoMoText: text, MoMoVL: text | pair}[kind]
    expected = {"types", "norm"} | blocks | image | more
    stage, batches = stage_of(kind, takes_turns=kind is not MoMoImage)  # before step 1: all of it
    train.freeze_unread(stage, batches, runtime.Runtime())
    assert set(checkpoint.trainable(stage.model)) == expected
    assert all(p.requires_grad for p in stage.head.parameters())


def test_base_has_as_many_active_parameters_as_table_1_says():
    with torch.device("meta"):
        model = VLMo(replace(CONFIGS["base"], experts="shared"))
    for name, millions in {"text": 110, "image": 86, "pair": 110}.items():
        count = sum(p.numel() for p in momo.active(model)[name])
        assert count == pytest.approx(millions * 1e6, rel=0.015)


# ---- The stages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["momo-text"], ["momo-vl", "--no-cmga", "--itm-weight", 0]])
def test_two_processes_train_and_measure_as_one(flags, processes, tmp_path, monkeypatch):
    folder = pictures(tmp_path / "pictures", count=16)
    (tmp_path / "a.txt").write_text("\n".join(f"{i} is followed by {i + 1}" for i in range(400)))
    flags = [*SIZE, *BRIEF, "--data", folder, "--texts", tmp_path / "a.txt", "--stage", *flags]
    call(monkeypatch, train, *flags, "--out", tmp_path / "one")
    processes(2, main_of, "train", *flags, "--out", tmp_path / "two", group=False)
    assert_close_metrics(tmp_path / "one", tmp_path / "two")
    trained = [entry.keys() & set(LOSSES[MoMoVL]) for entry in metrics(tmp_path / "one")[:4]]
    if "--no-cmga" in flags:  # the modalities take turns
        assert trained == [{"mlm"}, {"cmm mim", "cmm mlm", "itc"}] * 2


def test_the_stages_train_one_from_another_and_serve_the_tasks(small_world, tmp_path, monkeypatch):
    start = SIZE
    for stage in ("image", "text", "vl"):
        out = tmp_path / stage
        call(monkeypatch, train, "--stage", f"momo-{stage}", *start, *BRIEF, "--out", out)
        start = ["--init", out / "last.pt"]
    last = {stage: metrics(tmp_path / stage)[-1].keys() for stage in ("image", "text", "vl")}
    assert {"error", "mean patch's error"} <= last["image"]
    assert {"error", "perplexity"} <= last["text"] and {"TR@1", "perplexity"} <= last["vl"]
    vl = checkpoint.read(tmp_path / "vl/last.pt").tensors
    assert "mlm_head.0.weight" not in vl  # the decoders have its place, and stay behind
    for task in ("vqa", "classify"):
        run = ["--task", task, *start, "--batch-size", 8, "--epochs", 0.05]
        call(monkeypatch, finetune, *run, "--out", tmp_path / task)
        assert "accuracy" in metrics(tmp_path / task)[-1]


def test_a_stage_is_set_up_as_the_paper_says(small_world, tmp_path, monkeypatch):
    """Weights of the losses, lengths of texts, the batch, and how much is hidden."""
    begun = []
    monkeypatch.setattr(train, "begin", lambda stage, *rest: begun.append(stage))
    for kind in MODALITIES:
        [name] = [name for name, stage in train.STAGES.items() if stage is kind]
        call(monkeypatch, train, "--stage", name, *SIZE, "--out", tmp_path)
        recipe, length = kind.recipe["base"], 196 if kind is MoMoText else None
        assert recipe["batch_size"] == 64 * 64 and recipe.get("max_text_len") == length
        assert begun[-1].loss_weights == dict.fromkeys(LOSSES[kind], 1.0)
        assert not begun[-1].model.config.drop_path
        for modality, samples in zip(MODALITIES[kind], begun[-1].samples, strict=True):
            sample = samples[0, 0]
            if modality != "text":
                assert int(sample["hidden"].sum()) == 3  # of 4 patches
            if modality != "image":
                tokens, ratio = int(sample["mask"].sum()) - 2, 0.15 if modality == "text" else 0.75
                assert (sample["labels"] != IGNORE).sum() == max(1, round(ratio * tokens))


REFUSED = """
momo-text --texts absent.txt | momo-text --no-simultaneous --texts absent.txt
momo-text --no-simultaneous --no-cmga | momo-text --no-simultaneous --data tests
momo-vl --no-simultaneous --texts tests | momo-text --max-text-len 2
momo-image --image-size 8 --patch-size 8 | momo-image --init VL
"""


@pytest.mark.parametrize("flags", re.split(r" \| |\n", REFUSED.strip()))
def test_what_does_not_fit_is_refused(flags, stages, small_world, tmp_path, monkeypatch):
    flags = flags.replace("VL", str(stages / "vl/last.pt")).split()  # which has several experts
    with pytest.raises(UserError):
        call(monkeypatch, train, *BRIEF, "--out", tmp_path / "out", "--stage", *flags)
    assert not (tmp_path / "out").exists()
