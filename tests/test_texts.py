"""Tokens, whole-word masking, vocabularies, and plain text packed into samples."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models

import runtime
import shapes
import texts

CAPTIONS = ["a small red circle above a large blue square", "two unbelievably large dogs"]


@pytest.fixture(scope="module")
def words():
    tokenizer = texts.train_tokenizer(CAPTIONS * 3 + ["dog red dogs un believ ably"], 60)
    return texts.Words(tokenizer, 24)


def test_texts_are_framed_padded_and_cut(words):
    ids, mask = words.encode("Red dogs")
    assert ids[0] == words.cls and ids[mask][-1] == words.sep and (ids[~mask] == words.pad).all()
    assert words.tokenizer.decode(ids[mask][1:-1].tolist()) == "red dogs"
    ids, mask = words.encode("red " * 100)
    assert mask.all() and ids[-1] == words.sep and len(words.words(ids)) == 22
    for lengths, cut in [((2, 3), 8), ((8,), 8), ((9, 2), 16), ((17,), 20), ((20,), 20)]:
        assert texts.cut(torch.arange(20) < torch.tensor(lengths)[:, None]) == cut
    ids, mask = words.encode_all(["red", "red " * 7])
    assert ids.shape == (2, 16) and mask.sum(1).tolist() == [3, 9]


def test_words_are_masked_whole_in_15_percent_80_10_10(words):
    caption = " ".join(["unbelievably", "red", "xyz", "dogs"] * 5)
    words = texts.Words(words.tokenizer, 200)
    ids, groups = words.encode(caption)[0], [[] for _ in range(20)]
    encoding = words.tokenizer.encode(caption, add_special_tokens=False)
    for position, word in enumerate(encoding.word_ids, start=1):
        groups[word].append(position)  # the library's own account of words
    assert words.words(ids) == groups and max(map(len, groups)) > 1

    counts = torch.zeros(3)
    for seed in range(1000):
        masked, labels = words.mask_words(ids, random.Random(seed))
        chosen = labels != texts.IGNORE
        assert torch.equal(torch.where(chosen, labels, masked), ids)
        parts = [set(chosen[group].tolist()) for group in groups]
        assert parts.count({True}) == 3 and parts.count({False}) == 17
        kinds = [chosen, chosen & (masked == words.mask), chosen & (masked == ids)]
        counts += torch.stack(kinds).sum(1)
    shares = (counts[1:] / counts[0]).tolist()
    assert shares == pytest.approx([0.8, 0.1], abs=0.02)  # a random token may be either, too


def test_words_at_the_edges(words):
    """An empty text has nothing to mask. A piece whose word was cut off by packing is a word."""
    ids, mask = words.encode("  ")
    masked, labels = words.mask_words(ids, random.Random(0))
    assert mask.sum() == 2 and torch.equal(masked, ids) and (labels == texts.IGNORE).all()
    dog, inner = (words.tokenizer.token_to_id(piece) for piece in ("dog", "##s"))
    assert words.inner[inner] and words.words(words.frame([inner, inner])[0]) == [[1, 2]]
    assert words.words(words.frame([dog, words.sep, inner])[0]) == [[1], [3]]


def test_the_trained_vocabulary_is_the_same_every_time():
    world = shapes.World("train", 32)
    captions = [world[i].captions[0] for i in range(500)]
    first, second = (texts.train_tokenizer(captions, 90).get_vocab() for _ in range(2))
    assert first == second and len(first) == 90
    assert sorted(first, key=first.get)[:5] == texts.SPECIAL


def test_vocab_txt_and_tokenizer_json_read_back_and_nothing_else(words, tmp_path):
    vocab = sorted(words.tokenizer.get_vocab(), key=words.tokenizer.token_to_id)
    other = texts.tokenizer_from_json(words.tokenizer.to_str(), "a copy")
    other.enable_padding(length=16, pad_id=words.pad)  # which is what Words does
    other.enable_truncation(3)
    for name, content in [("vocab.txt", "\n".join(vocab) + "\n"), ("t.json", other.to_str())]:
        (tmp_path / name).write_text(content)
        read = texts.Words(texts.load_tokenizer(tmp_path / name), 24)
        for caption in ("red", *CAPTIONS):
            assert all(map(torch.equal, read.encode(caption), words.encode(caption)))
    twice = "\n".join([*texts.SPECIAL, "a", "b", "a", "c"])
    bpe = Tokenizer(models.BPE()).to_str()
    wrong = {"a.txt": "[PAD]\na\n", "b.txt": twice, "c.json": "{", "d.json": bpe}
    for name in (*wrong, "absent.txt"):
        if name in wrong:
            (tmp_path / name).write_text(wrong[name])
        with pytest.raises(runtime.UserError):
            texts.load_tokenizer(tmp_path / name)


def test_berts_vocabulary_splits_as_bert_does(shared):
    path = shared / "data" / "bert-base-uncased-vocab.txt"
    words = texts.Words(texts.load_tokenizer(path), 40)
    special = words.pad, words.cls, words.sep, words.mask
    assert words.size == 30522 and special == (0, 101, 102, 103)
    pieces = words.tokenizer.encode("Unaffable, naïve!").tokens
    assert pieces == ["una", "##ffa", "##ble", ",", "naive", "!"]


def test_the_vocabulary_of_the_world_knows_all_its_words():
    words = texts.Words(texts.train_tokenizer(shapes.World("train", 0).corpus(), 512), 24)
    world = shapes.World("test", 0)
    for i in range(400):
        for text in (world.question(i)[0], world.statement(i)[0], *world[i].captions):
            ids = words.tokenizer.encode(text, add_special_tokens=False).ids
            assert words.tokenizer.token_to_id("[UNK]") not in ids and len(ids) <= 22
            assert not words.inner[ids].any()  # every word is one piece


def test_documents_are_lines_or_paragraphs_split_by_their_text(tmp_path, monkeypatch):
    for text, expected in [
        ("\n\none\ntwo \n\n", ["one", "two"]),
        ("one\nmore of it\n\n \ntwo\n", ["one more of it", "two"]),
        ("\n\n", []),
    ]:
        (tmp_path / "a.txt").write_text(text)
        assert list(texts.documents(tmp_path / "a.txt")) == expected
    lines = [f"document number {i}" for i in range(1000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("\n".join(reversed(lines)))
    found = list(texts.read_documents([tmp_path / "a.txt"]))
    assert [text for _, text in found] == lines
    assert [*found, *found[::-1]] == list(texts.read_documents([tmp_path]))  # both files
    counts = Counter(split for split, _ in found)
    assert 5 < counts["val"] < 50 and 5 < counts["test"] < 50
    assert len(texts.corpus([tmp_path / "a.txt"])) == counts["train"]
    monkeypatch.setattr(shapes, "SCENES", {"train": 30, "val": 10, "test": 20})
    found = list(texts.read_documents(["shapes"]))  # a caption per scene
    assert Counter(split for split, _ in found) == shapes.SCENES
    assert found[35][1] in shapes.World("val", 0)[5].captions


def test_text_is_packed_without_loss_and_masked_differently_each_epoch(words, tmp_path):
    given = ["unbelievably large dogs", "", "red dogs", "a red circle " * 9]
    texts.pack([("test", "red"), *(("train", text) for text in given)], words, tmp_path)
    packed = texts.Texts(tmp_path / "train", words, 0)
    assert [len(texts.Texts(tmp_path / split, words, 0)) for split in ("val", "test")] == [0, 1]
    stream, expected = [], []
    for i in range(len(packed)):
        sample = packed[0, i]
        ids = torch.where(sample["labels"] == texts.IGNORE, sample["masked"], sample["labels"])
        inside = ids[sample["mask"]].tolist()
        assert inside[0] == words.cls and inside[-1] == words.sep
        assert (ids[~sample["mask"]] == words.pad).all()
        assert sample["mask"].all() or i == len(packed) - 1
        assert not set(sample["labels"].tolist()) & {words.cls, words.sep, words.pad}
        stream += inside[1:-1]
    for text in filter(None, given):
        expected += [*words.tokenizer.encode(text, add_special_tokens=False).ids, words.sep]
    assert stream == expected
    assert torch.equal(packed[0, 0]["masked"], packed[0, 0]["masked"])
    assert not torch.equal(packed[0, 0]["labels"], packed[1, 0]["labels"])
    types = [texts.token_type(SimpleNamespace(size=size)) for size in (2**16, 2**16 + 1)]
    assert types == [texts.np.uint16, texts.np.uint32]


def test_packed_text_leaves_no_file_behind_and_needs_text(words, tmp_path, monkeypatch):
    monkeypatch.setattr(texts.tempfile, "tempdir", str(tmp_path))
    pack = lambda name: texts.packed([str(tmp_path / name)], words, 0, runtime.Runtime())
    contents = {"a.txt": b"red", "b.png": b"", "c.txt": b"\xff", "d.txt": b"\n", "e.json": b"{}"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert len(pack("a.txt")["train"]) == 1
    for name in (*list(contents)[1:], "absent"):
        with pytest.raises(runtime.UserError):
            pack(name)
    assert {path.name for path in tmp_path.iterdir()} == set(contents)
