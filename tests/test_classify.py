"""Classes on disk and in the built-in world, the linear probe, and predictions
that do not depend on batches, padding or processes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, refused, shaken, train_tokenizer_once
from files import picture

import classify
import data
import losses
from classify import Classify, Probe, Standardise, WorldClasses, read
from glue import GLUE, WorldEntailment
from mome import VLMo, classifier
from nlvr2 import NLVR2, WorldStatements
from shapes import World
from sides import bare
from texts import Words
from vqa import VQA, WorldQuestions

CPU = torch.device("cpu")


def test_classes_are_folders_or_name_the_first_thing_of_a_scene(tmp_path):
    for split in ("train", "val"):
        for name in ("dog", "cat"):
            picture(tmp_path / split / name / "images/1.png")  # as in Tiny ImageNet
    source = read([tmp_path], "val", 8)
    assert [source[i].label for i in range(len(source))] == ["cat", "dog"]
    refused(read, [tmp_path], "test", 8, error=data.Absent)
    refused(read, [str(tmp_path)] * 2, "val", 8)
    picture(tmp_path / "val/1.png")  # of no class
    refused(read, [tmp_path], "val", 8)
    for k in range(120):  # split by a hash: some classes have no image for training
        picture(tmp_path / f"many/{k}/1.png")
    args = SimpleNamespace(training=True, splits=data.SPLITS, data=[str(tmp_path / "many")], stage="classify")
    vars(args).update(seed=0, head_factor=1.0, augment=None, no_flip=True)
    task = Classify(args, SMALL, None, None)
    assert len(task.choices) == 120 > len(task.sources["train"]) > 100
    for i in range(9):
        caption = World("train", 8)[i].captions[0].replace(",", "")  # "a small red star …"
        assert read(["shapes"], "train", 8)[i].label == " ".join(caption.split()[2:4])


def random_stage(kind, inputs=32, **more):
    torch.manual_seed(3)  # its answers differ
    config = replace(SMALL, dim=32, layers=2, heads=2, patch_size=8, vocab_size=200, max_text_len=56)
    config = replace(config, position="relative")
    return shaken(bare(kind, VLMo(config), head=classifier(config, inputs, 40), **more), 0.5)


TWENTY = {  # samples, and a length that no text has
    VQA: (WorldQuestions("val", 16, count=5), 22),
    NLVR2: (WorldStatements("val", 16, count=5), 22),
    GLUE: (WorldEntailment("val", 16, count=20), 54),
}


def answers(kind, batch, padding=2):
    """The answers to twenty samples, and the logits behind those of this process."""
    source, length = TWENTY[kind]
    words = Words(train_tokenizer_once(lambda: World("train", 0).corpus()[-400:], 200), length + padding)
    stage, seen = random_stage(kind, 64 if kind is NLVR2 else 32, words=words, choices=range(40)), []
    stage.head.register_forward_hook(lambda module, inputs, out: seen.extend(out))
    numbers = [number for part in data.shard(20, batch) for number in part]
    return [stage.answers(source, CPU, batch), dict(zip(numbers, seen))]


def standardised():
    """The features of nine pictures, standardised as a linear probe of them does."""
    stage, source = random_stage(Probe), WorldClasses("train", 16, count=9)
    stage.head = torch.nn.Sequential(Standardise(32))
    args = dict(batch_size=9, accumulate=1, workers=0, seed=0, augment="none")
    args = SimpleNamespace(**args)
    stage.samples = [data.Images(source, 16, args)]
    stage.standardise(args, SimpleNamespace(rank=losses.rank(), world=losses.world(), device=CPU))
    [image] = data.pictures(source, [range(9)], 16, CPU)
    rows = stage.model.encode_image(image)  # [I_CLS], and four patches
    torch.testing.assert_close(stage.features(image), rows[:, -4:].sum(1) / 4)
    return stage.head(stage.features(image))


def everything():
    classify.PICTURES = 16
    return {"features": standardised()} | {kind.__name__: answers(kind, 3) for kind in TWENTY}


@pytest.fixture(scope="module")
def many(processes):
    """What each of three processes finds."""
    return processes(3, everything)


@pytest.mark.parametrize("kind", TWENTY)
def test_predictions_depend_on_no_batch_no_padding_and_no_number_of_processes(kind, many):
    predicted, whole = answers(kind, 20)
    assert len(predicted) == len(whole) == 20 and len(set(predicted)) > 1
    for other, some in [answers(kind, 3, padding=0), *(found[kind.__name__] for found in many)]:
        assert other == predicted and len(some) >= 6
        for number in some:
            torch.testing.assert_close(some[number], whole[number], atol=1e-5, rtol=1e-4)


def test_features_of_a_linear_probe_have_mean_0_and_variance_1(many, monkeypatch):
    monkeypatch.setattr(classify, "PICTURES", 16)
    found = standardised()
    torch.testing.assert_close(found.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.var(0, correction=0), torch.ones(32), atol=1e-3, rtol=0)
    for other in many:
        torch.testing.assert_close(other["features"], found, rtol=1e-4, atol=1e-4)
