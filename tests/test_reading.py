"""Large JSON files read piece by piece, lines of text, paths in records."""

import json

import pytest
from conftest import refused

import reading

VALUES = [1.5, -10**20, "a\\\"]}\n", "é€😀", None, True, [], {}, [[1, {"a": []}]], {"x": "[{"}]
CONTENT = {"first": {"images": [1]}, "images": VALUES, "last": 5}


def read(path):
    return [entry for _, entry in reading.official_records(path, "images")]


@pytest.mark.parametrize("piece", [1, 2, 7, 2**20])
def test_a_large_json_file_is_read_as_a_whole_one_is(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(reading, "PIECE", piece)
    path = tmp_path / "a.json"
    for indent in (None, 3):
        for content in (CONTENT, {"images": []}, {"images": [12345]}):
            path.write_text(json.dumps(content, indent=indent, ensure_ascii=False))
            assert read(path) == content["images"]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(CONTENT).encode())  # Windows' byte-order mark
    assert read(path) == VALUES


@pytest.mark.parametrize("piece", [1, 2**20])
def test_a_cut_or_damaged_json_file_is_refused(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(reading, "PIECE", piece)
    path, whole = tmp_path / "a.json", json.dumps(CONTENT).encode()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        refused(read, path)
    wrong = [b"[]", b'{"images": 5}', b'{"image": []}', b'{"images" []}', b'{"images": [1 2]}', b"\xff"]
    for content in (*wrong, whole + b"{", b'{"images": ' + b"[" * 10**5, b'{"images": [' + b"1" * 5000):
        path.write_bytes(content)
        refused(read, path)


def test_an_error_names_the_record(tmp_path):
    (tmp_path / "a.json").write_text('{"images": [1, 2, x]}')
    refused(read, tmp_path / "a.json", says="images 2")
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\r\n\xffthree")
    refused(list, reading.text_lines(tmp_path / "a.txt"), says="line 3")


def test_a_record_s_path_stays_below_its_folder():
    for name in ("a.png", "b/../a.png", "..a/b..png", "./a.png"):
        assert reading.path_below("x", name, "") == f"x/{name}"
    for name in ("/a.png", "../a.png", "b/../../a.png", "..", "./.."):
        refused(reading.path_below, "x", name, "line 1")
