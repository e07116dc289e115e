"""VLMo's stages: what trains and what stays, what a stage hands to the next, what it measures."""

import math
import random
import re
from dataclasses import replace

import conftest
import pytest
import torch
import torch.nn.functional as F
from conftest import RELATIVE, call, shaken, stage_commands

import checkpoint
import dvae
import images
import runtime
import shapes
import train
from classify import Classify, Probe, Standardise
from glue import GLUE
from loader import with_counts
from mome import MIMHead, VLMo, classifier
from nlvr2 import NLVR2
from sides import bare, pairs
from stage import masked_words, perplexity
from stages import VL, Image, Text, language_part, nearest_visible
from texts import IGNORE, Texts, Words, pack, train_tokenizer
from vqa import VQA

SMALL = replace(conftest.SMALL, layers=2)
NO_FUSION, ONE_EXPERT, APART = {"vl_layers": 0}, {"experts": "shared"}, {"attention": "separate"}

# Patterns of names: what only one loss reads, and what an image or a text does not pass
ITC, ITM, MLM = "itc_|logit_scale", "pooler|itm_head", "mlm_head"
ALONE, FUSED = r"blocks\.1\.experts\.(language|vision)", r"blocks\.1\.experts\.vl"
NOT_IMAGE = rf"words|text_|.*\.language|{FUSED}|{ITC}|{ITM}|{MLM}"
NOT_TEXT = rf"patches|image_|.*\.vision|{FUSED}|{ITC}|{ITM}"
NOT_EXPERTS = r"blocks\.\d\.(norm|attention|expert_branch)"  # the rest of a block
IDLE = r"blocks\.1\.(experts|attention\.(query|out))\.vision"


def stage_of(kind, wanted, changes):
    """A stage with losses `wanted` around a small model, and a batch."""
    torch.manual_seed(0)
    config = replace(SMALL, **changes)
    model = VLMo(config).train()
    weights = dict.fromkeys(wanted.split(), 1.0)
    stage = bare(kind, model, loss_weights=weights, negatives="global")
    [batch] = with_counts([pairs(config, 4)])
    batch["target"] = torch.tensor([0, 1, 1, 0])
    if kind is Image:
        stage.head, codes = MIMHead(config, 6), dvae.DVAEConfig(grid=4, codes=6, width=8)
        stage.dvae = dvae.Tokenizer(codes).requires_grad_(False)
    elif kind is Text:
        model.requires_grad_(False)
        for module in language_part(model):
            module.requires_grad_(True)
    elif kind is VQA:
        stage.head, batch["target"] = classifier(config, 24, 5), torch.rand(4, 5)
    elif kind is NLVR2:
        stage.head = classifier(config, 48, 2)
        batch["image"] = torch.stack([batch["image"], batch["image"].flip(0)], dim=1)
    elif kind is GLUE:
        stage.head, stage.choices = torch.nn.Linear(24, 2), ["0", "1"]
    elif kind in (Classify, Probe):
        stage.head = torch.nn.Sequential(Standardise(24), torch.nn.Linear(24, 2))
    return stage, batch


@pytest.mark.parametrize(
    "kind, wanted, changes, frozen",
    [
        (VL, "itc", {}, f"{FUSED}|{ITM}|{MLM}"),
        (VL, "itm", {}, f"{ALONE}|{ITC}|{MLM}"),
        (VL, "mlm", {}, f"{ALONE}|{ITC}|{ITM}"),
        (VL, "itm mlm", ONE_EXPERT, ITC),
        (VL, "itc itm mlm", RELATIVE, "nothing"),
        # The last block computes only the text of a pair: its vision modules have nothing to do
        (VL, "itm mlm", NO_FUSION | APART, f"{IDLE}|{ITC}"),
        (Image, "mim", RELATIVE | APART, NOT_IMAGE),
        (Text, "mlm", RELATIVE | APART, f"{NOT_TEXT}|{NOT_EXPERTS}"),
        (VQA, "loss", NO_FUSION, f"{IDLE}|{ITC}|itm_head|{MLM}"),
        (NLVR2, "loss", {}, f"{ALONE}|{ITC}|itm_head|{MLM}"),
        (Classify, "loss", ONE_EXPERT, NOT_IMAGE),
        (Probe, "loss", {}, ""),
    ],
)
def test_a_stage_trains_what_its_losses_read_and_nothing_else(kind, wanted, changes, frozen, monkeypatch):
    recomputed, real = [], runtime.checkpoint
    monkeypatch.setattr(runtime, "checkpoint", lambda *x, **how: recomputed.append(x) or real(*x, **how))
    stage, batch = stage_of(kind, wanted, changes)
    first = batch
    if kind in (VL, Text):  # by chance, the batch that tells has no masked token
        [first] = with_counts([batch | {"labels": torch.full_like(batch["labels"], IGNORE)}])
    train.freeze_unread(stage, (first,), runtime.Runtime())
    assert recomputed and not any("forward" in vars(block) for block in stage.blocks())
    for name, parameter in stage.model.named_parameters():
        assert parameter.requires_grad != bool(re.match(frozen, name)), name
    assert all(p.requires_grad for p in stage.head.parameters())

    # The optimizer changes exactly these
    before = {name: p.detach().clone() for name, p in stage.named_parameters()}
    optimizer = runtime.adamw(stage)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    values = stage(batch)
    sum(values[name] for name in stage.loss_weights).backward()
    optimizer.step()
    for name, p in stage.named_parameters():
        assert p.requires_grad != torch.equal(before[name], p), name


def test_stages_follow_each_other(tmp_path):
    flags = "--position relative --layer-scale 0.1 --text-reach 60 --attention separate"
    for words in stage_commands(tmp_path, *flags.split()):
        call("train", *words)
    names = ("dvae", "image", "text", "vl")
    dvae, image, text, vl = (checkpoint.read(tmp_path / name / "last.pt") for name in names)
    codes = image.extra["dvae"]["model"]
    assert all(torch.equal(codes[name], tensor) for name, tensor in dvae.tensors.items())
    assert vl.tokenizer.to_str() == text.tokenizer.to_str()
    assert [found.config.max_text_len for found in (image, text, vl)] == [24, 48, 24]

    # A file holds what has been learned. Stage text keeps separate attention, so it has none
    groups = [set(checkpoint.groups(found.tensors)) for found in (image, text, vl)]
    assert groups[1] - groups[0] == {"words", "text_norm", "mlm_head", "blocks.*.experts.language"}
    heads = {"itc_image", "itc_text", "logit_scale", "pooler", "itm_head"}
    fused = {"blocks.*.experts.vl", "blocks.*.attention.language"}
    assert groups[2] - groups[1] == heads | fused
    assert vl.tensors.keys() == VLMo(vl.config).state_dict().keys()

    # Stage text keeps all of stage image, except what both modalities share
    patches = (2 * 2 - 1) ** 2 + 3
    of_images = {"types": slice(1, None), "relative_table": slice(0, patches)}
    for name, tensor in image.tensors.items():
        kept = of_images.get(name, ...)
        if not name.startswith("norm."):
            assert torch.equal(tensor[kept], text.tensors[name][kept]), name
        if name in of_images:
            assert not torch.equal(tensor, text.tensors[name]), name


def test_the_nearest_visible_patch_by_hand():
    hidden = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1]]).bool()  # of 3 × 3, 2 and 6 are visible
    found = nearest_visible(torch.arange(9)[None], hidden)
    assert found.tolist() == [[2, 2, 2, 6, 2, 2, 6, 6, 2]]  # the first of equals


def test_stage_image_counts_the_codes_it_finds_next_to_plain_guesses():
    source, (stage, _) = shapes.World("test", 16, count=30), stage_of(Image, "mim", {})
    stage.side, stage.sources = 4, {"test": source}
    measured = shaken(stage, 0.5).measure("test", "cpu")  # so that codes and logits differ
    image = torch.stack([images.to_tensor(source.image(i)) for i in range(30)])
    hidden = torch.stack([images.mask_blocks(4, random.Random(f"mask {i}")) for i in range(30)])
    codes, embedding = stage.dvae.encode(image), stage.head.mask_embedding
    rows = stage.model.encode_image(image, masked=hidden, mask_embedding=embedding)
    logits, labels = stage.head.classifier(rows[:, 1:][hidden]), codes[hidden]  # after [I_CLS]
    guesses = {
        "accuracy": logits.argmax(1),
        "nearest visible": nearest_visible(codes, hidden)[hidden],
        "most frequent": labels.mode()[0],
    }
    expected = {}
    for name, guess in guesses.items():
        expected[name] = 100 * (guess == labels).double().mean().item()
    expected["perplexity"] = F.cross_entropy(logits, labels).exp().item()
    assert measured == pytest.approx(expected | {"masked": len(labels)}, rel=1e-4)


def what_is_seen(batch):
    """Takes every masked token for the one that stands there."""
    return 5.0 * F.one_hot(batch["masked"], 40)[batch["labels"] != IGNORE]


def test_masked_words_are_counted_next_to_those_that_their_frequencies_find(tmp_path):
    words = Words(train_tokenizer(lambda: ["red red red blue"], 40), 10)
    words.size = 40  # as if it had more
    documents = [("test", f"red blue {i % 3 * 'red '}") for i in range(150)]
    pack([("train", "red red red blue"), *documents], words, tmp_path)
    test, training = (Texts(tmp_path / split, words, 0) for split in ("test", "train"))
    samples = [test[0, i] for i in range(len(test))]
    seen, labels = (torch.cat([each[name] for each in samples]) for name in ("masked", "labels"))
    seen, labels = seen[labels != IGNORE], labels[labels != IGNORE]
    red = words.tokenizer.token_to_id("red")
    found, reds = (seen == labels).double().mean().item(), (labels == red).double().mean().item()
    loss = math.log(math.exp(5) + 39) - 5 * found
    guess = -reds * math.log(4 / 44) - (1 - reds) * math.log(2 / 44)  # 3 and 1, plus one each
    assert masked_words(what_is_seen, test, training, "cpu") == pytest.approx({
        "accuracy": 100 * found,
        "perplexity": math.exp(loss),
        "unigram accuracy": 100 * reds,
        "unigram perplexity": math.exp(guess),
        "masked": len(labels),
    }, rel=1e-4)  # fmt: skip
    assert perplexity(1e9, 3) == perplexity(0.0, 0) == math.inf  # diverged, or empty
