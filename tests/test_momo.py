"""MoMo: visible tokens alone reach the encoder, what is hidden is scored at its own place, modalities add up."""

import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from test_bench import batch_of
from test_train import Killed, call, main_of, metrics, pictures

import data
import evaluate
import finetune
import losses
import momo
import runtime
import train
from mome import CONFIGS, Config, VLMo

SMALL = Config(
    dim=24, layers=2, heads=3, image_size=16, patch_size=4, vocab_size=50, max_text_len=24, experts="shared"
)  # fmt: skip
SHAPE = (1, 16, 2)
BRIEF = "--model momo --dim 32 --layers 2 --heads 2 --image-size 16 --patch-size 8 --warmup 2".split()


def pairs_of(config, lengths, seed=0):
    """A batch of pairs of which three quarters are hidden."""
    batch, rng = batch_of(config, lengths, seed), random.Random(seed)
    hidden = [momo.hide_patches(0.75, 16, rng) for _ in lengths]
    labels = torch.full_like(batch["text"], data.IGNORE)
    for row, length in enumerate(lengths):
        at = momo.hide(0.75, rng, range(1, length - 1))
        labels[row, at] = batch["text"][row, at]
    masked = batch["text"].masked_fill(labels != data.IGNORE, 4)
    return batch | {"hidden": torch.stack(hidden), "labels": labels, "masked": masked}


def texts_of(batch):
    return {momo.BESIDE + name: batch[name] for name in ("masked", "labels", "mask")}


def stage_of(model, modalities=("pair", "text"), aligned=("itc", "itm"), **options):
    return momo.Stage(
        model, modalities, SHAPE, train.VisionLanguageStage(model, dict.fromkeys(aligned, 1.0)), **options
    )


class Pictures(list):
    """A source of pictures that are there already: uint8 (3, S, S)."""

    def image(self, i):
        return Image.fromarray(self[i].permute(1, 2, 0).numpy())


def model_of(config=SMALL):
    torch.manual_seed(0)
    return VLMo(config).double()


def test_what_is_hidden_does_not_reach_the_encoder():
    model, batch = model_of(), pairs_of(SMALL, [9, 14, 5])
    decoder = momo.Decoder(SMALL, SHAPE, "pair").double()
    inputs = {name: batch[name] for name in momo.INPUTS["pair"]}
    pixels, logits = momo.reconstructions(model, decoder, **inputs)
    other = batch["hidden"].view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    inputs["image"] = torch.where(other, 255 - batch["image"], batch["image"])
    inputs["masked"] = torch.where(batch["labels"] != data.IGNORE, 7, batch["masked"])
    assert not torch.equal(inputs["image"], batch["image"])
    again = momo.reconstructions(model, decoder, **inputs)
    assert torch.equal(pixels, again[0]) and torch.equal(logits, again[1])
    inputs["image"] = torch.where(other, batch["image"], 255 - batch["image"])  # what is visible does
    assert not torch.allclose(momo.reconstructions(model, decoder, **inputs)[1], logits)


def test_the_encoder_computes_visible_rows_alone_and_padding_changes_none():
    model, x = model_of(), torch.randn(3, 10, 24, dtype=torch.double)
    visible = torch.zeros(3, 10, dtype=torch.bool)
    visible[0, [0, 3, 4]] = visible[1, [0, 2, 5, 6, 9]] = visible[2, [1]] = True
    rows, place, real = momo.encode_visible(model, x, visible)
    assert rows.shape == (3, 5, 24) and real.sum(1).tolist() == [3, 5, 1]
    for sample in range(3):
        own, at, _ = momo.encode_visible(model, x[sample : sample + 1], visible[sample : sample + 1])
        assert at[0].tolist() == visible[sample].nonzero()[:, 0].tolist()
        torch.testing.assert_close(rows[sample][real[sample]], own[0])
        assert torch.equal(place[sample][real[sample]], at[0])


def plain_decoder(modality, words=0):
    """A decoder without layers, of which every row says where it stands: words 0 … T, then [I_CLS], then patches."""
    config = replace(SMALL, dim=64, heads=1)
    torch.manual_seed(0)
    model, decoder = VLMo(config).double(), momo.Decoder(config, (1, 64, 1), modality).double()
    places = torch.eye(64, dtype=torch.double)
    with torch.no_grad():
        decoder.enter.weight.zero_(), decoder.enter.bias.zero_(), decoder.mask_token.zero_()
        decoder.blocks, decoder.norm = torch.nn.ModuleList(), torch.nn.Identity()
        for position, first in ((decoder.text_position, 0), (decoder.image_position, words)):
            if position is not None:
                position.copy_(places[first : first + len(position)])
        if modality != "image":
            decoder.words.weight.copy_(places), decoder.words.bias.zero_(), decoder.word_bias.zero_()
            model.words.weight.copy_(places[: config.vocab_size])
        if modality != "text":
            decoder.pixels.weight.copy_(places[:48]), decoder.pixels.bias.zero_()
    return model, decoder


def test_what_the_decoder_says_of_a_place_is_scored_against_that_place():
    """Its rows name their places, so what comes out for hidden tokens and patches are the numbers of their places."""
    batch = pairs_of(SMALL, [9, 14, 5])
    model, decoder = plain_decoder("pair", words=24)
    pixels, logits = momo.reconstructions(model, decoder, **{name: batch[name] for name in momo.INPUTS["pair"]})
    assert logits.argmax(1).tolist() == (batch["labels"] != data.IGNORE).nonzero()[:, 1].tolist()
    assert (pixels.argmax(1) - 25).tolist() == batch["hidden"].nonzero()[:, 1].tolist()  # after [I_CLS], number 24
    numbered = torch.arange(16).view(1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(3, 3, 16, 16)
    wanted = momo.patch_values(numbered, batch["hidden"], False)  # each patch holds its number
    assert torch.equal(((wanted + 1) * 127.5).round().long()[:, 0], batch["hidden"].nonzero()[:, 1])
    model, decoder = plain_decoder("image")
    pixels, _ = momo.reconstructions(model, decoder, batch["image"], batch["hidden"])
    assert (pixels.argmax(1) - 1).tolist() == batch["hidden"].nonzero()[:, 1].tolist()


def test_the_decoder_takes_rows_in_any_order():
    model, batch = model_of(), pairs_of(SMALL, [9, 14, 5])
    decoder = momo.Decoder(SMALL, SHAPE, "pair").double()
    x = torch.cat([model.embed_words(batch["masked"]), model.embed_patches(batch["image"], 1)], dim=1)
    visible = torch.cat([batch["mask"] & (batch["labels"] == -100), torch.ones(3, 1).bool(), ~batch["hidden"]], dim=1)
    mask = torch.cat([batch["mask"], torch.ones(3, 17).bool()], dim=1)
    rows, place, real = momo.encode_visible(model, x, visible)
    order = torch.randperm(rows.shape[1])
    mixed = decoder(rows[:, order], place[:, order], real[:, order], mask, 24)
    torch.testing.assert_close(mixed, decoder(rows, place, real, mask, 24))


@pytest.mark.parametrize("modality", ["image", "text", "pair"])
def test_a_sample_is_reconstructed_alike_alone_and_in_a_batch(modality):
    model, batch = model_of(), pairs_of(SMALL, [9, 14, 5])
    decoder = momo.Decoder(SMALL, SHAPE, modality).double()
    inputs = {name: batch[name] for name in momo.INPUTS[modality]}
    together = momo.reconstructions(model, decoder, **inputs)
    alone = [momo.reconstructions(model, decoder, **{n: x[i : i + 1] for n, x in inputs.items()}) for i in range(3)]
    for whole, parts in zip(together, zip(*alone)):
        assert (whole is None) == (parts[0] is None)
        if whole is not None:
            torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-10, atol=1e-12)


def test_the_first_token_of_an_image_is_visible():
    model, batch = model_of(), pairs_of(SMALL, [9])
    decoder = momo.Decoder(SMALL, SHAPE, "image").double()
    pixels, _ = momo.reconstructions(model, decoder, batch["image"], batch["hidden"])
    pixels.sum().backward()
    assert model.image_cls.grad.norm() > 0


def test_token_embeddings_are_the_output_weights_too():
    """Those of hidden tokens, which the encoder does not see, have a gradient from the output alone."""
    model, batch = model_of(), pairs_of(SMALL, [9, 14, 5])
    batch["text"] = torch.arange(5, 29).expand(3, -1)
    batch["labels"] = torch.where(batch["labels"] != data.IGNORE, batch["text"], data.IGNORE)
    batch["masked"] = torch.full_like(batch["text"], 4)
    decoder = momo.Decoder(SMALL, SHAPE, "text").double()
    _, logits = momo.reconstructions(model, decoder, **{name: batch[name] for name in momo.INPUTS["text"]})
    momo.mlm_loss(logits, batch["labels"]).backward()
    assert (model.words.weight.grad[40:].norm(dim=1) > 0).all()  # in no text


def test_a_normalised_patch_has_mean_0_and_variance_1():
    image, hidden = torch.randint(0, 256, (2, 3, 16, 16)), torch.ones(2, 16, dtype=torch.bool)
    values = momo.patch_values(image, hidden, True)
    torch.testing.assert_close(values.mean(1), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.var(1), torch.ones(32), atol=1e-4, rtol=0)
    loss = momo.mim_loss(values + 2, image, hidden, True)
    assert loss.item() == pytest.approx(4, rel=1e-5)
    batch, modalities = {"image": image.byte(), "hidden": hidden}, ("image",)
    for normalised in (False, True):  # a stage hands the choice on, to its loss and to what is measured
        stage = stage_of(model_of(), modalities, (), normalised=normalised).double()
        wanted = momo.patch_values(batch["image"], hidden, normalised)
        expected = (stage.pixels(batch) - wanted).square().mean().item()
        assert stage(batch)["mim"].item() == pytest.approx(expected)
        found = evaluate.masked_pixels(stage, Pictures(batch["image"]), "cpu")
        at = torch.stack([momo.hide_patches(0.75, 16, random.Random(f"mask {i}")) for i in range(2)])
        wanted, seen = (momo.patch_values(batch["image"], which, normalised) for which in (at, ~at))
        error = stage.pixels({"image": batch["image"], "hidden": at}) - wanted
        guess = seen.unflatten(0, (2, 4)).mean(1).repeat_interleave(12, 0) - wanted
        expected = {"error": error.square().mean().item(), "mean patch's error": guess.square().mean().item()}
        assert found == pytest.approx(expected | {"masked patches": 24})


def test_masks_have_exact_counts():
    tokenizer = data.train_tokenizer(data.Shapes("train", 0).corpus(), 300)
    for ratio in (0.15, 0.75):
        words = momo.HiddenWords(tokenizer, 24, ratio)
        for seed, caption in enumerate(["", "red", "a small red circle above a large blue square"]):
            ids, mask = words.encode(caption)
            masked, labels = words.mask_words(ids, random.Random(seed))
            tokens, hidden = int(mask.sum()) - 2, labels != data.IGNORE
            assert hidden.sum() == (max(1, round(ratio * tokens)) if tokens else 0) and not hidden[0]
            assert torch.equal(labels[hidden], ids[hidden]) and torch.equal(masked[~hidden], ids[~hidden])
            assert (masked[hidden] == words.mask).all() and not hidden[ids == words.sep].any()
    assert all(momo.hide_patches(0.75, 196, random.Random(seed)).sum() == 147 for seed in range(20))


@pytest.mark.parametrize("modalities", [("pair", "text"), ("text", "image")])
def test_gradients_of_both_modalities_add_up(modalities):
    """CMGA: one pass on both has the sum of the gradients of each alone."""
    aligned = ("itc", "itm") if "pair" in modalities else ()
    stage, batch = stage_of(model_of(), modalities, aligned).double(), pairs_of(SMALL, [9, 3, 14, 6])
    batch |= {momo.BESIDE + name: tensor for name, tensor in pairs_of(SMALL, [12, 24, 7, 20], seed=1).items()}

    def gradients(*update):
        torch.manual_seed(3)  # the same negatives
        stage.zero_grad()
        values = stage(batch, *update)
        sum(values[name] for name in stage.weights if name in values).backward()
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in stage.named_parameters()}

    both, first, second = gradients(), *map(gradients, modalities)
    for name, grad in both.items():
        torch.testing.assert_close(first[name] + second[name], grad, rtol=1e-9, atol=1e-12)
    shared = "model.blocks.0.attention.query.shared.weight"
    assert first[shared].norm() > 0 and second[shared].norm() > 0


@pytest.mark.parametrize("modalities", [("image",), ("text",), ("text", "image"), ("pair",), ("pair", "text")])
def test_every_trainable_parameter_of_a_stage_gets_a_gradient(modalities):
    aligned = ("itc", "itm") if "pair" in modalities else ()
    stage, batch = stage_of(model_of(), modalities, aligned).double(), pairs_of(SMALL, [9, 24, 14, 6])
    values = stage(batch | {momo.BESIDE + name: tensor for name, tensor in pairs_of(SMALL, [24, 7, 9, 5], 1).items()})
    sum(values[name] for name in stage.weights).backward()
    silent = [name for name, p in stage.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent


def losses_and_gradient(part, parts):
    """Of one process's part of a batch, averaged over processes as DDP does."""
    stage = stage_of(model_of(), aligned=("itc",)).double()
    whole = pairs_of(SMALL, [9, 3, 14, 6]) | texts_of(pairs_of(SMALL, [12, 24, 7, 20], seed=1))
    own = slice(part * 4 // parts, (part + 1) * 4 // parts)
    values = stage({name: tensor[own] for name, tensor in whole.items()})
    sum(values[name] for name in stage.weights).backward()
    found = torch.cat([torch.stack([values[name].detach() for name in stage.weights]),
                       *(p.grad.flatten() for p in stage.parameters() if p.grad is not None)])  # fmt: skip
    if parts > 1:
        dist.all_reduce(found)
    return found / parts


def on_this_process():
    return losses_and_gradient(losses.rank(), losses.world())


def test_two_processes_compute_as_one(processes):
    one = losses_and_gradient(0, 1)
    for found in processes(2, on_this_process):
        torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flags", [["--stage", "text"], ["--stage", "vl", "--no-cmga"]])
def test_two_processes_train_as_one(flags, processes, tmp_path, monkeypatch):
    folder = pictures(tmp_path / "pictures", count=16)
    (tmp_path / "a.txt").write_text("\n".join(f"number {i} is followed by number {i + 1}" for i in range(400)))
    flags = [*BRIEF, *flags, "--data", folder, "--texts", tmp_path / "a.txt", "--augment", "none"]
    flags += ["--batch-size", 8, "--steps", 3, "--log-every", 1, "--drop-path", 0]
    flags += ["--itm-weight", 0] if "vl" in flags else []  # its negatives are drawn
    call(monkeypatch, train, *flags, "--out", tmp_path / "one")
    processes(2, main_of, "train", *flags, "--out", tmp_path / "two", group=False)
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        measured = {name: value for name, value in one.items() if "_per_s" not in name and name != "split"}
        assert {name: two[name] for name in measured} == pytest.approx(measured, rel=1e-3)


def test_base_has_as_many_active_parameters_as_the_paper_says():
    with torch.device("meta"):
        model = VLMo(replace(CONFIGS["base"], experts="shared"))
    millions = {name: sum(p.numel() for p in parameters) / 1e6 for name, parameters in momo.active(model).items()}
    assert millions == pytest.approx({"text": 110, "image": 86, "pair": 110}, rel=0.015)  # 108.5, 85.8, 109.3


@pytest.fixture
def small_world(monkeypatch):
    monkeypatch.setattr(data, "SPLITS", {"train": 1000, "val": 12, "test": 12})
    monkeypatch.setattr(finetune, "STANDARDISED", 64)


def test_the_stages_train_one_from_another_and_serve_the_tasks(small_world, tmp_path, monkeypatch):
    out = {stage: tmp_path / stage for stage in ("image", "text", "vl")}
    brief = ["--batch-size", 8, "--steps", 3, "--log-every", 1]
    sizes, real = [], train.Unreadable
    monkeypatch.setattr(train, "Unreadable", lambda size: sizes.append(size) or real(size))
    call(monkeypatch, train, *BRIEF, *brief, "--stage", "image", "--out", out["image"])
    call(monkeypatch, train, *brief, "--stage", "text", "--init", out["image"] / "last.pt", "--out", out["text"])
    call(monkeypatch, train, *brief, "--stage", "vl", "--init", out["text"] / "last.pt", "--out", out["vl"])
    assert len(sizes) == 5  # what cannot be read is counted, and judged, for each loader
    first, last = ({stage: metrics(folder)[row] for stage, folder in out.items()} for row in (0, -1))
    assert "mim" in first["image"] and {"mim", "mlm", "texts_per_s"} <= first["text"].keys()
    assert {"cmm mim", "cmm mlm", "mlm", "itc", "itm", "pairs_per_s"} <= first["vl"].keys()
    assert {"perplexity", "accuracy"} <= last["vl"].keys()  # of text
    assert {"error", "mean patch's error"} <= last["image"].keys() and {"error", "perplexity"} <= last["text"].keys()
    model = runtime.load(out["vl"] / "last.pt")["model"]
    assert not any(name.startswith("mlm_head") for name in model)  # its place is the decoders', which stay behind
    assert "TR@1" in last["vl"] and torch.equal(
        model["types"][2], runtime.load(out["image"] / "last.pt")["model"]["types"][2]
    )
    for task, flags in {"vqa": [], "classify": ["--linear-probe"]}.items():
        run = ["--task", task, "--init", out["vl"] / "last.pt", "--batch-size", 8, "--epochs", 0.005, *flags]
        call(monkeypatch, finetune, *run, "--out", tmp_path / task)
        assert "accuracy" in metrics(tmp_path / task)[-1]
        assert runtime.load(tmp_path / task / "last.pt")["args"]["model"] == "momo"  # what goes on from here is, too


def test_a_stage_is_set_up_as_the_paper_says(small_world, tmp_path, monkeypatch):
    """Masking ratios of what the loaders give, weights of the losses, optimizer, lengths of text, batch."""
    jobs = []
    monkeypatch.setattr(train, "run", lambda args, here, job, start: jobs.append(job))
    for stage in momo.MODALITIES:
        call(monkeypatch, train, *BRIEF, "--stage", stage, "--out", tmp_path)
    for job in jobs:
        modalities = list(job.stage.head)
        assert set(job.stage.weights.values()) == {1.0} and job.optimizer == ((0.9, 0.95), 0.05, "cosine")
        for modality, samples in zip(modalities, filter(None, (job.samples, job.beside))):
            sample = samples[0, 0]
            if modality != "text":
                assert int(sample["hidden"].sum()) == 3  # of 4 patches
            if modality != "image":
                hidden, tokens = (sample["labels"] != data.IGNORE).sum(), sample["mask"].sum() - 2
                assert hidden == max(1, round({"text": 0.15, "pair": 0.75}[modality] * int(tokens)))
    assert [len(job.stage.head) for job in jobs] == [1, 2, 2] and momo.RATIO["image"] == 0.75
    recipes = [train.recipe(stage, "base", "momo") for stage in momo.MODALITIES]
    assert [recipe["max_text_len"] for recipe in recipes] == [40, 196, 40]
    assert [recipe["batch_size"] for recipe in recipes] == [64 * 64] * 3


def test_text_has_its_own_length_after_stage_image_and_keeps_it(tmp_path, monkeypatch):
    """A checkpoint without text says nothing of the length of texts."""
    args = lambda *flags: call_parse(monkeypatch, *flags)
    start = lambda stage, length, text: train.Start(
        tmp_path, {"stage": stage, "args": {"config": "base", "model": "momo"}},
        replace(CONFIGS["base"], experts="shared", max_text_len=length), text, False,
    )  # fmt: skip
    here = runtime.Runtime()
    assert train.resolve(args("--stage", "text"), here, start("image", 40, None)).max_text_len == 196
    assert train.resolve(args("--stage", "vl"), here, start("text", 196, "words")).max_text_len == 196
    assert train.resolve(args("--stage", "image", "--model", "momo", "--config", "base"), here, None).drop_path == 0


def call_parse(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    return train.parse()


@pytest.mark.parametrize("flags", [["--stage", "text"], ["--stage", "vl", "--no-cmga", "--normalise-pixels"]])
def test_momo_resumes_bit_for_bit(flags, small_world, tmp_path, monkeypatch):
    flags = [*BRIEF, *flags, "--batch-size", 8, "--steps", 4, "--save-every", 2, "--drop-path", 0.2]
    call(monkeypatch, train, *flags, "--out", tmp_path / "whole")
    real = runtime.save

    def dies(path, content):
        real(path, content)
        if content["step"] == 2:
            raise Killed

    monkeypatch.setattr(runtime, "save", dies)
    with pytest.raises(Killed):
        call(monkeypatch, train, *flags, "--out", tmp_path / "out")
    call(monkeypatch, train, *flags, "--out", tmp_path / "out", "--resume")
    whole, resumed = (runtime.load(tmp_path / name / "last.pt") for name in ("whole", "out"))
    for part in ("model", "head"):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(whole[part][name], resumed[part][name]) for name in whole[part])


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--stage", "dvae"], "--model momo has no stage dvae"), (["--mlm-weight", 1], "--mlm-weight is not of"),
        (["--experts", "mome"], "it needs experts shared"), (["--position", "relative"], "it needs position absolute"),
        (["--stage", "text", "--texts", "no.txt"], "--data and --texts: name both"),
        (["--stage", "text", "--no-simultaneous", "--texts", "no.txt"], "^no.txt: no such file"),
        (["--stage", "text", "--max-text-len", 2], "--max-text-len must be at least 3"),
        (["--stage", "image", "--image-size", 8, "--patch-size", 8], "it needs more than one"),
        (["--model", "vlmo", "--no-cmga"], "--no-cmga is not of"),
        (["--stage", "image", "--no-cmga"], "--no-cmga is of stage text and vl, not of image"),
        (["--stage", "text", "--no-simultaneous", "--no-cmga"], "--no-cmga: this run has nothing"),
        (["--stage", "text", "--no-simultaneous", "--data", "x"], "--data: this run has nothing"),
        (["--stage", "vl", "--no-simultaneous", "--texts", "x"], "--texts: this run has nothing"),
        (["--stage", "text", "--no-simultaneous", "--augment", "crop"], "--augment: this run has nothing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(flags, says, tmp_path, monkeypatch):
    with pytest.raises((runtime.UserError, data.DataError), match=says):
        call(monkeypatch, train, "--model", "momo", "--steps", 1, "--out", tmp_path, *flags)
