"""Recall on matrices written by hand, and every measurement on one and several processes."""

import collections
import math
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

import bench
import data
import dvae
import evaluate
import losses
from mome import CONFIGS, NLVR2, VQA, Classifier, Config, VLMo

YES, NO = True, False


def test_ranks_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.1, 0.3, 0.2]])
    assert evaluate.ranks(scores, torch.eye(3, dtype=torch.bool)).tolist() == [0, 1, 1]


def test_the_best_of_several_captions_counts():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.8, 0.1, 0.3, 0.2]])
    relevant = torch.tensor([[YES, YES, NO, NO], [NO, NO, YES, YES]])
    assert evaluate.ranks(scores, relevant).tolist() == [0, 1]
    # a caption asks for its only image: second (0.1 < 0.8), first, second, second (a tie counts against: 0.2 = 0.2)
    assert evaluate.ranks(scores.T, relevant.T).tolist() == [1, 0, 1, 1]


def test_ties_count_against():
    assert evaluate.ranks(torch.ones(4, 4), torch.eye(4, dtype=torch.bool)).tolist() == [3] * 4
    tied = torch.tensor([[0.7, 0.7], [0.0, 0.7]])
    assert evaluate.ranks(tied, torch.eye(2, dtype=torch.bool)).tolist() == [1, 0]


def test_relevant_columns_that_tie_do_not_stand_in_each_others_way():
    assert evaluate.ranks(torch.tensor([[0.5, 0.5, 0.1]]), torch.tensor([[YES, YES, NO]])).tolist() == [0]


def test_a_score_that_is_not_a_number_finds_nothing():
    assert evaluate.ranks(torch.full((2, 2), torch.nan), torch.eye(2, dtype=torch.bool)).tolist() == [1, 1]


def test_recall_names_both_ways_and_their_mean():
    results = evaluate.recall(torch.tensor([0, 4]), torch.tensor([0, 0, 9, 10]))
    assert results == {"TR@1": 50, "TR@5": 100, "TR@10": 100, "IR@1": 50, "IR@5": 50, "IR@10": 75, "mean": 425 / 6}


def gallery(images=50, captions=117, dim=16, seed=0):
    """Features that tie now and then, and which belong together: 2 or 3 captions an image."""
    rng = torch.Generator().manual_seed(seed)
    image, text = (torch.randint(-1, 2, (n, dim), generator=rng).float() for n in (images, captions))
    return image, text, torch.stack([torch.arange(captions) % images, torch.arange(captions)])


def searched(block=500):
    image, text, relevant = gallery()
    return [
        evaluate.search(image, text, relevant, block=block),
        evaluate.search(text, image, relevant.flip(0), block=block),
    ]


def test_blocks_and_processes_give_the_ranks_of_the_whole_matrix(many):
    image, text, (i, n) = gallery()
    relevant = torch.zeros(50, 117, dtype=torch.bool)
    relevant[i, n] = True
    whole = evaluate.ranks(image @ text.T, relevant), evaluate.ranks(text @ image.T, relevant.T)
    assert 0 < (whole[0] == 0).sum() < 50
    for found in [searched(block) for block in (1, 500, 5000, 10**6)] + [answer["search"] for answer in many]:
        assert all(torch.equal(a, b) for a, b in zip(found, whole))


def memory_of_search(dim=32):
    """Searches as many images and captions as COCO 5K has → by how many MB the peak of this process's memory rises."""
    image, text = torch.randn(5000, dim), torch.randn(25_010, dim)
    relevant = torch.stack([torch.arange(25_010) % 5000, torch.arange(25_010)])
    before = bench.resident("VmHWM")
    found = evaluate.search(image, text, relevant), evaluate.search(text, image, relevant.flip(0))
    assert [len(ranks) for ranks in found] == [5000, 25_010]
    return (bench.resident("VmHWM") - before) / 1e6


@pytest.mark.slow
def test_ranking_5000_images_and_25010_captions_takes_less_than_a_gigabyte(processes):
    assert all(0 < risen < 1000 for risen in processes(2, memory_of_search))


def test_reordering_by_hand():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 5.0, 5.5, 6.0]])
    odds = torch.tensor(
        [[0.0, 2.0, 9.0, 9.0], [9.0, 9.0, 0.0, -3.0]]
    )  # the third and fourth, first and second are not asked
    asked = lambda row, column: odds[row, column]
    new = evaluate.reorder(scores, 2, asked)
    assert new.argsort(1, descending=True).tolist() == [[1, 0, 2, 3], [2, 3, 1, 0]]  # 5 > 4; 5.5 > 3
    assert evaluate.reorder(scores, 9, asked).argsort(1, descending=True).tolist() == [[2, 3, 1, 0], [1, 0, 2, 3]]


@pytest.fixture(scope="module")
def many(processes, tmp_path_factory):
    """What each of two, and each of three, processes measures."""
    folder = str(tmp_path_factory.mktemp("texts"))
    return [answer for world in (2, 3) for answer in processes(world, everything, folder)]


def everything(folder):
    answers = {"search": searched(), "retrieval": searches(True, 3, 4), "patches": masked_patches()}
    return answers | {"words": results_alone(folder)} | {name: logits(name, 2) for name in TASKS}


class Source:
    """Seven pictures with unequal numbers of captions; one caption belongs to two of them."""

    def __init__(self, by_text):
        self.by_text = by_text

    def __len__(self):
        return 7

    def image(self, i):
        return Image.new("RGB", (20, 30), (30 * i, 200 - 20 * i, 90))

    def __getitem__(self, i):
        captions = ["alike"] if i in (2, 5) else [f"picture {i}", f"the {i} of them"][: 1 + i % 2]
        return data.Picture(None, captions, str(i))


def searches(by_text, batch=3, rerank=0):
    """What evaluate.retrieval searches, and what it answers, from a random tiny model."""
    torch.manual_seed(0)
    words = data.Words(data.train_tokenizer([c for i in range(7) for c in Source(True)[i].captions], 60), 32)
    model, seen, real = VLMo(CONFIGS["tiny"]), [], evaluate.search
    evaluate.search = lambda *parts: seen.append(parts[:3]) or real(*parts)
    try:
        results = evaluate.retrieval(model, Source(by_text), words, "cpu", batch, rerank)
    finally:
        evaluate.search = real
    return *seen[0], results


@pytest.mark.parametrize("by_text", [True, False])
def test_a_caption_of_several_pictures_is_right_for_all_or_for_its_own(by_text):
    _, _, pairs, _ = searches(by_text)
    owners = [0, 1, 1, 2, 3, 3, 4, 5, 6]
    expected = {
        (i, n) for n, own in enumerate(owners) for i in range(7) if own == i or (by_text and {own, i} == {2, 5})
    }
    assert set(map(tuple, pairs.T.tolist())) == expected


def test_retrieval_is_the_same_on_any_number_of_processes_and_in_any_batch(many):
    image, text, _, results = searches(True, rerank=4)
    for other_image, other_text, _, other in [searches(True, 1, 4), *(answer["retrieval"] for answer in many)]:
        torch.testing.assert_close(other_image, image, atol=1e-5, rtol=0)
        torch.testing.assert_close(other_text, text, atol=1e-5, rtol=0)
        assert other == results and len(results) == 14


def test_mixed_precision_does_not_round_the_scores():
    image, text = torch.eye(2), torch.tensor([[1.0, 0.0], [1.001, 0.0]])  # alike in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate.search(image[:1], text, torch.tensor([[0], [1]])).tolist() == [0]


def test_reranking_asks_the_itm_head_about_the_best(monkeypatch):
    """With log-odds that know the truth, the right pair comes first wherever it is among the K best."""
    torch.manual_seed(0)
    words = data.Words(data.train_tokenizer([c for i in range(7) for c in Source(True)[i].captions], 60), 32)
    said, asked = collections.defaultdict(set), []
    for i in range(7):
        for caption in Source(True)[i].captions:
            said[tuple(words.encode(caption)[0].tolist())].add(i)

    def knows(model, images, texts, masks, pairs, device, batch):
        asked.append(len(pairs))
        red = [int(image[0, 0, 0]) for image in images[pairs[:, 0]]]  # 30 times the picture's number
        texts = [tuple(row.tolist() + [words.pad] * (32 - len(row))) for row in texts[pairs[:, 1]]]
        return torch.tensor([1000.0 * (value // 30 in said[text]) for value, text in zip(red, texts)])

    monkeypatch.setattr(evaluate, "matching", knows)
    results = evaluate.retrieval(VLMo(CONFIGS["tiny"]), Source(True), words, "cpu", rerank=9)
    assert results["reranked TR@1"] == results["reranked IR@1"] == 100 > results["TR@1"]
    assert asked == [7 * 9, 9 * 7]


def test_an_unreadable_picture_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    source = data.Records(data.Picture, [(tmp_path / "a.png", ["a"], "a")])
    words = data.Words(data.train_tokenizer(["a"], 20), 32)
    with pytest.raises(data.DataError, match="a.png cannot be read"):
        evaluate.retrieval(VLMo(CONFIGS["tiny"]), source, words, "cpu")


# ---- Questions, statements, classes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, answers, accuracy",
    [
        ("dog", ["dog"] * 3 + ["cat"] * 7, 0.9),  # (3 · 2/3 + 7 · 1) / 10
        ("dog", ["dog"] * 1 + ["cat"] * 9, 0.3),
        ("dog", ["dog"] * 2 + ["cat"] * 8, 0.6),  # (2 · 1/3 + 8 · 2/3) / 10
        ("dog", ["dog"] * 4 + ["cat"] * 6, 1.0),
        ("bird", ["dog"] * 4 + ["cat"] * 6, 0.0),
        ("two", ["2"] * 10, 1.0),
        ("a dog.", ["dog"] * 10, 1.0),
        ("isnt", ["isn't"] * 10, 1.0),
        ("dog", ["A dog", "dog.", "the dog"] + ["cat"] * 7, 0.9),
    ],
)
def test_vqa_accuracy_by_hand(answer, answers, accuracy):
    assert evaluate.vqa_accuracy(answer, answers) == pytest.approx(accuracy)


def test_vqa_accuracies_by_type_beside_the_best_constant():
    question = lambda answer, kind: data.Question(None, "?", 0, [answer] * 10, answer, kind)
    asked = [question(*known) for known in [("yes", "yes/no"), ("yes", "yes/no"), ("no", "yes/no"), ("2", "number")]]
    results = evaluate.vqa_accuracies(["yes", "no", "no", "two"], asked)
    assert results == pytest.approx({
        "accuracy": 75, "yes/no": 200 / 3, "yes/no, best constant": 200 / 3, "number": 100, "number, best constant": 100
    })  # fmt: skip


def test_nlvr2_consistency_wants_all_pairs_of_a_statement():
    statement = lambda id, label: data.Statement(None, "s", id, label)
    known = [
        statement(*k) for k in [("dev-1-0-0", True), ("dev-1-1-0", False), ("dev-1-0-1", True), ("dev-2-0-0", True)]
    ]
    results = evaluate.nlvr2_accuracies([True, True, True, True], known)
    assert results == pytest.approx({"accuracy": 75, "consistency": 200 / 3})


TASKS = {
    "vqa": lambda model: (VQA(model, 7), data.ShapesQuestions("val", 48)),
    "nlvr2": lambda model: (NLVR2(model), data.ShapesStatements("val", 48)),
    "classify": lambda model: (Classifier(model, 48), data.ShapesClasses("val", 48)),
}


class Ten:
    """The first ten samples of a source: they fill no batch and no process's share."""

    def __init__(self, source):
        self.source, self.image = source, source.image

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return self.source[i]


def logits(name, batch, length=24):
    """A random model's predictions on ten samples, and the logits behind those that this process made."""
    torch.manual_seed(1)
    words = data.Words(data.train_tokenizer(data.Shapes("train", 0).corpus(), 512), length)
    module, source = TASKS[name](VLMo(CONFIGS["tiny"]))
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    numbers, seen = [number for part in evaluate.shard(10, batch) for number in part], []
    module.register_forward_hook(lambda module, inputs, out: seen.extend(out))
    predicted = evaluate.predict(module, Ten(source), None if name == "classify" else words, "cpu", batch)
    return [predicted, dict(zip(numbers, seen))]


@pytest.mark.parametrize("name", TASKS)
def test_predictions_depend_on_no_batch_no_padding_and_no_number_of_processes(name, many):
    predicted, whole = logits(name, 10)
    assert len(predicted) == len(whole) == 10 and not torch.allclose(whole[0], whole[1], atol=1e-2)
    for other, some in [logits(name, 1), logits(name, 3), logits(name, 10, length=22), *(one[name] for one in many)]:
        assert torch.equal(other, predicted) and len(some) >= 2
        for number in some:
            torch.testing.assert_close(some[number], whole[number], atol=1e-5, rtol=0)


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


def test_masked_patches_counts_what_is_found(many):
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
    assert all(answer["patches"] == pytest.approx(results) for answer in many)


class Reader(torch.nn.Module):
    """Stands in for a stage that takes every masked token for the one it sees there."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def logits(self, batch):
        return 5.0 * torch.nn.functional.one_hot(batch["masked"], self.size)[batch["labels"] != data.IGNORE]


def masked_words(folder):
    words = data.Words(data.train_tokenizer(["red red red blue"], 40), 10)
    data.pack(
        [("train", "red red red blue")] + [("test", f"red blue {i % 3 * 'red '}") for i in range(150)], words, folder
    )
    test, training = (data.Texts(f"{folder}/{split}", words, 0) for split in ("test", "train"))
    return evaluate.masked_words(Reader(words.size), test, training, "cpu"), test, words


def results_alone(folder):
    folder = f"{folder}/{losses.world()}-{losses.rank()}"
    Path(folder).mkdir()
    return masked_words(folder)[0]


def test_masked_words_counts_what_is_found_beside_the_unigrams(tmp_path, many):
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
    assert all(answer["words"] == pytest.approx(results) for answer in many)


def test_a_diverged_or_empty_measurement_is_infinite_not_an_error():
    assert evaluate.perplexity(1e9, 3) == evaluate.perplexity(0.0, 0) == math.inf
    assert evaluate.perplexity(2 * math.log(3), 2) == pytest.approx(3)
