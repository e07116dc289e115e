"""Manifests, Karpathy's files and folders of images, as they lie on disk."""

import json
import os
from types import SimpleNamespace

import pytest
from PIL import Image

import data
import sources
from runtime import UserError


def pairs(folder, *splits):
    """{split: source} of pictures with captions."""
    args = SimpleNamespace(data=[folder], splits=splits or ["train"])
    return sources.read_pairs(args, 8)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def manifest(folder, *lines, split="train"):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / f"{split}.jsonl").write_text("\n".join(texts))


GOOD = {"image": "a.png", "captions": ["x"]}


def test_manifest(tmp_path):
    picture(tmp_path / "a.png")
    strange = json.dumps(GOOD | {"captions": ["é\u2028\x85"], "item": None}, ensure_ascii=False)
    manifest(tmp_path, GOOD | {"captions": ["one", ""], "item": 7}, "", strange)
    source, file = pairs(tmp_path)["train"], str(tmp_path / "a.png")
    assert source[0] == data.Picture(file, ["one", ""], "7")
    assert source[1] == data.Picture(file, ["é\u2028\x85"], file)
    assert len(source) == 2 and source.by_text and source.image(1).size == (8, 8)
    assert source.count_captions() == 3 and source.corpus() == ["one", "", "é\u2028\x85"]


def test_a_wrong_line_of_a_manifest_is_named(tmp_path):
    captions = (None, "x", [], ["x", 5], ["\ud800"])
    wrong = [GOOD | {"captions": value} for value in captions]
    for line in (*wrong, GOOD | {"item": ["y"]}, GOOD | {"image": 5}, [1], "{"):
        manifest(tmp_path, GOOD, line)
        with pytest.raises(UserError, match="train.jsonl, line 2"):
            pairs(tmp_path)


def test_missing_images_are_counted_and_the_first_named(tmp_path):
    picture(tmp_path / "a.png")
    manifest(tmp_path, GOOD, *(GOOD | {"image": f"sub/{i}.png"} for i in range(7)))
    with pytest.raises(UserError, match="7 of the 8 images .*sub/0.png, .*sub/4.png, …"):
        pairs(tmp_path)


def test_training_needs_every_folder_and_other_splits_those_that_have_them(tmp_path):
    for name, splits in {"a": ["train", "val"], "b": ["train"], "c": ["val"], "d": []}.items():
        picture(tmp_path / name / "a.png")
        for split in splits:
            manifest(tmp_path / name, GOOD, split=split)
    a, b, c, d = [tmp_path / name for name in "abcd"]
    read = lambda split, *folders: sources.pictures(folders, split, 8, captions=True)
    assert len(read("train", a, b)) == 2 and len(read("val", a, b)) == 1
    for folders in ([a, c], [d]):
        with pytest.raises(data.Absent):
            read("train", *folders)
    manifest(d, "")
    for folder, error in [(d, data.Absent), (d / "a.png", UserError), (d / "absent", UserError)]:
        with pytest.raises(error):
            pairs(folder)


def karpathy(folder, name, *images):
    (folder / f"dataset_{name}.json").write_text(json.dumps({"dataset": name, "images": images}))


def entry(name, split, *captions, **more):
    sentences = [{"raw": text, "tokens": text.split(), "sentid": 0} for text in captions]
    return {"filename": name, "split": split, "sentences": sentences} | more


def test_karpathys_coco_and_flickr30k(tmp_path):
    coco, flickr = tmp_path / "coco", tmp_path / "flickr"
    for file in ("coco/val2014/a.jpg", "coco/train2014/b.jpg", "flickr/flickr30k-images/c.jpg"):
        picture(tmp_path / file)
    first = entry("a.jpg", "restval", "A dog.", "Dog", filepath="val2014")
    second = entry("b.jpg", "train", "A cat.", filepath="train2014")
    karpathy(coco, "coco", first, second, entry("a.jpg", "test", "A test.", filepath="val2014"))
    karpathy(flickr, "flickr30k", entry("c.jpg", "train", "A bird."))
    source = sources.pictures([coco, flickr], "train", 8, captions=True)
    captions = [source[i].captions for i in range(len(source))]
    assert captions == [["A dog.", "Dog"], ["A cat."], ["A bird."]]
    assert source[0].image == str(coco / "val2014" / "a.jpg") and source.image(2).size == (8, 8)
    assert not source.by_text  # its protocol: a caption is right only for its own picture
    assert len(pairs(coco, "test")["test"]) == 1


def test_a_malformed_record_is_one_line_with_its_file_and_number(tmp_path):
    good = entry("a.jpg", "train", "A dog.")
    wrong = [good | {"sentences": value} for value in (None, [], [{"tokens": []}], [{"raw": 5}])]
    for record in (*wrong, good | {"filename": 5}, {"filename": "a.jpg"}, ["a.jpg"], None):
        karpathy(tmp_path, "coco", good, record)
        with pytest.raises(UserError, match=r"^.*dataset_coco\.json, images 1\b.*$"):
            pairs(tmp_path)
    for content in (b"{", b"[]", b"{}", b'{"images": 5}', b"\xff"):
        (tmp_path / "dataset_coco.json").write_bytes(content)
        with pytest.raises(UserError, match="^.*dataset_coco.json.*$"):
            pairs(tmp_path)


def images(folder):
    """{split: paths of its images}."""
    args = SimpleNamespace(data=[folder], splits=data.SPLITS)
    found = sources.read_pictures(args, 8)
    return {split: [source[i].image for i in range(len(source))] for split, source in found.items()}


def test_an_image_folder_is_read_below_and_split_by_a_hash(tmp_path):
    for i in range(200):
        picture(tmp_path / str(i % 7) / f"{i}.{'JPG' if i % 2 else 'png'}")
    (tmp_path / "notes.txt").write_text("no image")
    picture(tmp_path / "train" / "a.png")  # a class of this name, not a split
    os.rename(tmp_path / "train" / "a.png", os.fsencode(tmp_path / "train") + b"/\xff.png")
    found = images(tmp_path)
    assert len(found["train"]) > 180 and found["val"] and found["test"]
    assert len(sum(found.values(), [])) == len(set().union(*found.values())) == 201
    source = sources.pictures([tmp_path], "train", 8)
    assert source[0] == data.Picture(found["train"][0], [], found["train"][0])
    assert source.image(3).size == (8, 8)


def test_an_image_folder_may_have_splits(tmp_path):
    paths = {split: [str(tmp_path / split / "a.png")] for split in ("train", "val")}
    for split in paths:
        picture(tmp_path / split / "a.png")
    assert images(tmp_path) == paths
    manifest(tmp_path, GOOD | {"image": "val/a.png"})  # then it is a folder of pairs
    assert images(tmp_path) == {"train": paths["val"]}
