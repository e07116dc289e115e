"""Ranks and recall on matrices written by hand; search and reranking in blocks, batches and several
processes."""

import pytest
import torch
from PIL import Image

import bench
import data
import retrieval
from mome import CONFIGS, VLMo
from sources import Records
from texts import Words, train_tokenizer

YES, NO = True, False
NAN = float("nan")


# ---- Ranks and recall ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, relevant, ranks",
    [
        # one right column each: second (0.3 > 0.2) means rank 1
        (
            [[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.1, 0.3, 0.2]],
            [[YES, NO, NO], [NO, YES, NO], [NO, NO, YES]],
            [0, 1, 1],
        ),
        # the best of several right columns counts, and these do not count against each other
        ([[0.1, 0.9, 0.5, 0.2], [0.8, 0.1, 0.3, 0.2]], [[YES, YES, NO, NO], [NO, NO, YES, YES]], [0, 1]),
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
    captions = [(0, "alike"), (1, "other"), (2, "alike")]
    own = {(0, 0), (1, 1), (2, 2)}
    for by_text, expected in ((False, own), (True, own | {(2, 0), (0, 2)})):
        pairs = retrieval.relevant_pairs(captions, by_text).T.tolist()
        assert set(map(tuple, pairs)) == expected


# ---- Search --------------------------------------------------------------------------------------


def gallery(images=50, captions=117, dim=16):
    """Features that tie now and then, and which belong together: 2 or 3 captions per image."""
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(-1, 2, (images, dim), generator=rng).float()
    text = torch.randint(-1, 2, (captions, dim), generator=rng).float()
    return image, text, torch.stack([torch.arange(captions) % images, torch.arange(captions)])


def searched(block=500):
    image, text, relevant = gallery()
    return [
        retrieval.search(image, text, relevant, block=block),
        retrieval.search(text, image, relevant.flip(0), block=block),
    ]


def test_blocks_and_processes_give_the_ranks_of_the_whole_matrix(many):
    image, text, (i, n) = gallery()
    relevant = torch.zeros(50, 117, dtype=torch.bool)
    relevant[i, n] = True
    of_images = retrieval.ranks(image @ text.T, relevant)
    of_captions = retrieval.ranks(text @ image.T, relevant.T)
    assert 0 < (of_images == 0).sum() < 50
    for found in [*map(searched, (1, 500, 5000, 10**6)), *(answer[0] for answer in many)]:
        assert torch.equal(found[0], of_images) and torch.equal(found[1], of_captions)


def test_mixed_precision_does_not_round_the_scores():
    image, text = torch.eye(2), torch.tensor([[1.0, 0.0], [1.001, 0.0]])  # equal in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert retrieval.search(image[:1], text, torch.tensor([[0], [1]])).tolist() == [0]


def memory_of_search(dim=32):
    """Searches as many images and captions as COCO 5K has → by how many MB this process's peak of
    memory rises."""
    image, text = torch.randn(5000, dim), torch.randn(25_010, dim)
    relevant = torch.stack([torch.arange(25_010) % 5000, torch.arange(25_010)])
    before = bench.resident("VmHWM")
    assert len(retrieval.search(image, text, relevant)) == 5000
    assert len(retrieval.search(text, image, relevant.flip(0))) == 25_010
    return (bench.resident("VmHWM") - before) / 1e6


@pytest.mark.slow
def test_ranking_5000_images_and_25010_captions_takes_less_than_a_gigabyte(processes):
    assert all(0 < rise < 1000 for rise in processes(2, memory_of_search))


# ---- Retrieval with a model ----------------------------------------------------------------------


class Source:
    """Seven pictures with one or two captions; one caption belongs to two of them."""

    by_text = True

    def __len__(self):
        return 7

    def image(self, i):
        return Image.new("RGB", (20, 30), (30 * i, 200 - 20 * i, 90))

    def __getitem__(self, i):
        captions = [f"picture {i}", f"the {i} of them"][: 1 + i % 2]
        return data.Picture(None, ["alike"] if i in (2, 5) else captions, str(i))


OWNERS = [{0}, {1}, {1}, {2, 5}, {3}, {3}, {4}, {2, 5}, {6}]  # of the nine captions


def model_and_words():
    """A random model, and a vocabulary of the captions."""
    torch.manual_seed(0)
    captions = [caption for i in range(7) for caption in Source()[i].captions]
    return VLMo(CONFIGS["tiny"]).eval(), Words(train_tokenizer(captions, 60), 24), captions


def results(batch):
    """Vectors of all pictures and captions, and retrieval with reranking."""
    model, words, captions = model_and_words()
    with torch.no_grad():
        image = retrieval.embed_images(model, Source(), "cpu", batch)
        text = retrieval.embed_texts(model, *words.encode_all(captions), "cpu", batch)
    return [image, text, retrieval.retrieval(model, Source(), words, "cpu", batch, rerank=4)]


@pytest.fixture(scope="module")
def many(processes):
    """What each of three processes finds."""
    return processes(3, everything)


def everything():
    return [searched(), results(batch=2)]


def test_any_number_of_processes_and_any_batch_give_the_same_answer(many):
    model, words, captions = model_and_words()
    with torch.no_grad():  # one text after the other
        text = torch.cat([model.embed_text(*words.encode_all([caption])) for caption in captions])
    image, _, whole = results(batch=7)
    assert len(whole) == 14
    for other_image, other_text, other in [results(batch=2), *(answer[1] for answer in many)]:
        torch.testing.assert_close(other_image, image, atol=1e-5, rtol=0)
        torch.testing.assert_close(other_text, text, atol=1e-5, rtol=0)
        assert other == whole


def test_an_unreadable_picture_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    source = Records(data.Picture, [(tmp_path / "a.png", ["a"], "a")])
    model, words, _ = model_and_words()
    with pytest.raises(data.Unreadable):
        retrieval.retrieval(model, source, words, "cpu")


# ---- Reranking -----------------------------------------------------------------------------------


def test_reordering_by_hand():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 5.0, 5.5, 6.0], [4.0, 3.0, 2.0, 1.0]])
    best, column = scores.topk(2)
    odds = torch.tensor([[0.0, 2.0], [-3.0, 0.0], [0.0, -100.0]])
    new = retrieval.reorder(scores, best, column, odds)
    # 4 < 3 + 2; 6 − 3 < 5.5; and a match that the head does not believe stays before the others
    order = [[1, 0, 2, 3], [2, 3, 1, 0], [0, 1, 2, 3]]
    assert new.argsort(1, descending=True).tolist() == order


def test_the_log_odds_are_those_of_each_pair():
    model, words, captions = model_and_words()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    images = retrieval.all_images(Source(), 48, "cpu", batch=3)
    ids, mask = words.encode_all(captions)
    reranker = retrieval.Reranker(model, images, ids, mask, 4, "cpu", batch=2)
    image, caption = torch.tensor([0, 6, 3]), torch.tensor([8, 1, 4])
    with torch.no_grad():
        odds = reranker.odds(image, caption)
        for k, (i, n) in enumerate(zip(image.tolist(), caption.tolist())):
            picture = data.to_tensor(data.resize(Source().image(i), 48))
            hidden = model.encode_pair(ids[n][None], mask[n][None], picture[None])
            wrong, right = model.itm_head(torch.tanh(model.pooler(hidden[:, 0])))[0]
            torch.testing.assert_close(odds[k], right - wrong, atol=1e-5, rtol=0)


def test_with_log_odds_that_know_the_truth_the_right_pair_comes_first(monkeypatch):
    asked = []

    def odds(self, image, caption):
        asked.append(len(image))
        return torch.tensor([1000.0 * (int(i) in OWNERS[n]) for i, n in zip(image, caption)])

    monkeypatch.setattr(retrieval.Reranker, "odds", odds)
    model, words, _ = model_and_words()
    results = retrieval.retrieval(model, Source(), words, "cpu", rerank=5)
    assert asked == [7 * 5, 9 * 5]
    for way in ("TR", "IR"):  # the head is asked about the best five only
        assert results[f"{way}@1"] < results[f"{way}@5"] == results[f"reranked {way}@1"]
