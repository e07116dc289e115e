"""Shards of img2dataset and WebDataset."""

import json
import os
import tarfile

import pytest
from conftest import refused
from files import png, records, write_shard

import data
import images
import retrieval
import shards
import sources


def samples(count, start=0):
    """Members of samples as img2dataset writes them; the level of an image is its number."""
    members = {}
    for i in range(start, start + count):
        members |= {f"{i:09d}.png": png(i), f"{i:09d}.txt": f"picture {i}".encode()}
        members[f"{i:09d}.json"] = json.dumps({"caption": f"picture {i}"}).encode()
    return members


def source_of(folder, split="train"):
    return sources.pictures([folder], split, 8, captions=True)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_shard_s_images_are_read_where_they_are(tmp_path, form):
    path = tmp_path / "train/00000.tar"
    folder = "é" * 40 if form == tarfile.USTAR_FORMAT else "é" * 120  # a long name has headers of its own
    other = {f"{folder}/x.PNG": png(77), f"{folder}/x.json": b'{"caption": "77"}'}
    write_shard(path, samples(3) | other | {"z.png": png(9), "z.txt": b"\xef\xbb\xbfone\ntwo"}, form)
    (tmp_path / "val").mkdir()
    source = source_of(tmp_path)
    found = records(source)
    captions = [caption for record in found for caption in record.captions]
    assert captions == ["picture 0", "picture 1", "picture 2", "77", "one\ntwo"]
    assert [source.image(i).getpixel((3, 3))[0] for i in range(5)] == [0, 1, 2, 77, 9]
    assert found[1].image == found[1].item == f"{path}/000000001.png"
    assert found[3].image == f"{path}/{folder}/x.PNG"
    refused(source_of, tmp_path, "val", error=data.Absent)


def test_shards_without_folders_are_split_by_a_hash_of_the_key(tmp_path):
    write_shard(tmp_path / "b.tar", samples(100, start=100))
    write_shard(tmp_path / "a.tar", samples(100))
    found = {split: records(source_of(tmp_path, split)) for split in data.SPLITS}
    numbers = [int(os.path.basename(record.image)[:9]) for record in sum(found.values(), [])]
    assert sorted(numbers) == list(range(200)) and len(found["train"]) > 180
    assert found["val"] and found["test"]
    train = [record.image for record in found["train"]]
    assert train == sorted(train)
    assert len(sources.folder_of_images(tmp_path, 8)) == 200

    stamps = [retrieval.stamp_of_image(record) for record in found["val"]]
    os.utime(tmp_path / "a.tar", (1, 1))
    os.utime(tmp_path / "b.tar", (1, 1))
    assert len(set(stamps + [retrieval.stamp_of_image(record) for record in found["val"]])) == 2 * len(stamps)


def test_samples_without_image_or_caption_are_counted_once(tmp_path, capsys):
    members = {"a.txt": b"a", "b.png": png(1), "c.png": png(2), "c.txt": b"\n", "d.json": b"{}"}
    members |= {"e.png": png(3), "e.json": b'{"caption": " "}', "f.png": png(4), "f.txt": b"f", "f.seg.png": png(5)}
    write_shard(tmp_path / "0.tar", members)
    found = shards.read_shard(str(tmp_path / "0.tar"), captions=True)
    assert [record.captions for record in found] == [["f"]]
    [line] = capsys.readouterr().err.splitlines()
    assert "0.tar: 5 of 6 samples" in line
    assert len(shards.read_shard(str(tmp_path / "0.tar"))) == 4


def test_a_shard_that_is_cut_is_refused_wherever_it_is_cut(tmp_path):
    path = tmp_path / "0.tar"
    write_shard(path, samples(2))
    whole = path.read_bytes().rstrip(b"\0")
    ends = -(-len(whole) // 512) * 512  # of the last member
    for end in range(0, ends + 512, 64):
        path.write_bytes(whole.ljust(end, b"\0")[:end])
        refused(shards.read_shard, str(path), says="0.tar")
    path.write_bytes(whole.ljust(ends + 512, b"\0"))
    assert len(shards.read_shard(str(path))) == 2


def test_a_caption_that_is_wrong_is_refused(tmp_path):
    wrong = [{"a.json": content} for content in (b"{", b"[]", b'{"caption": 5}', b'{"caption": "\\ud83d"}')]
    for members in (*wrong, {"a.txt": b"\xff"}):
        write_shard(tmp_path / "0.tar", samples(1) | members)
        refused(shards.read_shard, str(tmp_path / "0.tar"), says="0.tar, member a")


def test_a_broken_image_in_a_shard_is_unreadable_and_named(tmp_path):
    write_shard(tmp_path / "train/0.tar", {"a.png": png(1)[:40], "a.txt": b"a"})
    (tmp_path / "val").mkdir()
    source = source_of(tmp_path)
    refused(source.image, 0, error=images.Unreadable, says="0.tar/a.png")
    os.remove(tmp_path / "train/0.tar")
    refused(source.image, 0, error=images.Unreadable)
