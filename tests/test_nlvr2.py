"""NLVR2: accuracy and consistency by hand, and the published files."""

import json

import pytest
from conftest import refused
from files import nlvr2, picture, write_lines

import data
import nlvr2 as task
from nlvr2 import Statement


def test_a_sentence_is_consistent_if_it_is_judged_right_with_all_its_pairs():
    """Identifiers are split-set-pair-sentence."""
    right = {
        "dev-1-0-0": True, "dev-1-1-0": False, "dev-1-2-0": False,
        "dev-1-0-1": True, "dev-1-1-1": True, "dev-1-2-1": True,
        "dev-2-0-0": True,
        "test1-1-0-1": False,
    }  # fmt: skip
    labels = [True, False] * 4
    statements = [Statement(None, "s", id, label) for id, label in zip(right, labels)]
    predicted = [label == correct for label, correct in zip(labels, right.values())]
    results = task.accuracies(predicted, statements)
    assert results == pytest.approx({"accuracy": 100 * 5 / 8, "consistency": 100 * 2 / 4})


def test_files_are_read_in_the_layout_of_the_release(tmp_path):
    nlvr2(tmp_path, "train", "nlvr2/data/train.json")
    nlvr2(tmp_path, "dev", "data/dev.json")
    nlvr2(tmp_path, "test1", "test1.json")
    train = task.read([tmp_path], "train", 8)
    files = [str(tmp_path / "train" / "42" / f"train-5-1-img{side}.png") for side in (0, 1)]
    assert train[1] == (files, "Both are red.", "train-5-1-0", False)
    for split, name in (("val", "dev"), ("test", "test1")):
        source = task.read([tmp_path], split, 8)
        left, right = source.image(0)
        assert source[0].id == f"{name}-5-0-0" and source[0].label
        assert left.getpixel((0, 0))[0] > 200 > right.getpixel((0, 0))[0]
    for folders in (["shapes"], [tmp_path]):
        refused(task.read, folders, "valid", 8, error=data.Absent)


def test_a_manifest_of_own_statements(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    lines = []
    for sentence, label in (("Both are red.", True), ("One is blue.", False), ("Both are red.", False)):
        lines.append({"images": ["a.png", "b.png"], "sentence": sentence, "label": label})
    write_lines(tmp_path / "train.jsonl", *lines)
    source = task.read([tmp_path], "train", 8)
    files = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert source[1][:2] == (files, "One is blue.") and not source[1].label
    statements = [source[i] for i in range(3)]
    assert len({statement.id for statement in statements}) == 3
    found = task.accuracies([1, 0, 1], statements)  # wrong once, in the sentence with two pairs
    assert found == pytest.approx({"accuracy": 200 / 3, "consistency": 50})


def test_the_real_sentences_fit_generated_pictures(shared, tmp_path):
    lines = (shared / "data/nlvr2/dev.json").read_text()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev.json").write_text(lines)
    for entry in map(json.loads, lines.splitlines()):
        pair = entry["identifier"].rsplit("-", 1)[0]
        for side in (0, 1):  # only their names are looked at
            (tmp_path / f"dev/{pair}-img{side}.png").touch()
    assert len(task.read([tmp_path], "val", 8)) == 1500


def test_the_world_has_four_pairs_of_images_per_statement():
    source = task.WorldStatements("test", 32, count=50)
    assert len(source) == 200 and source[6].id == "test-1-2-0"
    results = task.accuracies([True] * 200, [source[i] for i in range(200)])
    assert results == {"accuracy": 50, "consistency": 0}
