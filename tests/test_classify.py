"""Classes on disk and in the built-in world, the linear probe, and what all tasks share: predictions
that do not depend on batches, padding or processes."""

from types import SimpleNamespace

import pytest
import torch
from conftest import bare, train_tokenizer_once
from test_vqa import picture
from torch import nn

import data
import losses
from classify import Classify, Probe, Standardise, WorldClasses, read
from mome import Config, VLMo, classifier
from nlvr2 import NLVR2, WorldStatements
from runtime import UserError
from shapes import World
from texts import Words
from vqa import VQA, WorldQuestions

SIZE = dict(dim=32, layers=2, heads=2, vl_layers=1, image_size=16, patch_size=8, vocab_size=200)
SIZE |= dict(max_text_len=24)
CPU = torch.device("cpu")


def test_a_folder_holds_a_class(tmp_path):
    for split in ("train", "val"):
        for name in ("dog", "cat"):
            picture(tmp_path / split / name / "1.png")
    source = read([tmp_path], "val", 8)
    assert [source[i].label for i in range(len(source))] == ["cat", "dog"]
    with pytest.raises(data.Absent):
        read([tmp_path], "test", 8)
    with pytest.raises(UserError):
        read([str(tmp_path)] * 2, "val", 8)


def test_classes_of_the_world_name_the_first_thing():
    source = WorldClasses("train", 32)
    first = source.scene(3)["things"][0]
    assert source[3].label == f"{first['color']} {first['shape']}"
    assert len({source[i].label for i in range(1000)}) == 48


# ---- Predictions of every task -------------------------------------------------------------------


def task(kind):
    """A task with a random model, and twenty samples, which fill no batch and no process's share."""
    torch.manual_seed(37)  # its answers differ
    model = VLMo(Config(**SIZE))
    if kind in (VQA, NLVR2):
        words = Words(train_tokenizer_once(World("train", 0).corpus()[-400:], 200), 24)
        outputs, inputs = (7, 32) if kind is VQA else (2, 64)
        stage = bare(kind, model, head=classifier(model.config, inputs, outputs), words=words)
        source = (WorldQuestions if kind is VQA else WorldStatements)("val", 16, count=5)
    else:
        head = nn.Sequential(Standardise(32), nn.Linear(32, 48))
        stage, source = bare(kind, model, head=head), WorldClasses("val", 16, count=20)
    for parameter in stage.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return stage, source


def answers(kind, batch, length=24):
    """The answers to all samples, and the logits behind those of this process."""
    stage, source = task(kind)
    if stage.words:
        stage.words.length = length
    seen = []
    stage.head.register_forward_hook(lambda module, inputs, out: seen.extend(out))
    numbers = [number for part in data.shard(20, batch) for number in part]
    return [stage.answers(source, CPU, batch), dict(zip(numbers, seen))]


@pytest.fixture(scope="module")
def many(processes):
    """What each of three processes finds."""
    return processes(3, everything)


def everything():
    found = {kind.__name__: answers(kind, 3) for kind in (VQA, NLVR2, Classify)}
    return found | {"standardised": standardised()}


@pytest.mark.parametrize("kind", [VQA, NLVR2, Classify])
def test_predictions_depend_on_no_batch_no_padding_and_no_number_of_processes(kind, many):
    predicted, whole = answers(kind, 20)
    assert len(predicted) == len(whole) == 20 and len(set(predicted)) > 1
    for other, some in [answers(kind, 3, length=22), *(found[kind.__name__] for found in many)]:
        assert other == predicted and len(some) >= 6
        for number in some:
            torch.testing.assert_close(some[number], whole[number], atol=1e-5, rtol=1e-4)


# ---- The linear probe ----------------------------------------------------------------------------


class Eight(torch.utils.data.Dataset):
    image = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(1)).byte()

    def __len__(self):
        return 8

    def __getitem__(self, key):
        return {"image": self.image[key[1]], "unreadable": torch.tensor(0)}


def standardised():
    """Mean and deviation of a linear probe of eight pictures, and their features, standardised."""
    stage, _ = task(Probe)
    stage.samples = [Eight()]
    args = SimpleNamespace(batch_size=504, accumulate=1, workers=0, seed=0)
    stage.prepare(args, SimpleNamespace(rank=losses.rank(), world=losses.world(), device=CPU))
    scale = stage.head[0]
    return torch.cat([scale.mean[None], scale.deviation[None], scale(stage.features(Eight.image))])


def test_features_of_a_linear_probe_have_mean_0_and_variance_1(many):
    found = standardised()
    torch.testing.assert_close(found[2:].mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[2:].var(0, correction=0), torch.ones(32), atol=1e-3, rtol=0)
    for other in many:
        torch.testing.assert_close(other["standardised"], found, rtol=1e-4, atol=1e-4)
