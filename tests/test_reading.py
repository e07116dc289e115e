"""Official JSON files, paths in records."""

import json

from conftest import refused

import reading

CONTENT = {"first": {"images": [1]}, "images": [1.5, "é€😀", None, [[1, {"a": []}]], {"x": "[{"}], "last": 5}


def read(path):
    return [entry for _, entry in reading.official_records(path, "images")]


def test_an_official_list_is_read_and_one_that_is_cut_or_damaged_refused(tmp_path):
    path, whole = tmp_path / "a.json", json.dumps(CONTENT).encode()
    path.write_bytes(b"\xef\xbb\xbf" + whole)  # Windows' byte-order mark
    assert read(path) == CONTENT["images"]
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        refused(read, path)
    for content in (b"[]", b'{"images": 5}', b'{"image": []}', b"\xff", b"[" * 10**5):
        path.write_bytes(content)
        refused(read, path)


def test_a_record_s_path_stays_below_its_folder():
    for name in ("a.png", "b/../a.png", "..a/b..png", "./a.png"):
        assert reading.path_below("x", name, "") == f"x/{name}"
    for name in ("/a.png", "../a.png", "b/../../a.png", "..", "./.."):
        refused(reading.path_below, "x", name, "line 1")
