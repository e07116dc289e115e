"""Tokens, masks, augmentation, data sets on disk, the built-in world, the order of samples."""

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
    captions = [caption for i in range(300) for caption in data.Shapes("train", 32).captions(i)]
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
        and source.captions(0) == ["one", ""]
        and source.item(0) == "7"
        and source.captions(1) == ["é\u2028\x85"]
    )
    assert source.item(1) == source.path(1) == str(tmp_path / "a.png") and source.image(1).size == (8, 8)
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
    assert [source.captions(i) for i in range(len(source))] == [["A dog.", "Dog"], ["A cat."], ["A bird."]]
    assert source.path(0) == str(coco / "val2014" / "a.jpg") and source.image(2).size == (8, 8)
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
        meanings[split] = {source.item(i) for i in range(2000)}
        captions[split] = {caption for i in range(2000) for caption in source.captions(i)}
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
    assert first.captions(7) == again.captions(7) and first.image(7).tobytes() == again.image(7).tobytes()
    assert [first.captions(i) for i in range(5)] != [other.captions(i) for i in range(5)]


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
    assert [line.split(" (")[0].split("/")[-1] for line in sample["unreadable"]] == list(broken)
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
    paths = {split: [source.path(i) for i in range(len(source))] for split, source in dealt.items()}
    assert sum(map(len, paths.values())) == len(set().union(*map(set, paths.values()))) == 200
    assert len(paths["train"]) > 180 and paths["test"] and paths["val"]
    assert dealt["train"].captions(0) == [] and dealt["train"].image(3).size == (4, 4)
    for split in ("train", "val"):
        (tmp_path / "own" / split).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "own" / split / "a.png")
    assert [source and source.path(0)[-11:] for source in (read("own", "train"), read("own", "test"))] == [
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
    images = lambda seed: data.Images(data.Shapes("train", 16), 16, seed, "crop", True, 4)
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
    for name, says in (("b.png", "takes plain text"), ("c", r"no \*.txt below"), ("absent", "no such file or folder")):
        with pytest.raises(data.DataError, match=says):
            data.text_files([tmp_path / name])
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(data.DataError, match="d.txt: cannot be read as text"):
        list(data.documents(tmp_path / "d.txt"))
