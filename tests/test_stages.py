"""VLMo's stages: what trains and what stays, what a stage hands to the next, what it measures."""

import math
import random

import pytest
import torch
from conftest import bare, batch_of, train_stages

import checkpoint
import data
import dvae
import losses
import runtime
import shapes
import train
from classify import Classify, Probe, Standardise
from mome import Config, MIMHead, VLMo, classifier
from nlvr2 import NLVR2
from stage import masked_words, perplexity
from stages import VL, Image, Text, language_part, nearest_visible
from texts import IGNORE, Texts, Words, pack, train_tokenizer
from vqa import VQA

# ---- What trains ---------------------------------------------------------------------------------


def parts(module):
    """The groups that train, with the number of the layer: "0.experts.vision"."""
    found = set()
    for name, p in module.named_parameters():
        if p.requires_grad:
            group = checkpoint.group(name)
            found.add(group.replace("blocks.*", name.split(".")[1]) if "*" in group else group)
    return found


def set_of(words):
    return set(words.split())


# The parts of a model of two layers, of which the upper one fuses
TEXT, IMAGE = set_of("words text_norm text_position"), set_of("patches image_cls image_position")
TRUNK = set_of("types norm 0.norm 1.norm 0.attention.shared 1.attention.shared")
LANGUAGE = set_of("0.experts.language 1.experts.language")
VISION = set_of("0.experts.vision 1.experts.vision")
FUSED = {"1.experts.vl"}
PAIR = TEXT | IMAGE | TRUNK | set_of("0.experts.language 0.experts.vision") | FUSED
ITC, ITM, MLM = set_of("itc_image itc_text logit_scale"), set_of("pooler itm_head"), {"mlm_head"}
CONTRAST = TEXT | IMAGE | TRUNK | LANGUAGE | VISION | ITC
ALL = CONTRAST | PAIR | ITM | MLM
LOOKS = IMAGE | TRUNK | VISION  # stage image
READS = TEXT | {"types", "norm"} | LANGUAGE | MLM  # stage text
ANSWER = PAIR | {"pooler"}

# What a variant of the architecture has, and what it has not
EXPERTS, SHARED = LANGUAGE | VISION | FUSED, set_of("0.experts.shared 1.experts.shared")
POSITIONS, TABLE = set_of("text_position image_position"), {"relative_table"}
SCALES = set_of("0.attention_branch 0.expert_branch 1.attention_branch 1.expert_branch")
JOINT, SEPARATE = {"0.attention.shared"}, set_of("0.attention.language 0.attention.vision")
NO_FUSION, ONE_EXPERT, APART = {"vl_layers": 0}, {"experts": "shared"}, {"attention": "separate"}
RELATIVE = {"position": "relative", "layer_scale": 0.1}


def stage_of(kind, wanted, changes):
    """A stage with losses `wanted` around a small model, and a batch."""
    torch.manual_seed(0)
    small = dict(dim=24, layers=2, heads=2, image_size=16, patch_size=4, vocab_size=30)
    config = Config(**small | dict(max_text_len=9, vl_layers=1) | changes)
    model, batch = VLMo(config).train(), batch_of(config, [9, 4, 7, 5])
    weights = dict.fromkeys(wanted.split(), 1.0)
    stage = bare(kind, model, loss_weights=weights, negatives="global")
    batch |= {"hidden": torch.rand(4, 16) < 0.4, "target": torch.tensor([0, 1, 1, 0])}
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
    elif kind in (Classify, Probe):
        stage.head = torch.nn.Sequential(Standardise(24), torch.nn.Linear(24, 2))
    return stage, batch


@pytest.mark.parametrize(
    "kind, wanted, changes, expected",
    [
        (VL, "itc itm mlm", {}, ALL),
        (VL, "itm mlm", {}, PAIR | ITM | MLM),
        (VL, "itc mlm", {}, ALL - ITM),
        (VL, "itc itm", {}, ALL - MLM),
        (VL, "itc", {}, CONTRAST),
        (VL, "itm", {}, PAIR | ITM),
        (VL, "mlm", {}, PAIR | MLM),
        (VL, "itc itm mlm", NO_FUSION, ALL - FUSED),
        # The last block computes only the text of a pair: its vision expert has nothing to do
        (VL, "itm mlm", NO_FUSION, PAIR - FUSED | LANGUAGE | ITM | MLM),
        (VL, "itc itm mlm", ONE_EXPERT, ALL - EXPERTS | SHARED),
        (VL, "itm mlm", ONE_EXPERT, PAIR - EXPERTS | SHARED | ITM | MLM),
        (VL, "itc itm mlm", APART, ALL - JOINT | SEPARATE),
        (VL, "itc", APART, CONTRAST - JOINT | SEPARATE),
        (VL, "itc itm mlm", RELATIVE, ALL - POSITIONS | TABLE | SCALES),
        (Image, "mim", {}, LOOKS),
        (Image, "mim", RELATIVE, LOOKS - POSITIONS | TABLE | SCALES),
        (Image, "mim", NO_FUSION, LOOKS),
        (Image, "mim", APART, LOOKS - JOINT | {"0.attention.vision"}),
        (Image, "mim", ONE_EXPERT, LOOKS - EXPERTS | SHARED),
        (Text, "mlm", {}, READS),
        (Text, "mlm", RELATIVE, READS - POSITIONS | TABLE),
        (Text, "mlm", APART, READS),
        (VQA, "loss", {}, ANSWER),
        (VQA, "loss", NO_FUSION, ANSWER - FUSED | LANGUAGE),
        (NLVR2, "loss", {}, ANSWER),
        (Classify, "loss", {}, LOOKS),
        (Classify, "loss", ONE_EXPERT, LOOKS - EXPERTS | SHARED),
        (Probe, "loss", {}, set()),
    ],
)
def test_a_stage_trains_what_its_losses_read_and_nothing_else(kind, wanted, changes, expected):
    stage, batch = stage_of(kind, wanted, changes)
    train.freeze_unread(stage, (batch,), runtime.Runtime())
    assert parts(stage.model) == expected
    assert all(p.requires_grad for p in stage.head.parameters())

    # The optimizer holds exactly these, and changes them and nothing else
    before = {name: p.detach().clone() for name, p in stage.named_parameters()}
    optimizer = runtime.adamw(stage)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for _ in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        values = stage(batch)
        sum(values[name] for name in stage.loss_weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in stage.named_parameters():
        changed = not torch.equal(before[name], p)
        assert (id(p) in held) == p.requires_grad == changed, name


# ---- From stage to stage -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", ["", "--position relative --layer-scale 0.1 --text-reach 60 --attention separate"]
)
def test_stages_follow_each_other(flags, small_world, tmp_path, monkeypatch):
    begun, real = [], checkpoint.with_sizes
    monkeypatch.setattr(checkpoint, "with_sizes", lambda *a: begun.append(a[0]) or real(*a))
    train_stages(tmp_path, monkeypatch, *flags.split())
    names = ("dvae", "image", "text", "vl")
    found = {name: checkpoint.read(tmp_path / name / "last.pt") for name in names}
    image, text, vl = (found[name].tensors for name in ("image", "text", "vl"))

    # What the vision expert starts. Stage text keeps separate attention, and so does not save it
    copied = [{group for group, how in origin.items() if how == "copied"} for origin in begun]
    attention = {"blocks.*.attention.language"} if flags else set()
    language, fused = {"blocks.*.experts.language"}, {"blocks.*.experts.vl"}
    assert copied == [attention | language | fused, attention | fused]

    # A file holds what has been learned
    groups = {name: set(checkpoint.groups(each.tensors)) for name, each in found.items()}
    position = set() if flags else {"text_position"}
    assert groups["text"] - groups["image"] == {"words", "text_norm"} | MLM | language | position
    assert groups["vl"] - groups["text"] == attention | ITC | ITM | fused
    assert vl.keys() == VLMo(found["vl"].config).state_dict().keys()
    head = {"mask_embedding", "classifier.weight", "classifier.bias"}
    assert found["image"].head.keys() == head and not found["text"].head
    codes = found["image"].extra["dvae"]["model"]
    assert all(torch.equal(codes[name], t) for name, t in found["dvae"].tensors.items())
    assert (tmp_path / "dvae/reconstructions-test.png").exists()
    assert found["vl"].tokenizer.to_str() == found["text"].tokenizer.to_str()
    assert [found[name].config.max_text_len for name in ("image", "text", "vl")] == [24, 48, 24]

    # Stage text keeps all of stage image, except what both modalities share
    for name, tensor in image.items():
        if name not in ("types", "relative_table", "norm.weight", "norm.bias"):
            assert torch.equal(tensor, text[name]), name
    assert torch.equal(image["types"][1:], text["types"][1:])
    assert not torch.equal(image["types"][0], text["types"][0])
    if flags:
        patches = (2 * 2 - 1) ** 2 + 3  # the image's rows of the table
        assert torch.equal(image["relative_table"][:patches], text["relative_table"][:patches])
        assert not torch.equal(image["relative_table"], text["relative_table"])


# ---- Measures by hand ----------------------------------------------------------------------------


def test_the_nearest_visible_patch_by_hand():
    hidden = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1]]).bool()  # of 3 × 3, 2 and 6 are visible
    found = nearest_visible(torch.arange(9)[None], hidden)
    assert found.tolist() == [[2, 2, 2, 6, 2, 2, 6, 6, 2]]  # the first of equals


class Believer(torch.nn.Module):
    """Stands in for a model and its head, which find codes 0, 0, 1, 3 in each row of an image."""

    config, mask_embedding = Config(image_size=16, patch_size=4), None

    def encode_image(self, image, masked, mask_embedding):
        believed = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 3] * 4), 4).float()
        return torch.cat([torch.zeros(1, 4), believed]).expand(len(image), -1, -1)

    def forward(self, hidden):
        return hidden.log().clamp(min=math.log(1e-3))


class Codes:
    """Stands in for a dVAE: the codes of each row are 0, 0, 1, 2."""

    config = dvae.DVAEConfig(grid=4, codes=4)

    def encode(self, image):
        return torch.tensor([0, 0, 1, 2] * 4).expand(len(image), -1)


def what_is_seen(batch):
    """Takes every masked token for the one that stands there."""
    return 5.0 * torch.nn.functional.one_hot(batch["masked"], 40)[batch["labels"] != IGNORE]


def measures(folder):
    """The results of stages image and text, and the packed texts."""
    model, source = Believer(), shapes.World("test", 16, count=30)
    stage = bare(Image, model, head=model, dvae=Codes(), side=4, sources={"test": source})
    folder = folder / f"{losses.world()}-{losses.rank()}"
    folder.mkdir()
    words = Words(train_tokenizer(["red red red blue"], 40), 10)
    words.size = 40  # as if it had more
    documents = [("test", f"red blue {i % 3 * 'red '}") for i in range(150)]
    pack([("train", "red red red blue"), *documents], words, folder)
    test, training = (Texts(folder / split, words, 0) for split in ("test", "train"))
    return stage.measure("test", "cpu"), masked_words(what_is_seen, test, training, "cpu"), test


def results(folder):
    return measures(folder)[:2]


def test_measures_count_what_is_found_next_to_plain_guesses(processes, tmp_path):
    patches, words, test = measures(tmp_path)
    for other in processes(2, results, tmp_path):  # they share the work
        assert other == (pytest.approx(patches), pytest.approx(words))

    hidden = torch.stack([data.mask_blocks(4, random.Random(f"mask {i}")) for i in range(30)])
    codes, masked = Codes().encode(hidden), hidden.sum().item()
    zeros, ones, twos = torch.bincount(codes[hidden]).tolist()
    near = (nearest_visible(codes, hidden) == codes)[hidden].sum().item()
    loss = math.log(1 + 3e-3) * masked - math.log(1e-3) * twos  # logits ln 1 and ln 0.001
    assert patches == pytest.approx({
        "accuracy": 100 * (zeros + ones) / masked, "perplexity": math.exp(loss / masked),
        "nearest visible": 100 * near / masked, "most frequent": 100 * zeros / masked,
        "masked": masked,
    }, rel=1e-4)  # fmt: skip

    samples = [test[0, i] for i in range(len(test))]
    seen, labels = (torch.cat([each[name] for each in samples]) for name in ("masked", "labels"))
    seen, labels = seen[labels != IGNORE], labels[labels != IGNORE]
    red, blue = (test.words.tokenizer.token_to_id(word) for word in ("red", "blue"))
    found, reds = (seen == labels).double().mean().item(), (labels == red).double().mean().item()
    loss = math.log(math.exp(5) + 39) - 5 * found
    guess = -reds * math.log(4 / 44) - (1 - reds) * math.log(2 / 44)  # 3 and 1, plus one each
    assert words == pytest.approx({
        "accuracy": 100 * found, "perplexity": math.exp(loss), "unigram accuracy": 100 * reds,
        "unigram perplexity": math.exp(guess), "masked": len(labels),
    }, rel=1e-4)  # fmt: skip
    assert perplexity(1e9, 3) == perplexity(0.0, 0) == math.inf  # diverged, or empty
