"""Recall on matrices written by hand, and retrieval on one and several processes."""

import pytest
import torch
from PIL import Image

import data
import evaluate
from mome import CONFIGS, VLMo

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
