"""Ranks and recall on matrices written by hand; search and reranking in blocks, batches and several
processes."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import shaken, train_tokenizer_once
from PIL import Image

import data
import images
import retrieval
from mome import CONFIGS, VLMo
from texts import Words

YES, NO = True, False
NAN = float("nan")


@pytest.mark.parametrize(
    "scores, relevant, ranks",
    [
        # one right column each: second (0.4 < 0.5) means rank 1
        ([[0.9, 0.1], [0.5, 0.4], [0.1, 0.3]], [[YES, NO], [NO, YES], [NO, YES]], [0, 1, 0]),
        # the best of several right columns counts, and these do not count against each other
        ([[0.1, 0.9, 0.5], [0.8, 0.1, 0.3]], [[YES, YES, NO], [NO, YES, YES]], [0, 1]),
        ([[0.5, 0.5, 0.1]], [[YES, YES, NO]], [0]),
        # ties, and what is not a number, count against the model
        ([[0.7, 0.7], [0.0, 0.7]], [[YES, NO], [NO, YES]], [1, 0]),
        ([[NAN, NAN, NAN]], [[YES, NO, NO]], [2]),
    ],
)
def test_ranks_by_hand(scores, relevant, ranks):
    assert retrieval.ranks(torch.tensor(scores), torch.tensor(relevant)).tolist() == ranks


def test_recall_has_both_ways_and_their_mean():
    assert retrieval.recall(torch.tensor([0, 4]), torch.tensor([0, 0, 9, 10])) == {
        "TR@1": 50, "TR@5": 100, "TR@10": 100, "IR@1": 50, "IR@5": 50, "IR@10": 75, "mean": 425 / 6
    }  # fmt: skip


def test_a_caption_of_several_pictures_is_right_for_all_or_for_its_own_only():
    captions = [(0, "alike"), (1, "other"), (2, "Alike"), (3, "more of it")]  # images 1, 3 are of one item
    own = {(0, 0), (1, 1), (2, 2), (3, 3)}
    for by_text, expected in ((False, own), (True, own | {(2, 0), (0, 2), (3, 1), (1, 3)})):
        pairs = retrieval.relevant_pairs(captions, ["a", "b", "c", "b"], by_text).T.tolist()
        assert set(map(tuple, pairs)) == expected


def gallery():
    """50 queries and 117 columns that tie now and then, and the pairs that belong together."""
    rng = torch.Generator().manual_seed(0)
    queries, columns = (torch.randint(-1, 2, (n, 16), generator=rng).float() for n in (50, 117))
    return queries, columns, torch.stack([torch.arange(117) % 50, torch.arange(117)])


def test_blocks_and_processes_give_the_ranks_of_the_whole_matrix(many):
    queries, columns, (row, column) = gallery()
    relevant = torch.zeros(50, 117, dtype=torch.bool)
    relevant[row, column] = True
    whole = retrieval.ranks(queries @ columns.T, relevant)
    assert 0 < (whole == 0).sum() < 50
    for found, *_ in many:
        assert torch.equal(found, whole)
    for block, rows in ((1, 1), (500, 4), (10**6, 50)):  # at least a row of scores at a time
        sizes = []
        second = lambda scores, first: sizes.append(len(scores)) or scores
        assert torch.equal(retrieval.search(*gallery(), second, block), whole)
        assert max(sizes) == rows


def test_mixed_precision_does_not_round_the_scores():
    image, text = torch.eye(2), torch.tensor([[1.0, 0.0], [1.001, 0.0]])  # equal in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert retrieval.search(image[:1], text, torch.tensor([[0], [1]])).tolist() == [0]


class Source(list):
    """Seven pictures with one or two captions; one caption belongs to two of them."""

    by_text = True

    def image(self, i, view=None):
        return Image.new("RGB", (20, 30), (30 * i, 200 - 20 * i, 90))


CAPTIONS = [["picture 0"], ["picture 1", "the first of them"], ["alike"]]
CAPTIONS += [["picture 3", "the third of them"], ["picture 4"], ["alike"], ["picture 6"]]
SOURCE = Source(data.Picture(None, captions, str(i)) for i, captions in enumerate(CAPTIONS))
OWNERS = [{0}, {1}, {1}, {2, 5}, {3}, {3}, {4}, {2, 5}, {6}]  # of the nine captions


def model_and_words():
    """A random model, and a vocabulary of the captions."""
    torch.manual_seed(0)
    captions = sum(CAPTIONS, [])
    return VLMo(CONFIGS["tiny"]).eval(), Words(train_tokenizer_once(lambda: captions, 100), 24), captions


def results(batch):
    """Vectors of all pictures and captions, and retrieval with reranking."""
    model, words, captions = model_and_words()
    with torch.no_grad():
        image = retrieval.embed_images(model, SOURCE, "cpu", batch)
        text = retrieval.embed_texts(model, *words.encode_all(captions), "cpu", batch)
    whole = retrieval.retrieval(model, SOURCE, words, "cpu", batch, rerank=4)
    return [retrieval.search(*gallery(), block=500), image, text, whole]


@pytest.fixture(scope="module")
def many(processes):
    """What each of three processes finds."""
    return processes(3, results, 2)


def test_any_number_of_processes_and_any_batch_give_the_same_answer(many):
    model, words, captions = model_and_words()
    with torch.no_grad():  # one text after the other
        text = torch.cat([model.embed_text(*words.encode_all([caption])) for caption in captions])
    _, image, _, whole = results(batch=7)
    assert len(whole) == 14
    for _, other_image, other_text, other in [results(batch=2), *many]:
        torch.testing.assert_close(other_image, image, atol=1e-5, rtol=0)
        torch.testing.assert_close(other_text, text, atol=1e-5, rtol=0)
        assert other == whole


def test_a_caption_of_karpathys_splits_is_right_only_for_its_own_picture():
    model, words, _ = model_and_words()
    alike = Source(data.Picture(None, ["alike"], str(i)) for i in range(4))
    for by_text, right in ((True, 100), (False, 25)):  # one picture is the best for all four
        alike.by_text = by_text
        assert retrieval.retrieval(model, alike, words, "cpu")["IR@1"] == right


def test_reordering_by_hand(monkeypatch):
    asked, odds = [], torch.tensor([[0.0, 2.0], [-3.0, 0.0], [0.0, -100.0], [0.0, 0.5]])

    def given(self, image, caption):
        asked.append((image.tolist(), caption.tolist()))
        return odds.flatten()

    monkeypatch.setattr(retrieval.Reranker, "odds", given)
    model = SimpleNamespace(scale=lambda: 10)
    reranker = retrieval.Reranker(model, None, None, None, 2, "cpu", batch=64)
    falling, rising = [0.4, 0.3, 0.2, 0.1], [0.0, 0.5, 0.55, 0.6]
    scores = torch.tensor([falling, rising, falling, falling])
    # 4 < 3 + 2; 6 − 3 < 5.5; a match that the head does not believe stays before the others;
    # 4 > 3 + 0.5
    order = [[1, 0, 2, 3], [2, 3, 1, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
    for image_asks in (True, False):
        assert reranker.reorder(scores, 5, image_asks).argsort(1, descending=True).tolist() == order
    queries, answers = [5, 5, 6, 6, 7, 7, 8, 8], [0, 1, 3, 2, 0, 1, 0, 1]
    assert asked == [(queries, answers), (answers, queries)]


def test_similarities_count_as_much_as_they_did_in_training_when_a_few_are_sorted_again():
    odds = torch.tensor([0.0, 0.5])
    match = lambda text, mask, image: torch.stack([torch.zeros(2), odds], dim=1)
    model, pairs = SimpleNamespace(scale=lambda: 10.0, match=match), torch.zeros(2, 3, dtype=torch.int64)
    scores, pixels = torch.tensor([0.9, 0.1, 0.8]), torch.zeros(2, 3, 4, 4)
    order, matches = retrieval.reranked(model, [0, 2], scores, pixels, pairs, pairs == 0)
    assert order == [0, 2] and matches[2] == pytest.approx(1 / (1 + math.exp(-0.5)))  # 9 and 8.5


def test_the_log_odds_are_those_of_each_pair():
    model, words, captions = model_and_words()
    shaken(model)
    pixels = torch.stack([images.to_tensor(images.resize(SOURCE.image(i), 48)) for i in range(7)])
    ids, mask = words.encode_all(captions)
    reranker = retrieval.Reranker(model, pixels, ids, mask, 4, "cpu", batch=2)
    image, caption = torch.tensor([0, 6, 3]), torch.tensor([8, 1, 4])
    for odds, i, n in zip(reranker.odds(image, caption), image, caption):
        hidden = model.encode_pair(ids[n][None], mask[n][None], pixels[i][None])
        wrong, right = model.itm_head(torch.tanh(model.pooler(hidden[:, 0])))[0]
        torch.testing.assert_close(odds, right - wrong, atol=1e-5, rtol=0)


def test_with_log_odds_that_know_the_truth_the_right_pair_comes_first(monkeypatch):
    def odds(self, image, caption):
        return torch.tensor([1000.0 * (int(i) in OWNERS[n]) for i, n in zip(image, caption)])

    monkeypatch.setattr(retrieval.Reranker, "odds", odds)
    model, words, _ = model_and_words()
    results = retrieval.retrieval(model.train(), SOURCE, words, "cpu", rerank=5)
    assert model.training
    for way in ("TR", "IR"):  # the head is asked about the best five only
        assert results[f"{way}@1"] < results[f"{way}@5"] == results[f"reranked {way}@1"]
