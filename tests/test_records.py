"""Records in files that processes share."""

import os
import tempfile

import pytest

import data
import losses
from records import Records


def pictures(count, read=None, error=None):
    """Records, each with as many captions as its number, noted in the list `read`; then an error."""
    for i in range(count):
        if read is not None:
            read.append(i)
        yield data.Picture(f"{i}.png", [f"{i} {k} é" for k in range(i)], str(i))
    if error:
        raise error


def draw(folder):
    """In one of several processes → records, ends of captions, how many it has read itself, and the
    errors of records that cannot be read."""
    tempfile.tempdir, read, errors = folder, [], []
    for error in (data.Absent, data.UserError):
        with pytest.raises(data.UserError) as caught:
            Records(data.Picture, pictures(3, error=error("no such records")))
        errors.append((type(caught.value).__name__, str(caught.value)))
    source = Records(data.Picture, pictures(5, read))
    return [tuple(source[i]) for i in (3, 0, 4)], source.caption_ends().tolist(), len(read), errors


def test_one_process_reads_and_all_have_the_records_or_the_error(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", tempfile.tempdir)  # set again at the end
    records, ends, read, errors = single = draw(str(tmp_path))
    assert records == [tuple(list(pictures(5))[i]) for i in (3, 0, 4)]
    assert ends == [0, 1, 3, 6, 10] and read == 5
    assert errors == [(name, "no such records") for name in ("Absent", "UserError")]
    assert processes(2, draw, str(tmp_path)) == [single, (records, ends, 0, errors)]
    assert not os.listdir(tmp_path)


def fail_on_another_node(folder):
    """Each of two processes is the first of its node; that of the second cannot read its records."""
    os.environ["LOCAL_RANK"], tempfile.tempdir = "0", os.path.join(folder, str(losses.rank()))
    os.mkdir(tempfile.tempdir)
    with pytest.raises(data.UserError, match="no such records"):
        Records(data.Picture, pictures(3, error=data.UserError("no such records") if losses.rank() else None))
    assert not os.listdir(tempfile.tempdir)


def test_an_error_on_one_node_ends_the_run_on_all(processes, tmp_path):
    processes(2, fail_on_another_node, str(tmp_path))


def test_a_corpus_is_about_a_million_texts(monkeypatch):
    source = Records(data.Picture, pictures(5))
    assert len(list(source.corpus())) == 10
    source.text_ends = source.text_ends * 200_000  # as if there were two million
    assert [text[0] for text in source.corpus()] == list("2244") + ["4", "4"]
