"""Tokens, masks, augmentation, data sets on disk, the built-in world, the order of samples."""

import functools
import json
import os
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data

CAPTIONS = ["a small red circle above a large blue square", "two unbelievably large dogs"]


@pytest.fixture(scope="module")
def words():
    tokenizer = data.train_tokenizer(CAPTIONS * 3 + ["dog red dogs un believ ably"], 60)
    return data.Words(tokenizer, 24)


# ---- Text ------------------------------------------------------------------------------------------------------------


def test_captions_are_framed_padded_and_cut(words):
    ids, mask = words.encode("Red dogs")
    n = int(mask.sum())
    assert ids[0] == words.cls and ids[n - 1] == words.sep and (ids[n:] == words.pad).all()
    assert words.tokenizer.decode(ids[1 : n - 1].tolist()) == "red dogs" and len(words.words(ids)) == 2
    ids, mask = words.encode("red " * 100)
    assert mask.all() and ids[-1] == words.sep and len(words.words(ids)) == 22


def test_an_empty_caption_has_two_tokens_and_nothing_to_mask(words):
    ids, mask = words.encode("  ")
    assert mask.sum() == 2 and words.words(ids) == []
    masked, labels = words.mask_words(ids, random.Random(0))
    assert torch.equal(masked, ids) and (labels == data.IGNORE).all()


def test_words_are_masked_whole_in_15_percent_80_10_10(words):
    caption = " ".join(["unbelievably", "red", "xyz", "dogs"] * 5)[:10_000]
    tokenizer = data.Words(words.tokenizer, 200)
    ids, groups = tokenizer.encode(caption)[0], []
    for position, word in enumerate(tokenizer.tokenizer.encode(caption, add_special_tokens=False).word_ids, start=1):
        groups += [[]] * (word == len(groups))
        groups[word] = groups[word] + [position]  # the library's own account of words
    assert tokenizer.words(ids) == groups and len(groups) == 20 and max(map(len, groups)) > 1
    outcomes = Counter()
    for seed in range(2000):
        masked, labels = tokenizer.mask_words(ids, random.Random(seed))
        chosen = labels != data.IGNORE
        assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(masked[~chosen], ids[~chosen])
        hit = [chosen[torch.tensor(group)] for group in groups]
        assert all(word.all() or not word.any() for word in hit) and sum(word.any().item() for word in hit) == 3
        outcomes["mask"] += int((masked[chosen] == tokenizer.mask).sum())
        outcomes["same"] += int((masked[chosen] == ids[chosen]).sum())
        outcomes["all"] += int(chosen.sum())
    assert outcomes["mask"] / outcomes["all"] == pytest.approx(0.8, abs=0.01 + 1 / tokenizer.size)
    assert outcomes["same"] / outcomes["all"] == pytest.approx(0.1, abs=0.01 + 1 / tokenizer.size)


def test_the_trained_vocabulary_is_the_same_every_time():
    captions = [caption for i in range(300) for caption in data.Shapes("train", 32)[i].captions]
    first, second = (data.train_tokenizer(captions, 90).get_vocab() for _ in range(2))
    assert first == second and len(first) == 90
    assert [piece for piece, i in sorted(first.items(), key=lambda entry: entry[1])][:5] == data.SPECIAL


def test_vocab_txt_and_tokenizer_json_read_back(words, tmp_path):
    vocab = sorted(words.tokenizer.get_vocab(), key=words.tokenizer.token_to_id)
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n")
    words.tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in ("vocab.txt", "tokenizer.json"):
        tokenizer = data.load_tokenizer(tmp_path / name)
        assert tokenizer.encode(CAPTIONS[0]).ids == words.tokenizer.encode(CAPTIONS[0]).ids


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("vocab.txt", "[PAD]\na\n", r"lacks \[UNK\], \[CLS\]"),
        ("vocab.txt", "\n".join([*data.SPECIAL, "a", "b", "a", "c"]), "an entry twice .* 8 up to 8"),
        ("t.json", "{", "holds no tokenizer"),
    ],
)
def test_what_is_no_vocabulary_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(data.DataError, match=says):
        data.load_tokenizer(tmp_path / name)
    with pytest.raises(data.DataError, match="cannot be read"):
        data.load_tokenizer(tmp_path / "absent.txt")


def test_a_tokenizer_that_pads_and_cuts_by_itself_does_not(words, tmp_path):
    tokenizer = data.tokenizer_from_json(words.tokenizer.to_str(), "a copy")
    tokenizer.enable_padding(length=16, pad_id=words.pad)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "t.json"))
    reread = data.Words(data.load_tokenizer(tmp_path / "t.json"), 24)
    for caption in ("red", CAPTIONS[1]):
        ids, mask = words.encode(caption)
        assert not mask.all() and all(map(torch.equal, reread.encode(caption), (ids, mask)))


def test_berts_vocabulary_splits_as_bert_does(shared):
    words = data.Words(data.load_tokenizer(shared / "data" / "bert-base-uncased-vocab.txt"), 40)
    assert words.size == 30522 and (words.pad, words.cls, words.sep, words.mask) == (0, 101, 102, 103)
    assert words.tokenizer.encode("Unaffable, naïve!").tokens == ["una", "##ffa", "##ble", ",", "naive", "!"]


# ---- Images ----------------------------------------------------------------------------------------------------------


def gradient_image(width=60, height=40):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([4 * x, 6 * y, 100 + x + y], -1).astype(np.uint8))


def test_transparency_shows_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (10, 20, 30, 255))
    image.save(tmp_path / "a.png")
    tensor = data.to_tensor(data.read_image(tmp_path / "a.png"))
    assert tensor.shape == (3, 4, 4) and tensor.dtype == torch.uint8
    assert tensor[:, 1, 1].tolist() == [10, 20, 30] and tensor[:, 0, 0].tolist() == [255] * 3


def test_crops_cover_half_to_all_of_the_picture():
    image, areas = gradient_image(), []
    for seed in range(300):
        crop = np.asarray(data.random_resized_crop(image, 32, random.Random(seed))).astype(float)
        areas.append((np.ptp(crop[..., 0]) / 4 + 1) * (np.ptp(crop[..., 1]) / 6 + 1) / (60 * 40))
    assert 0.42 < min(areas) < 0.6 and 0.85 < max(areas) <= 1.01  # read off the corners' colours


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_any_picture_can_be_augmented(size):
    for seed in range(5):
        assert data.augment(Image.new("RGB", size), 16, random.Random(seed), flip=True).size == (16, 16)


def test_every_operation_does_what_its_name_says():
    image = gradient_image(64, 64)
    moved = {name: np.asarray(operation(image, 0.7, 1)).astype(int) for name, operation in data.OPERATIONS.items()}
    before = np.asarray(image).astype(int)
    assert len(moved) == 10 and [name for name in moved if np.array_equal(moved[name], before)] == ["identity"]
    assert (
        moved["translate-x"][10, 20] == pytest.approx(before[10, 22], abs=1)
        and (moved["translate-x"][:, -1] == 128).all()
    )
    assert (
        moved["translate-y"][20, 10] == pytest.approx(before[22, 10], abs=1) and (moved["translate-y"][-1] == 128).all()
    )
    assert moved["brightness"].mean() > before.mean() and moved["auto-contrast"].max() == 255
    assert (moved["rotate"][0, 0] == 128).all() and np.abs(moved["rotate"][32, 32] - before[32, 32]).max() < 12


def test_randaugment_applies_two_operations(monkeypatch):
    called = []
    monkeypatch.setattr(
        data,
        "OPERATIONS",
        {name: (lambda image, level, sign, name=name: called.append((name, level, sign)) or image) for name in "abc"},
    )
    for seed in range(100):
        data.rand_augment(gradient_image(), random.Random(seed))
    assert len(called) == 200 and {name for name, _, _ in called} == set("abc")
    assert {level for _, level, _ in called} == {0.7} and {sign for _, _, sign in called} == {-1, 1}


def test_flipping_is_asked_for():
    image = gradient_image(32, 32)
    views = [np.asarray(data.augment(image, 32, random.Random(seed), "none", flip=True)) for seed in range(50)]
    mirrored = sum(view[0, 0, 0] > view[0, -1, 0] for view in views)
    assert 10 < mirrored < 40
    assert np.array_equal(np.asarray(data.augment(image, 32, random.Random(0), "none")), np.asarray(image))


# ---- Sources on disk -------------------------------------------------------------------------------------------------


def manifest(folder, *lines, name="train.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return folder


def picture(path, color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)
    return path.name


def test_manifest(tmp_path):
    name = picture(tmp_path / "a.png")
    strange = json.dumps({"image": name, "captions": ["é\u2028\x85"], "item": None}, ensure_ascii=False)
    manifest(tmp_path, {"image": name, "captions": ["one", ""], "item": 7}, "", strange)
    source = data.read_sources([tmp_path], "train", 8)
    assert (
        len(source) == 2
        and source[0].captions == ["one", ""]
        and source[0].item == "7"
        and source[1].captions == ["é\u2028\x85"]
    )
    assert source[1].item == source[1].image == str(tmp_path / "a.png") and source.image(1).size == (8, 8)
    both = data.read_sources([tmp_path, tmp_path], "train", 8)
    assert len(both) == 4 and both.by_text


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"image": "a.png", "captions": ["x"', "train.jsonl, line 2: no valid JSON"),
        ('{"image": "a.png", "captions": ["x", 5]}', r'line 2: captions must be .* not \["x", 5\]'),
        ('{"image": "a.png", "captions": "x"}', "line 2: captions must be"),
        ('{"image": "a.png", "captions": []}', "line 2: captions must be"),
        (r'{"image": "a.png", "captions": ["\ud800"]}', "line 2: a caption is no valid text"),
        ('{"image": "a.png", "captions": ["x"], "item": ["y"]}', "line 2: item must be a text or a number"),
        ('{"captions": ["x"]}', "line 2: needs"),
        ("[1]", "line 2: needs"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, says):
    picture(tmp_path / "a.png")
    manifest(tmp_path, {"image": "a.png", "captions": ["x"]}, line)
    with pytest.raises(data.DataError, match=says):
        data.read_sources([tmp_path], "train", 8)


def test_missing_files_are_counted_and_the_first_named(tmp_path):
    picture(tmp_path / "there.png")
    absent = [{"image": f"sub/{i}.png", "captions": ["x"]} for i in range(7)]
    manifest(tmp_path, {"image": "there.png", "captions": ["x"]}, *absent)
    with pytest.raises(
        data.DataError, match=r"7 of the 8 images of split train are missing: .*sub/0.png, .*sub/4.png, …"
    ):
        data.read_sources([tmp_path], "train", 8)


def test_folders_without_data_are_refused(tmp_path):
    with pytest.raises(data.DataError, match="no such folder"):
        data.read_sources([tmp_path / "absent"], "train", 8)
    with pytest.raises(data.DataError, match="has no captions: no train.jsonl"):
        data.read_sources([tmp_path], "train", 8)
    with pytest.raises(data.DataError, match="no pictures in split train"):
        data.read_sources([manifest(tmp_path, "")], "train", 8)
    assert data.read_sources([tmp_path], "test", 8, needed=False) is None


def karpathy(folder, name, entries):
    (folder / f"dataset_{name}.json").write_text(json.dumps({"dataset": name, "images": entries}))


def sentence(text):
    return {"raw": text, "tokens": text.split(), "imgid": 0, "sentid": 0}


def test_karpathys_coco_and_flickr30k(tmp_path):
    coco, flickr = tmp_path / "coco", tmp_path / "flickr"
    (
        picture(coco / "val2014" / "a.jpg"),
        picture(coco / "train2014" / "b.jpg"),
        picture(flickr / "flickr30k-images" / "c.jpg"),
    )
    entry = lambda folder, name, split, *texts: {
        "filepath": folder, "filename": name, "split": split, "sentences": [sentence(text) for text in texts]
    }  # fmt: skip
    karpathy(coco, "coco", [
        entry("val2014", "a.jpg", "restval", "A dog.", "Dog"),
        entry("train2014", "b.jpg", "train", "A cat."),
        entry("val2014", "a.jpg", "test", "A test."),
    ])  # fmt: skip
    karpathy(flickr, "flickr30k", [{"filename": "c.jpg", "split": "train", "sentences": [sentence("A bird.")]}])
    source = data.read_sources([coco, flickr], "train", 8)
    assert [source[i].captions for i in range(len(source))] == [["A dog.", "Dog"], ["A cat."], ["A bird."]]
    assert source[0].image == str(coco / "val2014" / "a.jpg") and source.image(2).size == (8, 8)
    assert not source.by_text  # its protocol: a caption is right for its own picture alone
    assert len(data.read_sources([coco], "test", 8)) == 1


def test_karpathys_entries_without_captions_are_named(tmp_path):
    for sentences, says in [
        (None, "needs filename"),
        ([], "captions must be"),
        ([sentence("a") | {"raw": 5}], "must be"),
    ]:
        karpathy(tmp_path, "coco", [{"filename": "c.jpg", "split": "train", "sentences": sentences}])
        with pytest.raises(data.DataError, match=f"dataset_coco.json, image 0: .*{says}"):
            data.read_sources([tmp_path], "train", 8)


def test_emoji_has_the_splits_it_says(shared):
    sizes = {
        split: len(data.read_sources([shared / "data" / "emoji"], split, 64)) for split in ("train", "val", "test")
    }
    assert sizes == {"train": 3200, "val": 100, "test": 500}


# ---- The built-in world ----------------------------------------------------------------------------------------------


def test_splits_share_no_scene_and_no_caption():
    meanings, captions = {}, {}
    for split in data.SPLITS:
        source = data.Shapes(split, 32, count=2000)
        meanings[split] = {source[i].item for i in range(2000)}
        captions[split] = {caption for i in range(2000) for caption in source[i].captions}
    for a, b in [("train", "val"), ("train", "test"), ("val", "test")]:
        assert not meanings[a] & meanings[b] and not captions[a] & captions[b]


def test_a_scene_is_drawn_where_its_caption_says():
    source = data.Shapes("train", 64)
    for i in range(200):
        scene, pixels = source.scene(i), np.asarray(source.image(i)).astype(int)
        things = scene["things"]
        if len({thing["color"] for thing in things}) < len(things):
            continue
        centers = []
        for thing in things:
            near = np.abs(pixels - data.COLORS[thing["color"]]).max(-1) <= 16
            assert near.sum() >= 8, (i, scene)
            y, x = near.nonzero()
            centers.append((x.mean(), y.mean()))
        along = [center[scene["layout"] == "column"] for center in centers]
        assert along == sorted(along) and np.diff(along).min() > 10, (i, scene)


def test_captions_are_all_the_ways_to_say_it():
    thing = lambda size, color, shape: {"size": size, "color": color, "shape": shape}
    a, b, c = thing("small", "red", "circle"), thing("large", "blue", "ring"), thing("small", "black", "star")
    assert data.describe({"layout": "column", "things": [a, b]}) == [
        "a small red circle above a large blue ring", "a large blue ring below a small red circle"]  # fmt: skip
    assert data.describe({"layout": "row", "things": [a, b, c]}) == [
        "a small red circle, a large blue ring and a small black star from left to right",
        "a small black star, a large blue ring and a small red circle from right to left"]  # fmt: skip


def test_the_world_depends_on_its_seed_and_on_nothing_else():
    first, again, other = (data.Shapes("train", 32, seed) for seed in (0, 0, 1))
    assert first[7].captions == again[7].captions and first.image(7).tobytes() == again.image(7).tobytes()
    assert [first[i].captions for i in range(5)] != [other[i].captions for i in range(5)]


def things_of(scene, *wanted):
    """The things of a scene that have all the wanted properties, read by names alone."""
    return [thing for thing in scene["things"] if set(wanted) <= set(thing.values())]


def properties(text):
    """The sizes, colors and shapes that a text names, in order; plurals, too."""
    names = [*data.SIZES, *data.COLORS, *data.SHAPES]
    return [name for word in text.strip("?.").split() for name in names if word in (name, name + "s", name + "es")]


def answer(scene, text):
    """The answer to a question of the built-in world, found another way: by matching its words to the scene."""
    things, named = scene["things"], properties(text)
    if text.startswith("how many"):
        return str(len(things_of(scene, *named)))
    if text.startswith("is there"):
        return "yes" if things_of(scene, *named) else "no"
    wanted = text.split()[1]
    if " on the " in text or " at the " in text:
        thing = things[0 if text.endswith(("left?", "top?")) else -1]
    else:
        [thing] = things_of(scene, *named)
    return thing[wanted]


def test_questions_have_the_right_answers_and_every_type():
    source = data.ShapesQuestions("test", 32)
    kinds = Counter()
    for i in range(1500):
        question = source[i]
        assert answer(source.scene(i // 4), question.text) == question.majority, (question, source.scene(i // 4))
        assert question.id == i and question.answers == [question.majority] * 10
        kinds[question.kind, question.majority in ("yes", "no"), question.majority.isdigit()] += 1
    assert set(kinds) == {("yes/no", True, False), ("number", False, True), ("other", False, False)}
    assert min(kinds.values()) > 400 and len(source) == 2000


def test_statements_are_true_of_two_of_four_pairs(monkeypatch):
    monkeypatch.setattr(data, "draw_scene", lambda scene, size, rng: scene)
    source, seen = data.ShapesStatements("test", 32), set()
    for i in range(800):
        statement, scenes = source[i], source.image(i)
        words, named = statement.text.split(), properties(statement.text)
        has, size = [bool(things_of(scene, *named)) for scene in scenes], [len(scene["things"]) for scene in scenes]
        side = words[1] == "right"
        holds = {
            "both": all(has), "only": sum(has) == 1, "neither": not any(has), "the": has[side],
        }[words[0]]  # fmt: skip
        if "more" in words:
            holds = size[side] > size[1 - side]
        if "all." in words:
            holds = sum(size) == {"four": 4, "five": 5, "six": 6}[words[3]]
        assert holds == statement.label, (statement, scenes)
        seen.add((words[0], "more" in words, "all." in words))
    assert len(seen) == 6
    labels = [source[i].label for i in range(800)]
    assert all(sum(labels[i : i + 4]) == 2 for i in range(0, 800, 4)) and source[6].id == "test-1-2-0"


def test_the_vocabulary_of_the_world_knows_all_its_words():
    words = data.Words(data.train_tokenizer(data.Shapes("train", 0).corpus(), 512), 24)
    asked, stated = data.ShapesQuestions("test", 0), data.ShapesStatements("test", 0)
    for text in [source[i].text for i in range(400) for source in (asked, stated)]:
        ids, mask = words.encode(text)
        pieces = words.tokenizer.encode(text, add_special_tokens=False)
        assert "[UNK]" not in pieces.tokens and len(pieces.ids) <= 22
        assert not words.inner[ids[mask].numpy()].any()  # every word is one piece


def test_classes_name_the_first_thing():
    source = data.ShapesClasses("train", 32)
    first = source.scene(3)["things"][0]
    assert source[3].label == f"{first['color']} {first['shape']}"
    assert len({sample.label for sample in data.samples(source)}) == 48


# ---- The downstream tasks on disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, means",
    [
        ("a dog.", "dog"), ("Two", "2"), ("isnt", "isn't"), ("The dog", "dog"), ("none", "0"), ("3.5", "3.5"),
        ("1,000", "1000"), ("yes, sir", "yes sir"), ("black/white", "black white"), ("red?", "red"),
        ("dont know", "don't know"), ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"),
        ("'ows'at", "'ow's'at"), ("well", "well"),
        (" on\tthe\n table ", "on table"), ("a.m.", "am"), ("", ""),
    ],
)  # fmt: skip
def test_answers_are_compared_as_vqa_does(answer, means):
    assert data.normalise(answer) == means


def test_the_answer_vocabulary_holds_what_comes_nine_times():
    majorities = ["Yes"] * 5 + ["yes."] * 4 + ["no"] * 12 + ["two"] * 8 + ["a cat"] * 9
    assert data.answer_vocabulary(majorities) == ["yes", "no", "cat"]


def test_soft_scores_grow_by_three_tenths_an_annotator():
    numbers = {"dog": 0, "2": 1, "cat": 2, "red": 3}
    scores = data.soft_scores(["a dog", "dog", "Dog.", "two", "cat", "cat", "cat", "cat", "cat", "bird"], numbers)
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.3, 1.0, 0.0]))


def vqa(folder, subset="train2014", ids=(1, 2, 3), annotated=None, **changes):
    """A split of VQA 2.0 in the published schema, with its pictures."""
    questions = [{"image_id": 10 + id, "question": f"What is {id}?", "question_id": id} for id in ids]
    given = [{"answer": "two", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
    annotations = [
        {"question_type": "what is", "multiple_choice_answer": "2", "answers": given, "image_id": 10 + id,
         "answer_type": "number", "question_id": id} for id in (ids if annotated is None else annotated)
    ]  # fmt: skip
    head = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": subset}
    for id in ids:
        picture(folder / subset / f"COCO_{subset}_{10 + id:012d}.jpg")
    (folder / f"v2_OpenEnded_mscoco_{subset}_questions.json").write_text(
        json.dumps(head | {"questions": questions} | changes)
    )
    if annotated != ():
        (folder / f"v2_mscoco_{subset}_annotations.json").write_text(json.dumps(head | {"annotations": annotations}))
    return folder


def test_vqa_is_read_as_downloaded(tmp_path):
    vqa(tmp_path)
    source = data.read_task("vqa", [tmp_path], "train", 8)
    file = str(tmp_path / "train2014" / "COCO_train2014_000000000012.jpg")
    assert source[1] == data.Question(file, "What is 2?", 2, ["two"] * 10, "2", "number")
    assert len(source) == 3 and source.image(0).size == (8, 8) and source.corpus()[0] == "What is 1?"
    with pytest.raises(data.Absent, match="v2_OpenEnded_mscoco_val2014_questions.json: no such file"):
        data.read_task("vqa", [tmp_path], "val", 8)
    vqa(tmp_path, "test2015", ids=(4, 5), annotated=())
    assert data.read_task("vqa", [tmp_path], "test", 8)[0].answers is None
    (tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json").rename(
        tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    )
    assert data.read_task("vqa", [tmp_path], "test-dev", 8)[1].image.endswith("test2015/COCO_test2015_000000000015.jpg")


def test_trainval_and_minival_share_no_image_and_lose_none(tmp_path):
    vqa(tmp_path)
    vqa(tmp_path, "val2014", ids=range(100, 400))
    most, few = (data.read_task("vqa", [tmp_path], split, 8) for split in ("trainval", "minival"))
    assert len(most) + len(few) == 303 and 0 < len(few) < 20
    assert {most[i].image for i in range(len(most))}.isdisjoint(few[i].image for i in range(len(few)))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"questions": [{"question": "What?", "question_id": 1}]}, "questions 0: needs image_id"),
        ({"questions": [{"image_id": "x", "question": "What?", "question_id": 1}]}, "questions 0: needs image_id"),
        ({"questions": [{"image_id": 11, "question": 5, "question_id": 1}]}, "question must be a text"),
        ({"questions": 5}, 'no list of "questions"'),
        ({"ids": (1, 2, 2)}, "question_id 2 comes twice"),
        ({"annotated": (1, 2)}, "no answers to question 3 of v2_OpenEnded.*another split"),
        ({"annotated": (1, 2, 3, 9)}, "answers to question 9, which v2_OpenEnded.* lacks: .*another split"),
    ],
)
def test_vqa_files_that_do_not_fit_are_refused(changes, says, tmp_path):
    vqa(tmp_path, **changes)
    with pytest.raises(data.DataError, match=says):
        data.read_task("vqa", [tmp_path], "train", 8)


def test_a_question_without_its_image_is_refused(tmp_path):
    vqa(tmp_path)
    (tmp_path / "train2014" / "COCO_train2014_000000000012.jpg").unlink()
    with pytest.raises(data.DataError, match="1 of the 3 images of split train are missing: .*000000000012.jpg"):
        data.read_task("vqa", [tmp_path], "train", 8)


def nlvr2(folder, split="dev", name="dev.json", **changes):
    """Two statements on one set of images each, in the release's schema and layout."""
    lines = []
    for pair in range(2):
        entry = {
            "identifier": f"{split}-5-{pair}-0",
            "sentence": "Both are red.",
            "label": str(pair == 0),
            "synset": "dog",
        }
        within = folder / split
        if split == "train":
            entry["directory"] = 42
            within = within / "42"
        for side, color in enumerate(("red", "blue")):
            picture(within / f"{split}-5-{pair}-img{side}.png", color)
        lines.append(json.dumps({key: value for key, value in (entry | changes).items() if value is not None}))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def test_nlvr2_is_read_in_the_layout_of_its_release(tmp_path):
    nlvr2(tmp_path, "train", "nlvr2/data/train.json")
    nlvr2(tmp_path, "dev", "data/dev.json")
    nlvr2(tmp_path, "test1", "test1.json")
    train = data.read_task("nlvr2", [tmp_path], "train", 8)
    assert train[1].image == [str(tmp_path / "train" / "42" / f"train-5-1-img{side}.png") for side in (0, 1)]
    assert train[1][1:] == ("Both are red.", "train-5-1-0", False)
    for split, name in (("val", "dev"), ("test", "test1")):
        source = data.read_task("nlvr2", [tmp_path], split, 8)
        left, right = source.image(0)
        assert (
            source[0].id == f"{name}-5-0-0"
            and source[0].label
            and left.getpixel((0, 0))[0] > 200 > right.getpixel((0, 0))[0]
        )


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"label": None}, 'dev.json, line 1: dev-5-0-0 has no label "True" or "False"'),
        ({"label": True}, "no label"),
        ({"identifier": "dev-5-0-0"}, "line 2: identifier dev-5-0-0 comes twice"),
        ({"identifier": "dev5"}, "line 1: needs an identifier"),
        ({"sentence": None}, "line 1: needs an identifier"),
        ({"identifier": "dev-6-0-0", "sentence": ""}, "comes twice"),
    ],
)
def test_nlvr2_files_that_do_not_fit_are_refused(changes, says, tmp_path):
    nlvr2(tmp_path, **changes)
    with pytest.raises(data.DataError, match=says):
        data.read_task("nlvr2", [tmp_path], "val", 8)


def test_the_real_sentences_of_nlvr2_fit_generated_pictures(shared, tmp_path):
    for name, split, count in (("dev", "val", 1500), ("test1", "test", 500)):
        lines = (shared / "data" / "nlvr2" / f"{name}.json").read_text()
        (tmp_path / f"{name}.json").write_text(lines)
        (tmp_path / name).mkdir()
        for entry in map(json.loads, lines.splitlines()):
            for side in (0, 1):
                path = tmp_path / name / f"{entry['identifier'].rsplit('-', 1)[0]}-img{side}.png"
                if not path.exists():
                    Image.new("RGB", (2, 2)).save(path)
        source = data.read_task("nlvr2", [tmp_path], split, 8)
        assert len(source) == count and all(
            size == (2, 2) for size in (image.size for image in source.image(count - 1))
        )


def test_a_folder_a_class(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            picture(tmp_path / split / name / "1.png")
    source = data.read_task("classify", [tmp_path], "val", 8)
    assert [source[i].label for i in range(len(source))] == ["cat", "dog"]
    with pytest.raises(data.Absent, match="split test is empty"):
        data.read_task("classify", [tmp_path], "test", 8)
    with pytest.raises(data.DataError, match="takes one folder"):
        data.read_task("classify", [tmp_path, tmp_path], "val", 8)
    for task in ("vqa", "nlvr2"):
        for folders in (["shapes"], [tmp_path]):
            with pytest.raises(data.Absent, match="there is no split valid, but train, val"):
                data.read_task(task, folders, "valid", 8)


def test_examples_have_the_images_text_and_target_of_a_sample():
    words = data.Words(data.train_tokenizer(data.Shapes("train", 0).corpus(), 512), 24)
    source = data.ShapesStatements("train", 16)
    target = lambda statement: torch.tensor(int(statement.label))
    samples = data.Examples(source, words, target, 16, 0, "none", False)
    sample = samples[0, 5]
    assert sample["image"].shape == (2, 3, 16, 16) and sample["image"].dtype == torch.uint8
    assert torch.equal(sample["image"][1], data.to_tensor(source.image(5)[1])) and sample["target"] == int(
        source[5].label
    )
    assert torch.equal(sample["text"], words.encode(source[5].text)[0])
    pictures = data.Examples(
        data.ShapesClasses("train", 16), None, lambda picture: torch.tensor(0), 16, 0, "crop", True
    )
    assert pictures[0, 1].keys() == {"image", "target", "unreadable"} and pictures[0, 1]["image"].shape == (3, 16, 16)


# ---- Samples and their order -----------------------------------------------------------------------------------------


def pairs(words, source=None, **options):
    return data.Pairs(source or data.Shapes("train", 16), words, 16, 0, options.get("augmentation", "none"), False)


def test_samples_are_a_function_of_seed_epoch_and_index(words):
    first, again = pairs(words, augmentation="randaugment"), pairs(words, augmentation="randaugment")
    equal = lambda a, b: all(torch.equal(a[name], b[name]) for name in a if name != "unreadable")
    assert equal(first[(0, 3)], again[(0, 3)])
    assert not equal(first[(0, 3)], first[(1, 3)]) and not equal(first[(0, 3)], first[(0, 4)])


def test_ids_tell_items_and_captions_apart(words):
    sample, later = pairs(words)[(0, 3)], [pairs(words)[(epoch, 3)] for epoch in range(20)]
    assert all(other["ids"][0] == sample["ids"][0] for other in later)
    assert len({int(other["ids"][1]) for other in later}) == 2  # the two ways to say it
    assert data.stable_hash("a") == 2340832890917691671  # the same in every run and process


def test_an_epoch_has_every_sample_once_whatever_the_number_of_processes():
    def stream(world, batches):
        orders = [iter(data.Order(10, 12 // world, rank, world, seed=3)) for rank in range(world)]
        return [sum((next(order) for order in orders), []) for _ in range(batches)]

    assert stream(1, 5) == stream(2, 5) == stream(3, 5)
    flat = sum(stream(1, 5), [])
    assert [epoch for epoch, _ in flat] == [k // 10 for k in range(60)]
    for epoch in range(6):
        assert sorted(index for e, index in flat if e == epoch) == list(range(10))
    assert flat[:10] != flat[10:20]
    assert list(zip(range(3), iter(data.Order(10, 12, 0, 1, 3, start=2)))) == list(enumerate(stream(1, 5)[2:5]))


def test_workers_change_nothing(words):
    batches = []
    for workers in (0, 2):
        order = data.Order(100, 4, 0, 1, seed=0)
        loader = iter(DataLoader(pairs(words), batch_sampler=order, num_workers=workers, collate_fn=data.collate))
        batches.append([next(loader) for _ in range(3)])
    for a, b in zip(*batches):
        assert all(torch.equal(a[name], b[name]) for name in a if name != "unreadable")


def test_an_unreadable_image_is_named_and_the_next_stands_in(words, tmp_path):
    picture(tmp_path / "good.png", "blue")
    good = (tmp_path / "good.png").read_bytes()
    broken = {"empty.png": b"", "text.png": b"hello", "cut.png": good[:40]}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    lines = [{"image": name, "captions": [name]} for name in [*broken, "good.png"]]
    source = data.read_sources([manifest(tmp_path, *lines)], "train", 8)
    sample = pairs(words, source)[(0, 0)]
    assert [line.split(" cannot be read")[0].split("/")[-1] for line in sample["unreadable"]] == list(broken)
    assert torch.equal(sample["text"], words.encode("good.png")[0]) and sample["image"].float().mean(
        (1, 2)
    ).tolist() == [0, 0, 255]
    assert data.collate([sample, sample])["unreadable"] == sample["unreadable"] * 2
    only = data.read_sources([manifest(tmp_path, *lines[:3])], "train", 8)
    sample = pairs(words, only)[(0, 0)]
    assert sample.keys() == {"unreadable"} and len(sample["unreadable"]) == data.IN_A_ROW
    assert data.collate([pairs(words)[(0, 0)], sample]).keys() == {"unreadable"}


def test_texts_are_cut_to_the_longest_rounded_up_to_8():
    lengths = lambda *n: torch.arange(20) < torch.tensor(n)[:, None]
    assert [data.cut(lengths(*n)) for n in [(2, 3), (8,), (9, 2), (17,), (20,)]] == [8, 8, 16, 20, 20]


# ---- Stages image and text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 2, 3, 4, 6, 14, 24])
def test_blockwise_masks_hide_their_share_in_blocks(side):
    rng, wanted = random.Random(0), -(-75 * side * side // 196)
    masks = torch.stack([data.mask_blocks(side, rng) for _ in range(1000)])
    assert masks.dtype == torch.bool and masks.shape == (1000, side * side)
    assert abs(masks.float().mean().item() - 75 / 196) < 0.02 and masks.sum(1).max() <= wanted
    assert masks.any(0).all() and masks.float().mean(0).max() < 0.85  # every patch at times, none always


def test_no_block_has_fewer_patches_than_asked(monkeypatch):
    """Every hidden patch lies in a hidden rectangle of at least 16 of 14 × 14 patches, 3 of 6 × 6."""
    for side, smallest in ((14, 16), (6, 3)):
        shapes = [(h, -(-smallest // h)) for h in range(1, side + 1) if -(-smallest // h) <= side]  # the least of them
        for seed in range(100):
            hidden = data.mask_blocks(side, random.Random(seed)).view(side, side).float()[None, None]
            covered = torch.zeros(side, side, dtype=torch.bool)
            for h, w in shapes:
                whole = torch.nn.functional.avg_pool2d(hidden, (h, w), stride=1)[0, 0] > 1 - 1e-6
                for y, x in whole.nonzero().tolist():
                    covered[y : y + h, x : x + w] = True
            assert torch.equal(covered, hidden[0, 0] > 0)


def test_an_image_folder_is_read_below_and_dealt_or_has_its_own_splits(tmp_path):
    for i in range(200):
        path = tmp_path / "dealt" / str(i % 7) / f"{i}.{'JPG' if i % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
    (tmp_path / "dealt" / "notes.txt").write_text("no image")
    read = lambda folder, split: data.read_sources([tmp_path / folder], split, 8, needed=False, captions=False)
    dealt = {split: read("dealt", split) for split in ("train", "val", "test")}
    paths = {split: [source[i].image for i in range(len(source))] for split, source in dealt.items()}
    assert sum(map(len, paths.values())) == len(set().union(*map(set, paths.values()))) == 200
    assert len(paths["train"]) > 180 and paths["test"] and paths["val"]
    assert dealt["train"][0].captions == [] and dealt["train"].image(3).size == (4, 4)
    for split in ("train", "val"):
        (tmp_path / "own" / split).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "own" / split / "a.png")
    assert [source and source[0].image[-11:] for source in (read("own", "train"), read("own", "test"))] == [
        "train/a.png",
        None,
    ]
    classes = tmp_path / "classes" / "train"  # a class that is called so, and no split
    classes.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(classes.parent / "a.png")
    name = os.fsdecode(b"\xff.png")  # a name that is no text
    Image.new("RGB", (4, 4)).save(classes / name, format="png")
    found = [read("classes", split) for split in ("train", "val", "test")]
    assert sum(len(source) for source in found if source) == 2
    pairs = manifest(tmp_path, "")  # a folder of pairs stays one, also where a split is missing
    assert pairs.exists() and data.read_sources([tmp_path], "test", 8, needed=False, captions=False) is None


def test_samples_of_images_follow_seed_epoch_and_index():
    images = lambda seed: data.Images(
        data.Shapes("train", 16), 16, seed, "crop", True, functools.partial(data.mask_blocks, 4)
    )
    first = images(0)[2, 5]
    assert first.keys() == {"image", "hidden", "unreadable"} and first["hidden"].shape == (16,)
    same = lambda a, b: torch.equal(a["image"], b["image"]) and torch.equal(a["hidden"], b["hidden"])
    assert same(first, images(0)[2, 5])
    assert not any(same(first, other) for other in (images(0)[3, 5], images(0)[2, 6], images(1)[2, 5]))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("one\ntwo \n\n", ["one", "two"]),
        ("one\nmore of it\n\n \ntwo\n", ["one more of it", "two"]),
        ("", []),
        ("\n\n", []),
        ("\n\none\ntwo", ["one", "two"]),
    ],
)
def test_documents_are_lines_or_stand_between_blank_lines(tmp_path, text, expected):
    (tmp_path / "a.txt").write_text(text)
    assert list(data.documents(tmp_path / "a.txt")) == expected


def test_documents_are_dealt_to_splits_by_their_text(tmp_path):
    lines = [f"document number {i}" for i in range(1000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("\n".join(reversed(lines)))

    def split(*names):
        dealt = list(data.read_documents(names))
        return [{text for split, text in dealt if split == name} for name in ("train", "val", "test")]

    assert split(tmp_path / "a.txt") == split(tmp_path / "b.txt") == split(tmp_path)
    train, val, test = split(tmp_path)
    assert train | val | test == set(lines) and len(train) + len(val) + len(test) == 1000
    assert 5 < len(val) < 50 and 5 < len(test) < 50


def test_text_is_packed_without_loss_and_masked_anew_each_epoch(words, tmp_path):
    texts = ["unbelievably large dogs", "", "red dogs", "a red circle " * 9]
    data.pack([("test", "red"), *(("train", text) for text in texts)], words, tmp_path)
    packed = data.Texts(tmp_path / "train", words, 0)
    assert len(data.Texts(tmp_path / "val", words, 0)) == 0 and len(data.Texts(tmp_path / "test", words, 0)) == 1
    stream = []
    for i in range(len(packed)):
        sample = packed[0, i]
        ids = torch.where(sample["labels"] == data.IGNORE, sample["masked"], sample["labels"])
        inside = ids[sample["mask"]].tolist()
        assert inside[0] == words.cls and inside[-1] == words.sep and (ids[~sample["mask"]] == words.pad).all()
        assert sample["mask"].all() or i == len(packed) - 1
        assert not set(sample["labels"].tolist()) & {words.cls, words.sep, words.pad}
        stream += inside[1:-1]
    encode = lambda text: words.tokenizer.encode(text, add_special_tokens=False).ids
    assert stream == [piece for text in texts if text for piece in (*encode(text), words.sep)]
    assert torch.equal(packed[0, 0]["masked"], packed[0, 0]["masked"])
    assert not torch.equal(packed[0, 0]["labels"], packed[1, 0]["labels"])


def test_a_piece_without_its_word_is_a_word(words):
    """Where packing cuts a word in two, its second half stands alone."""
    inner = words.tokenizer.token_to_id("##s")
    assert words.inner[inner] and words.words(words.frame([inner, inner])[0]) == [[1, 2]]
    ids, _ = words.frame([words.tokenizer.token_to_id("dog"), words.sep, inner])
    assert words.words(ids) == [[1], [3]]


def test_data_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    for captions, says in (
        (False, "a.txt: is a file; this stage takes images in a folder"),
        (True, "takes pairs in a"),
    ):
        with pytest.raises(data.DataError, match=says):
            data.read_sources([tmp_path / "a.txt"], "train", 8, captions=captions)
    with pytest.raises(data.DataError, match="has no captions"):
        data.read_sources([tmp_path], "train", 8)
    (tmp_path / "c").mkdir()
    with pytest.raises(data.DataError, match="no pictures in split train"):
        data.read_sources([tmp_path / "c"], "train", 8, captions=False)
    for name, says in (
        ("b.png", "plain text is wanted here"),
        ("c", r"no \*.txt below"),
        ("absent", "no such file or folder"),
    ):
        with pytest.raises(data.DataError, match=says):
            data.text_files([tmp_path / name])
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(data.DataError, match="d.txt: cannot be read as text"):
        list(data.documents(tmp_path / "d.txt"))
