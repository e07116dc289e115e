"""Recall on matrices written by hand, and every measurement on one and several processes."""

import math
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import dvae
import evaluate
import losses
from mome import CONFIGS, Config, VLMo

YES, NO = True, False


def test_recall_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.1, 0.3, 0.2]])
    relevant = torch.eye(3, dtype=torch.bool)  # ranks 1, 2, 2
    assert evaluate.recall(scores, relevant, ks=(1, 2, 3)) == pytest.approx([100 / 3, 100, 100])


def test_recall_counts_the_best_of_several_captions():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.8, 0.1, 0.3, 0.2]])
    relevant = torch.tensor([[YES, YES, NO, NO], [NO, NO, YES, YES]])  # ranks 1, 2
    assert evaluate.recall(scores, relevant, ks=(1, 2)) == [50, 100]
    # a caption asks for its only image: ranks 2 (0.1 < 0.8), 1, 2, 1 (a tie between images: 0.2 = 0.2 counts against)
    assert evaluate.recall(scores.T, relevant.T, ks=(1, 2)) == [25, 100]


def test_ties_count_against():
    relevant = torch.eye(4, dtype=torch.bool)
    assert evaluate.recall(torch.ones(4, 4), relevant, ks=(1, 3, 4)) == [0, 0, 100]
    tied = torch.tensor([[0.7, 0.7], [0.0, 0.7]])
    assert evaluate.recall(tied, torch.eye(2, dtype=torch.bool), ks=(1, 2)) == [50, 100]


def test_relevant_columns_that_tie_do_not_stand_in_each_others_way():
    scores, relevant = torch.tensor([[0.5, 0.5, 0.1]]), torch.tensor([[YES, YES, NO]])
    assert evaluate.recall(scores, relevant, ks=(1,)) == [100]


def test_a_score_that_is_not_a_number_finds_nothing():
    scores = torch.full((2, 2), torch.nan)
    assert evaluate.recall(scores, torch.eye(2, dtype=torch.bool), ks=(1,)) == [0]


def test_retrieval_recall_names_both_ways_and_their_mean():
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.2, 0.85, 0.7, 0.6]])
    relevant = torch.tensor([[YES, YES, NO, NO], [NO, NO, YES, YES]])
    results = evaluate.retrieval_recall(scores, relevant)
    assert results["TR@1"] == 50 and results["IR@1"] == 75 and results["TR@5"] == results["IR@10"] == 100
    assert results["mean"] == pytest.approx((50 + 100 + 100 + 75 + 100 + 100) / 6)


class Source:
    """Seven pictures with unequal numbers of captions; one caption belongs to two of them."""

    def __init__(self, by_text):
        self.by_text = by_text

    def __len__(self):
        return 7

    def image(self, i):
        return Image.new("RGB", (20, 30), (30 * i, 200 - 20 * i, 90))

    def captions(self, i):
        return ["alike"] if i in (2, 5) else [f"picture {i}", f"the {i} of them"][: 1 + i % 2]


def scores_and_relevance(by_text, batch=3):
    """What evaluate.retrieval hands to the metric, from a random tiny model."""
    torch.manual_seed(0)
    words = data.Words(data.train_tokenizer([c for i in range(7) for c in Source(True).captions(i)], 60), 32)
    model = VLMo(CONFIGS["tiny"])
    seen = []
    evaluate.retrieval_recall = lambda scores, relevant: seen.append((scores, relevant)) or {}
    evaluate.retrieval(model, Source(by_text), words, "cpu", batch)
    return seen[0]


@pytest.mark.parametrize("by_text", [True, False])
def test_a_caption_of_several_pictures_is_right_for_all_or_for_its_own(by_text, monkeypatch):
    monkeypatch.setattr(evaluate, "retrieval_recall", evaluate.retrieval_recall)
    _, relevant = scores_and_relevance(by_text)
    owners = [0, 1, 1, 2, 3, 3, 4, 5, 6]
    expected = torch.tensor([[owner == i or (by_text and {owner, i} == {2, 5}) for owner in owners] for i in range(7)])
    assert torch.equal(relevant, expected)


def test_retrieval_is_the_same_on_one_and_three_processes_and_in_any_batch(processes, monkeypatch):
    monkeypatch.setattr(evaluate, "retrieval_recall", evaluate.retrieval_recall)
    scores, relevant = scores_and_relevance(True)
    alone, _ = scores_and_relevance(True, batch=1)
    torch.testing.assert_close(alone, scores, atol=1e-5, rtol=0)
    for many, relevant_many in processes(3, scores_and_relevance, True):
        torch.testing.assert_close(many, scores, atol=1e-5, rtol=0)
        assert torch.equal(relevant_many, relevant)


def test_mixed_precision_does_not_round_the_scores(monkeypatch):
    monkeypatch.setattr(evaluate, "retrieval_recall", evaluate.retrieval_recall)
    with torch.autocast("cpu", torch.bfloat16):
        scores, _ = scores_and_relevance(True)
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())


def test_an_unreadable_picture_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    source = data.Records([(tmp_path / "a.png", ["a"], "a")])
    words = data.Words(data.train_tokenizer(["a"], 20), 32)
    with pytest.raises(data.DataError, match="a.png cannot be read"):
        evaluate.retrieval(VLMo(CONFIGS["tiny"]), source, words, "cpu")


# ---- Stages image and text -------------------------------------------------------------------------------------------


def test_the_nearest_visible_patch_by_hand():
    codes = torch.arange(9)[None]
    hidden = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1]]).bool()  # of 3 × 3, patches 2 (above right) and 6 are visible
    assert evaluate.nearest_visible(codes, hidden).tolist() == [[2, 2, 2, 6, 2, 2, 6, 6, 2]]  # the first of equals


class Answers(torch.nn.Module):
    """Stands in for a model of images: its hidden vectors are the codes that it believes in, one-hot."""

    def __init__(self, believed):
        super().__init__()
        self.config, self.believed, self.mask_embedding = Config(image_size=16, patch_size=4), believed, None

    def encode_image(self, image, masked, mask_embedding):
        one_hot = torch.nn.functional.one_hot(self.believed(image), 4).float()
        return torch.cat([torch.zeros(len(image), 1, 4), one_hot], dim=1)

    def forward(self, hidden):
        return hidden.log().clamp(min=math.log(1e-3))


class Codes:
    """Stands in for a dVAE: pictures of the left half have code 0, of the right half 1; one patch in four has 2."""

    config = dvae.DVAEConfig(grid=4, codes=4)

    def encode(self, image):
        return torch.tensor([0, 0, 1, 2] * 4).expand(len(image), -1)


def masked_patches():
    source = data.Shapes("test", 16, count=30)
    model = Answers(lambda image: torch.tensor([0, 0, 1, 3] * 4).expand(len(image), -1))
    return evaluate.masked_patches(model, model, Codes(), source, "cpu")


def test_masked_patches_counts_what_is_found(processes):
    results = masked_patches()
    masks = torch.stack([data.mask_blocks(4, random.Random(f"mask {i}")) for i in range(30)])
    codes = Codes().encode(masks)
    counts = torch.bincount(codes[masks], minlength=4)
    assert results["masked"] == masks.sum() and results["most frequent"] == pytest.approx(100 * counts[0] / masks.sum())
    right = counts[0] + counts[1]
    assert results["accuracy"] == pytest.approx(100 * right / masks.sum()) and 0 < results["accuracy"] < 100
    wrong = -math.log(1e-3 / (1 + 3e-3)) * counts[2] + math.log(1 + 3e-3) * right
    assert results["perplexity"] == pytest.approx(math.exp(wrong / masks.sum()), rel=1e-4)
    near = evaluate.nearest_visible(codes, masks)
    assert results["nearest visible"] == pytest.approx(100 * (near == codes)[masks].sum() / masks.sum())
    assert all(answer == pytest.approx(results) for answer in processes(2, masked_patches))


class Reader(torch.nn.Module):
    """Stands in for a model of text that takes every masked token for the one it sees there."""

    def __init__(self, size):
        super().__init__()
        self.size, self.mlm_head = size, torch.nn.Identity()

    def encode_text(self, text, mask):
        return 5.0 * torch.nn.functional.one_hot(text, self.size)


def masked_words(folder):
    words = data.Words(data.train_tokenizer(["red red red blue"], 40), 10)
    data.pack(
        [("train", "red red red blue")] + [("test", f"red blue {i % 3 * 'red '}") for i in range(150)], words, folder
    )
    test, training = (data.Texts(f"{folder}/{split}", words, 0) for split in ("test", "train"))
    return evaluate.masked_words(Reader(words.size), test, training, "cpu"), test, words


def results_alone(folder):
    folder = f"{folder}/{losses.rank()}"
    Path(folder).mkdir()
    return masked_words(folder)[0]


def test_masked_words_counts_what_is_found_beside_the_unigrams(tmp_path, processes):
    results, test, words = masked_words(tmp_path)
    samples = [test[0, i] for i in range(len(test))]
    masked, labels = (torch.stack([sample[name] for sample in samples]) for name in ("masked", "labels"))
    at = labels != data.IGNORE
    found, labels = (masked == labels)[at], labels[at]
    red, blue = (words.tokenizer.token_to_id(word) for word in ("red", "blue"))
    assert results["masked"] == len(labels) and results["accuracy"] == pytest.approx(100 * found.float().mean())
    loss = math.log(math.exp(5) + words.size - 1) - 5 * found.double()
    assert results["perplexity"] == pytest.approx(loss.mean().exp().item(), rel=1e-4)
    assert results["unigram accuracy"] == pytest.approx(100 * (labels == red).float().mean())
    share = {red: 4 / (4 + words.size), blue: 2 / (4 + words.size)}  # 3 and 1 of 4, one added to each of the vocabulary
    unigram = -sum(math.log(share[label]) for label in labels.tolist()) / len(labels)
    assert results["unigram perplexity"] == pytest.approx(math.exp(unigram), rel=1e-4)
    assert all(answer == pytest.approx(results) for answer in processes(2, results_alone, str(tmp_path)))


def test_a_diverged_or_empty_measurement_is_infinite_not_an_error():
    assert evaluate.perplexity(1e9, 3) == evaluate.perplexity(0.0, 0) == math.inf
    assert evaluate.perplexity(2 * math.log(3), 2) == pytest.approx(3)
