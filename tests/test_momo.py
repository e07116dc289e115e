"""MoMo: only visible rows are encoded, what is hidden is scored at its own place, the gradients of
two modalities add up."""

import random
from dataclasses import replace

import conftest
import pytest
import torch
import torch.nn.functional as F
from conftest import BRIEF, SIZE, call, metrics, shaken

import checkpoint
import images
import momo
import momo_stages
import shapes
import texts
import train
from loader import with_counts
from mome import CONFIGS, VLMo
from momo_stages import MoMoAll, MoMoImage, MoMoText, MoMoVL
from sides import bare, pairs
from texts import IGNORE

SMALL = replace(conftest.SMALL, layers=2, experts="shared")
MODALITIES = {
    MoMoImage: ["image"],
    MoMoText: ["text", "image"],
    MoMoVL: ["pair", "text"],
    MoMoAll: ["pair", "text", "image"],
}
LOSSES = {
    MoMoImage: ["mim"],
    MoMoText: ["mlm", "mim"],
    MoMoVL: ["cmm mim", "cmm mlm", "itc", "itm", "mlm"],
    MoMoAll: ["cmm mim", "cmm mlm", "itc", "itm", "mlm", "mim"],
}
INPUTS = {"image": ["image", "hidden"], "text": ["masked", "labels", "mask"]}


def batch_with_hidden(modality):
    """Images, texts or pairs of which three quarters are hidden."""
    batch = pairs(SMALL, 4, 0.75)
    return with_counts([{name: batch[name] for name in INPUTS.get(modality, batch)}])[0]


def stage_of(kind, shared=False, **attributes):
    """A stage around a small model, and a batch per modality."""
    torch.manual_seed(0)
    stage = bare(kind, VLMo(SMALL), negatives="global", normalised=False)
    stage.loss_weights = dict.fromkeys(LOSSES[kind], 1.0)
    names = ["pair"] if shared else MODALITIES[kind]
    decoders = {name: momo.Decoder(SMALL, (1, 16, 2), name) for name in names}
    stage.head = torch.nn.ModuleDict(decoders)
    for name, value in attributes.items():
        setattr(stage, name, value)
    stage.samples = list(map(batch_with_hidden, MODALITIES[kind]))
    return shaken(stage).double(), stage.samples


def plain_rows(model, decoder, batch, i):
    """Sample i by itself, without padding → the decoder's rows (·, E) at hidden tokens, then at
    hidden patches."""
    parts = []  # embedded rows, where they are hidden, and the decoder's positions
    if "masked" in batch:
        T = int(batch["mask"][i].sum())
        words = model.embed_words(batch["masked"][i : i + 1, :T])
        parts.append((words[0], batch["labels"][i, :T] != IGNORE, decoder.text_position[:T]))
    if "image" in batch:
        patches = model.embed_patches(batch["image"][i : i + 1], 1)
        hidden = F.pad(batch["hidden"][i], (1, 0), value=False)  # [I_CLS] is always visible
        parts.append((patches[0], hidden, decoder.image_position))
    x, hidden, position = (torch.cat(column) for column in zip(*parts))
    rows = decoder.mask_token.repeat(len(x), 1)
    rows[~hidden] = decoder.enter(model.encode_rows(x[None, ~hidden], "image", 0, None)[0])
    rows = (rows + position)[None]
    for block in decoder.blocks:
        rows = block(rows, "image", 0, None)
    return decoder.norm(rows)[0, hidden]


@pytest.mark.parametrize("shared", [False, True])
def test_visible_rows_are_encoded_and_hidden_ones_reconstructed_at_their_places(shared):
    stage, batches = stage_of(MoMoAll, shared)
    for modality, batch in zip(MODALITIES[MoMoAll], batches):
        decoder, model = stage.decoder(modality), stage.model
        assert decoder is stage.head["pair" if shared else modality]
        samples = [plain_rows(model, decoder, batch, i) for i in range(4)]
        pixels, logits = momo.reconstruct(model, decoder, batch)
        patches = 0 if pixels is None else 12  # hidden ones per image
        assert (pixels is None, logits is None) == (modality == "text", modality == "image")
        if patches:
            expected = decoder.pixels(torch.cat([rows[-patches:] for rows in samples]))
            torch.testing.assert_close(pixels, expected, rtol=1e-10, atol=1e-12)
        if logits is not None:
            words = decoder.words(torch.cat([rows[: len(rows) - patches] for rows in samples]))
            expected = F.linear(words, model.words.weight, decoder.word_bias)
            torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)


def test_an_exact_share_is_hidden_and_no_special_token():
    words = momo.HiddenWords(texts.train_tokenizer(lambda: ["red"], 40), 24, 0.15)
    for count, hidden_count in {0: 0, 1: 1, 12: 2}.items():
        ids, _ = words.encode("red " * count)
        masked, labels = words.mask_words(ids, random.Random(0))
        hidden = labels != IGNORE
        assert hidden.sum() == hidden_count and (masked[hidden] == words.mask).all()
        assert torch.equal(labels[hidden], ids[hidden])
        assert torch.equal(masked[~hidden], ids[~hidden])
        assert not hidden[0] and not hidden[count + 1 :].any()
    assert momo.hide_patches(0.75, 196, random.Random(0)).sum() == 147


@pytest.mark.parametrize("normalised", [False, True])
def test_loss_and_measure_are_squared_errors_of_hidden_patches(normalised):
    stage, _ = stage_of(MoMoImage, normalised=normalised)
    source = shapes.World("test", 16, count=2)
    image = torch.stack([images.to_tensor(source.image(i)) for i in range(2)])
    hidden = [momo.hide_patches(0.75, 16, random.Random(f"mask {i}")) for i in range(2)]
    [inputs] = with_counts([{"image": image, "hidden": torch.stack(hidden)}])
    pixels, _ = momo.reconstruct(stage.model, stage.head["image"], inputs)
    values = image.double().reshape(2, 3, 4, 4, 4, 4)  # of rows and columns: patches, pixels
    values = values.permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 48) / 127.5 - 1
    if normalised:
        deviation = (values.var(2, keepdim=True) + 1e-6).sqrt()  # patches may be of one color
        values = (values - values.mean(2, keepdim=True)) / deviation
    wanted = torch.cat([values[i, hidden[i]] for i in range(2)])
    guess = torch.cat([values[i, ~hidden[i]].mean(0).expand(12, 48) for i in range(2)])
    error = F.mse_loss(pixels, wanted).item()
    assert stage(inputs)["mim"].item() == pytest.approx(error, rel=1e-4)
    expected = {"error": error, "mean patch's error": F.mse_loss(guess, wanted).item()}
    found = momo_stages.masked_pixels(stage, source, "cpu")
    assert found == pytest.approx(expected | {"masked patches": 24}, rel=1e-4)


@pytest.mark.parametrize("kind", [MoMoText, MoMoVL])
def test_gradients_of_both_modalities_add_up(kind):
    """CMGA: a step on both has the sum of the gradients that two steps in turn have."""

    def gradients(turns, step):
        same = lambda part=-1: torch.manual_seed(3)  # negatives
        stage, batches = stage_of(kind, takes_turns=turns, step=step, seed=same)
        values = stage(*batches)
        sum(values[name] for name in stage.loss_weights if name in values).backward()
        return {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}

    both, first, second = (gradients(*how) for how in ((False, 5), (True, 2), (True, 3)))
    before = gradients(True, 0)  # the first batch tells what is trained
    assert both.keys() == before.keys() == first.keys() | second.keys()
    assert both["model.words.weight"].any(dim=1).all()  # the output's weights, too: all words learn
    assert "model.blocks.0.attention.query.shared.weight" in first.keys() & second.keys()
    for name, gradient in both.items():
        parts = [each[name] for each in (first, second) if name in each]
        torch.testing.assert_close(sum(parts), gradient, rtol=1e-9, atol=1e-12)
        assert gradient.any(), name  # what is trained has something to learn from


TRUNK = {"types", "norm", "blocks.*.norm", "blocks.*.attention.shared", "blocks.*.experts.shared"}
IMAGE = TRUNK | {"patches", "image_cls", "image_position"}
TEXT = TRUNK | {"words", "text_norm", "text_position"}
HEADS = {"itc_image", "itc_text", "logit_scale", "pooler", "itm_head"}
LEARNS = {MoMoImage: IMAGE, MoMoText: TEXT | IMAGE, MoMoVL: TEXT | IMAGE | HEADS}
LEARNS[MoMoAll] = LEARNS[MoMoVL]


@pytest.mark.parametrize("size, counts", [("base", (110, 86, 110)), ("large", (335, 303, 335))])
def test_active_parameters_are_those_of_table_1(size, counts):
    with torch.device("meta"):
        model = VLMo(replace(CONFIGS[size], experts="shared"))
    for groups, millions in zip((TEXT, IMAGE, TEXT | IMAGE), counts):
        named = model.named_parameters()
        count = sum(p.numel() for name, p in named if checkpoint.group(name) in groups)
        assert count == pytest.approx(millions * 1e6, rel=0.015)


def test_the_stages_train_one_from_another(tmp_path, monkeypatch):
    start, begun, loop = SIZE, [], train.train
    monkeypatch.setattr(train, "train", lambda *a: begun.append(a[0]) or loop(*a))
    measures = {"error"}, {"error", "perplexity"}, {"TR@1", "perplexity"}, {"TR@1", "perplexity", "error"}
    for name, measured in zip(("momo-image", "momo-text", "momo-vl", "momo-all"), measures):
        more = ["--shared-decoder"] if name == "momo-all" else []
        call("train", "--stage", name, *more, *start, *BRIEF, "--steps", 1, "--out", tmp_path / name)
        start, entries = ["--init", tmp_path / name / "last.pt"], metrics(tmp_path / name)
        assert measured <= entries[-1].keys() and set(LOSSES[train.STAGES[name]]) <= entries[0].keys()

        # Weights of the losses, the batch, lengths of texts, how much is hidden: as the paper says
        stage, kind = begun[-1], train.STAGES[name]
        recipe, length = kind.recipe["base"], None if kind is MoMoImage else 196
        assert recipe["batch_size"] == 64 * 64 and recipe.get("max_text_len") == length
        assert stage.loss_weights == dict.fromkeys(LOSSES[kind], 1.0)
        assert set(checkpoint.trainable(stage.model)) == LEARNS[kind]
        assert not kind.architecture["drop_path"]
        for modality, samples in zip(MODALITIES[kind], stage.samples, strict=True):
            sample = samples[0, 0]
            if modality != "text":
                assert int(sample["hidden"].sum()) == 3  # of 4 patches
            if modality != "image":
                tokens, ratio = int(sample["mask"].sum()) - 2, 0.15 if modality == "text" else 0.75
                assert (sample["labels"] != IGNORE).sum() == max(1, round(ratio * tokens))
    assert {name.split(".")[0] for name in checkpoint.read(start[1]).head} == {"pair"}  # one decoder
