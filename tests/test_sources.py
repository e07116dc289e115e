"""Manifests, Karpathy's files and folders of images, as they lie on disk; wrong records of all kinds."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from conftest import refused
from files import entry, karpathy, nlvr2, picture, records, vqa, write_lines

import data
import nlvr2 as statements
import reading
import sources
import vqa as questions


def options(folder, splits, exclude=None):
    return SimpleNamespace(data=[folder], splits=splits, exclude=exclude)


def manifest(folder, *lines, split="train"):
    write_lines(folder / f"{split}.jsonl", *lines)


GOOD = {"image": "a.png", "captions": ["x"]}


def test_manifest_and_a_link_that_leads_out_of_its_folder(tmp_path):
    folder = tmp_path / "pairs"
    picture(tmp_path / "a.png")
    strange = json.dumps(GOOD | {"captions": ["é\u2028\x85"], "item": None}, ensure_ascii=False)
    manifest(folder, GOOD | {"captions": ["one", ""], "item": 7}, "", strange)
    (folder / "a.png").symlink_to(tmp_path / "a.png")
    source, file = sources.pictures([folder], "train", 8, captions=True), str(folder / "a.png")
    first = data.Picture(file, ["one"], f"{folder}/7")  # another folder has its own
    assert records(source) == [first, data.Picture(file, ["é\u2028\x85"], file)]
    assert source.by_text and source.image(1).size == (8, 8)
    assert source.caption_ends().tolist() == [1, 2]
    assert list(source.corpus()) == ["one", "é\u2028\x85"]


def test_training_needs_every_folder_and_other_splits_those_that_have_them(tmp_path):
    both, train, none = folders = [tmp_path / name for name in ("both", "train", "none")]
    for folder in folders:
        picture(folder / "a.png")
    manifest(both, GOOD, split="val")
    manifest(both, GOOD)
    manifest(train, GOOD)
    read = lambda split, *folders: sources.pictures(folders, split, 8, captions=True)
    assert len(read("train", both, train)) == 2 and len(read("val", both, train)) == 1
    for split, *folders in [("train", both, none), ("train", none), ("val", train), ("valid", both)]:
        refused(read, split, *folders, error=data.Absent)
    for folder in (none / "a.png", tmp_path / "absent"):
        refused(read, "train", folder)


def test_excluded_pictures_are_left_out_of_training_only(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    for split in ("train", "test"):
        manifest(tmp_path, *(GOOD | {"image": f"{name}.png"} for name in "abc"), split=split)
    names = tmp_path / "names.txt"
    names.write_text("\ufeffb.png\nother.png\n")
    found = sources.read_pictures(options(tmp_path, ["train", "test"], names), 8)
    left = [os.path.basename(record.image) for record in records(found["train"])]
    assert left == ["a.png", "c.png"] and len(found["test"]) == 3
    for useless in ("other.png", "a.png\nb.png\nc.png", ""):
        names.write_text(useless)
        refused(sources.read_pictures, options(tmp_path, ["train"], names), 8)


def test_karpathys_coco_and_flickr30k(tmp_path):
    coco, flickr = tmp_path / "coco", tmp_path / "flickr"
    for file in ("coco/val2014/a.jpg", "coco/train2014/b.jpg", "flickr/flickr30k-images/c.jpg"):
        picture(tmp_path / file)
    first = entry("a.jpg", "restval", "A dog.", "Dog", filepath="val2014")
    second = entry("b.jpg", "train", "A cat.", filepath="train2014")
    karpathy(coco, first, second, entry("a.jpg", "test", "A test.", filepath="val2014"))
    karpathy(flickr, entry("c.jpg", "train", "A bird."), name="flickr30k")
    source = sources.pictures([coco, flickr], "train", 8, captions=True)
    captions = [record.captions for record in records(source)]
    assert captions == [["A dog.", "Dog"], ["A cat."], ["A bird."]]
    assert source[0].image == str(coco / "val2014" / "a.jpg") and source.image(2).size == (8, 8)
    assert not source.by_text  # its protocol: a caption is right only for its own picture
    assert len(sources.pictures([coco], "test", 8, captions=True)) == 1


def images(folder):
    """{split: paths of its images}."""
    found = sources.read_pictures(options(folder, data.SPLITS), 8)
    return {split: [record.image for record in records(source)] for split, source in found.items()}


def test_folders_of_splits_are_two_or_the_only_one(tmp_path):
    picture(tmp_path / "a.png")
    assert not sources.has_split_folders(tmp_path) and not sources.has_split_folders("shapes")
    for name, found in (("val", True), ("cat", False), ("test", True)):  # also next to others
        picture(tmp_path / name / "b.png")
        assert sources.has_split_folders(tmp_path) == found
    assert images(tmp_path / "cat").keys() == {"train"}
    for name in ("Train", "validation"):
        picture(tmp_path / name / "b.png")
        refused(sources.has_split_folders, tmp_path, says=f"{name}: folders of splits are")
        assert len(sources.folder_of_images(tmp_path, 8)) == 5  # which needs no splits
        shutil.rmtree(tmp_path / name)
    picture(tmp_path / "one" / "Train" / "b.png")
    assert not sources.has_split_folders(tmp_path / "one")


def test_hidden_files_and_folders_are_no_data(tmp_path):
    for name in ("a.png", "._a.png", ".cache/a.png", "@eaDir/a.png", "cat/b.png", "val/c.png", ".git/c.png"):
        picture(tmp_path / name)
    found = [os.path.relpath(path, tmp_path) for path in reading.files_below(tmp_path, (".png",))]
    assert found == ["a.png", "cat/b.png", "val/c.png"]
    shutil.rmtree(tmp_path / "cat")
    assert sources.has_split_folders(tmp_path)


def test_a_picture_on_several_lines_is_one_but_in_training(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    lines = [{"image": f"{name}.png", "captions": [f"{name} {k}", " "]} for k in (1, 2) for name in "ab"]
    for split in ("train", "test"):
        manifest(tmp_path, *lines, split=split)
    one, several = (records(sources.pictures([tmp_path], split, 8, captions=True)) for split in ("test", "train"))
    assert [record.captions for record in one] == [["a 1", "a 2"], ["b 1", "b 2"]]
    assert [record.captions for record in several] == [["a 1"], ["b 1"], ["a 2"], ["b 2"]]


def test_a_link_that_leads_back_repeats_nothing(tmp_path):
    picture(tmp_path / "a/x.png")
    for name in ("p", "q"):
        (tmp_path / "a" / name).symlink_to(tmp_path)
    assert list(reading.files_below(tmp_path, (".png",))) == [str(tmp_path / "a/x.png")]


def test_an_image_folder_is_split_by_a_hash_or_by_folders(tmp_path):
    mixed, sorted_ = tmp_path / "mixed", tmp_path / "sorted"
    for i in range(200):
        picture(mixed / str(i % 7) / f"{i}.{'JPG' if i % 2 else 'png'}")
    (mixed / "notes.txt").write_text("no image")
    picture(mixed / "train" / "a.png")  # a class of this name, not a split
    os.rename(mixed / "train" / "a.png", os.fsencode(mixed / "train") + b"/\xff.png")
    found = images(mixed)
    assert len(found["train"]) > 180 and found["val"] and found["test"]
    assert len(sum(found.values(), [])) == len(set().union(*found.values())) == 201

    paths = {split: [str(sorted_ / split / "a.png")] for split in ("train", "val")}
    for split in paths:
        picture(sorted_ / split / "a.png")
    assert images(sorted_) == paths
    manifest(sorted_, GOOD | {"image": "val/a.png"})  # then it is a folder of pairs
    assert images(sorted_) == {"train": paths["val"]}


# ---- Wrong records -------------------------------------------------------------------------------

PERSON = entry("a.png", "train", "A dog.")  # in Karpathy's file
QUESTION = {"image": "a.png", "question": "What?", "answers": ["a"]}
STATEMENT = {"images": ["a.png", "a.png"], "sentence": "Red.", "label": True}
RECORDS = {  # what writes and reads a file, a good record, values that make it a wrong one by their key
    "pairs": (manifest, sources.pictures, GOOD, {
        "captions": [None, "x", [], [" "], ["x", 5], ["\ud800"]], "image": [5, "b.png", "../a.png"],
    }),
    "Karpathy's": (karpathy, sources.pictures, PERSON, {
        "sentences": [None, [], [{"tokens": []}], [{"raw": 5}]], "filename": [5, "../a.png"],
    }),
    "questions": (manifest, questions.read, QUESTION, {
        "answers": [[], "yes", [1], None], "image": [None, "b.png", "../a.png"], "question": [5, "\ud83d"],
    }),
    "statements": (manifest, statements.read, STATEMENT, {
        "images": [["a.png"], ["a.png", 5], ["a.png", "../a.png"], ["a.png", "b.png"]], "label": ["True"],
        "sentence": [None, "\ud83d"],
    }),
}  # fmt: skip


@pytest.mark.parametrize("write, read, good, changes", RECORDS.values(), ids=RECORDS)
def test_a_wrong_record_next_to_a_good_one_is_refused(write, read, good, changes, tmp_path):
    folder = tmp_path / "data"
    for place in (folder, tmp_path):  # those outside of the folder are wrong, too
        picture(place / "a.png")
    wrong = [[1], None, "{", {"image": "a.png", "filename": "a.png"}]
    for key, values in changes.items():
        wrong += [good | {key: value} for value in values]
    for record in wrong:
        write(folder, good, record)
        refused(read, [folder], "train", 8, says="line 2|images 1|b.png")


OFFICIAL = {
    vqa: [
        {"questions": [{"question": "What?", "question_id": 1}]},  # no image
        {"questions": [{"image_id": 99, "question": "What?", "question_id": 1}]},  # which is not there
        {"questions": [{"image_id": 11, "question": 5, "question_id": 1}]},
        {"annotations": [{"question_id": 1}]},
        {"ids": (1, 2), "annotated": (1,)},  # the two files are of different splits
    ],
    nlvr2: [
        {"label": None},
        {"identifier": "dev5"},
        {"sentence": None},
        {"directory": 43},  # without the images
    ],
}


def test_official_files_that_do_not_fit_are_refused(tmp_path):
    for number, changes in enumerate(OFFICIAL[vqa]):
        folder = vqa(tmp_path / f"vqa {number}", **{"ids": (1,)} | changes)
        refused(questions.read, [folder], "train", 8)
    for number, changes in enumerate(OFFICIAL[nlvr2]):
        folder = nlvr2(tmp_path / f"nlvr2 {number}", **changes)
        refused(statements.read, [folder], "val", 8)


# ---- Tables, text files, splits ------------------------------------------------------------------


def named(folder, split="train", captions=True):
    """[(name of the image, captions), …]."""
    source = sources.pictures([folder], split, 8, captions)
    return [(os.path.basename(record.image), record.captions) for record in records(source)]


def test_tables_with_two_named_columns(tmp_path, capsys):
    for name in "ab":
        picture(tmp_path / f"images/{name}.png")
    rows = 'n,title,filepath\r\n1,"a, ""b""\nc",images/a.png\r\n\r\n2,é,images/a.png\r\n'
    rows += "3,,images/b.png\r\n4,d,images/a.png"
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    assert named(tmp_path) == [("a.png", ['a, "b"\nc', "é"]), ("a.png", ["d"])]
    assert "1 of 3 samples are left out, they lack a caption" in capsys.readouterr().err
    (tmp_path / "val.tsv").write_text("image\tcaption\nimages/b.png\tone, two\n")
    (tmp_path / "test.csv").write_text("filepath\ttitle\nimages/b.png\tone, two\n")  # open_clip's
    assert named(tmp_path, "val") == named(tmp_path, "test") == [("b.png", ["one, two"])]
    manifest(tmp_path, GOOD | {"image": "images/a.png"})  # a manifest goes first
    assert named(tmp_path) == [("a.png", ["x"])]


def test_a_wrong_table_is_refused_by_file_and_row(tmp_path):
    picture(tmp_path / "a.png")
    for content, wrong in [
        (b"filepath,title\na.png,x\na.png\n", "line 3"),
        (b"filepath,title\na.png,x\n\na.png,x,y\n", "line 4"),
        (b"filepath,title\na.png,\xff\n", "line 2"),
        (b'filepath,title\na.png,x\na.png,"x\n', "line 3"),
        (b"filepath,title\n../a.png,x\n", "line 2"),
        (b"filepath,url\na.png,x\n", "title"),
    ]:
        (tmp_path / "train.csv").write_bytes(content)
        refused(named, tmp_path, says=wrong)


def test_texts_next_to_images_are_captions(tmp_path, capsys):
    for name in "abc":
        picture(tmp_path / f"train/{name}.jpg")
    (tmp_path / "val").mkdir()
    refused(named, tmp_path, error=data.Absent)  # images only
    (tmp_path / "train/a.txt").write_text("one\n\n two \n")
    (tmp_path / "train/b.txt").write_text("\n")
    assert named(tmp_path) == [("a.jpg", ["one", "two"])]
    assert "2 of 3" in capsys.readouterr().err
    assert named(tmp_path, captions=False) == [(f"{name}.jpg", []) for name in "abc"]
    (tmp_path / "train/b.txt").write_bytes(b"\xff")
    refused(named, tmp_path, says="b.txt, line 1")


def test_missing_images_are_named_up_to_five(tmp_path):
    picture(tmp_path / "a.png")
    lines = [GOOD | {"image": f"{k % 20}.png"} for k in range(30)]
    manifest(tmp_path, GOOD, *lines)
    refused(named, tmp_path, says=r"20 images .*/0.png, .*/4.png, …")
