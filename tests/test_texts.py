"""Tokens, whole-word masking, vocabularies, and plain text packed into samples."""

import math
import os
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import refused
from tokenizers import Tokenizer, models

import runtime
import shapes
import texts

CAPTIONS = ["a small red circle above a large blue square", "two unbelievably large dogs"]


@pytest.fixture(scope="module")
def words():
    tokenizer = texts.train_tokenizer(lambda: CAPTIONS * 3 + ["dog red dogs un believ ably"], 60)
    return texts.Words(tokenizer, 24)


def test_texts_are_framed_padded_and_cut(words):
    ids, mask = words.encode("Red dogs")
    assert ids[0] == words.cls and ids[mask][-1] == words.sep and (ids[~mask] == words.pad).all()
    assert words.tokenizer.decode(ids[mask][1:-1].tolist()) == "red dogs"
    ids, mask = words.encode("red " * 100)
    assert mask.all() and ids[-1] == words.sep and len(words.words(ids)) == 22
    for longest, cut in ((3, 8), (8, 8), (9, 16), (17, 20), (20, 20)):
        assert texts.cut(torch.arange(20) < torch.tensor([[2], [longest]])) == cut


def test_words_are_masked_whole_in_15_percent_80_10_10(words):
    text, groups = "unbelievably red xyz dogs " * 500, [[] for _ in range(2000)]
    words = texts.Words(words.tokenizer, 10_000)
    encoding = words.tokenizer.encode(text, add_special_tokens=False)
    for position, word in enumerate(encoding.word_ids, start=1):
        groups[word].append(position)  # the library's own account of words
    ids, _ = words.encode(text)
    assert words.words(ids) == groups and max(map(len, groups)) > 1

    masked, labels = words.mask_words(ids, random.Random(0))
    chosen = labels != texts.IGNORE
    assert torch.equal(torch.where(chosen, labels, masked), ids)
    parts = Counter(tuple(set(chosen[group].tolist())) for group in groups)
    assert parts == {(True,): 300, (False,): 1700}
    shares = [(masked[chosen] == kind).double().mean().item() for kind in (words.mask, ids[chosen])]
    assert shares == pytest.approx([0.8, 0.1], abs=0.03)  # a random token may be either, too


def test_words_at_the_edges(words):
    """An empty text has nothing to mask. A piece whose word was cut off by packing is a word."""
    ids, mask = words.encode("  ")
    masked, labels = words.mask_words(ids, random.Random(0))
    assert mask.sum() == 2 and torch.equal(masked, ids) and (labels == texts.IGNORE).all()
    _, labels = words.mask_words(words.encode("red")[0], random.Random(0))
    assert (labels != texts.IGNORE).sum() == 1  # 15 % of one word, but at least one
    dog, inner = (words.tokenizer.token_to_id(piece) for piece in ("dog", "##s"))
    assert words.words(words.frame([inner, inner])[0]) == [[1, 2]]
    assert words.words(words.frame([dog, words.sep, inner])[0]) == [[1], [3]]


def test_a_trained_vocabulary_is_the_same_every_time_and_knows_all_words_of_the_world():
    corpus = shapes.World("train", 0).corpus
    tokenizer, again = (texts.train_tokenizer(corpus, 512) for _ in range(2))
    vocab, world = tokenizer.get_vocab(), shapes.World("test", 0)
    assert vocab == again.get_vocab() and sorted(vocab, key=vocab.get)[:5] == texts.SPECIAL
    for i in range(200):
        for text in (world.question(i)[0], world.statement(i)[0], *world[i].captions):
            pieces = tokenizer.encode(text).tokens
            assert "[UNK]" not in pieces and len(pieces) <= 22
            assert not any(piece.startswith("##") for piece in pieces)  # every word is one piece


def test_rare_letters_leave_a_vocabulary_room_for_words(capsys):
    chinese = " ".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    tokenizer = texts.train_tokenizer(lambda: [*CAPTIONS * 3, chinese], 200)
    assert tokenizer.get_vocab_size() <= 200 and "50 of" in capsys.readouterr().err
    assert tokenizer.encode(CAPTIONS[0]).tokens == CAPTIONS[0].split()


def test_vocab_txt_and_tokenizer_json_read_back_and_nothing_else(words, tmp_path):
    vocab = sorted(words.tokenizer.get_vocab(), key=words.tokenizer.token_to_id)
    padding = texts.tokenizer_from_json(words.tokenizer.to_str(), "a copy")
    padding.enable_padding(length=16, pad_id=words.pad)  # which is what Words does
    padding.enable_truncation(3)
    for name, content in [("vocab.txt", "\n".join(vocab) + "\n"), ("t.json", padding.to_str())]:
        (tmp_path / name).write_text(content)
        read = texts.Words(texts.load_tokenizer(tmp_path / name), 24)
        assert all(map(torch.equal, read.encode(CAPTIONS[1]), words.encode(CAPTIONS[1])))

    twice = "\n".join([*texts.SPECIAL, "a", "b", "a"])
    special = {piece: number for number, piece in enumerate(texts.SPECIAL)}
    bpe = Tokenizer(models.BPE(special, [])).to_str()
    for wrong in ("[PAD]\na\n", twice, "{", bpe):
        path = tmp_path / ("wrong.json" if "{" in wrong else "wrong.txt")
        path.write_text(wrong)
        refused(texts.load_tokenizer, path)


def test_berts_vocabulary_splits_as_bert_does(shared):
    path = shared / "data" / "bert-base-uncased-vocab.txt"
    words = texts.Words(texts.load_tokenizer(path), 40)
    assert [words.pad, words.cls, words.sep, words.mask] == [0, 101, 102, 103]
    pieces = words.tokenizer.encode("Unaffable, naïve!").tokens
    assert pieces == ["una", "##ffa", "##ble", ",", "naive", "!"]


def test_documents_are_lines_or_paragraphs_split_by_their_text(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("one\nmore of it\n\n \ntwo\n")
    assert list(texts.documents(a)) == ["one more of it", "two"]
    lines = [f"document number {i}" for i in range(1000)]
    a.write_text("\n\n" + "\n".join(lines) + " \n\n")
    b.write_text("\n".join(reversed(lines)))
    found = list(texts.read_documents([a]))
    assert [text for _, text in found] == lines
    assert [*found, *found[::-1]] == list(texts.read_documents([tmp_path]))  # both files
    counts = Counter(split for split, _ in found)
    assert counts.keys() == {"train", "val", "test"} and len(list(texts.corpus([a]))) == counts["train"]
    a.write_text("\n".join([*lines, "", *lines]))  # an empty document
    assert list(texts.documents(a)) == lines + lines
    os.mkfifo(tmp_path / "pipe.txt")
    refused(texts.text_files, [tmp_path / "pipe.txt"])
    found = list(texts.read_documents(["shapes"]))  # a caption per scene
    assert Counter(split for split, _ in found) == {split: shapes.SCENES[split] for split in texts.SPLITS}
    assert found[shapes.SCENES["train"] + 5][1] in shapes.World("val", 0)[5].captions


def test_text_is_packed_without_loss_and_masked_differently_each_epoch(words, tmp_path):
    given, stream = ["unbelievably large dogs", "", "red dogs", "a red circle " * 9], []
    for text in filter(None, given):
        stream += [*words.tokenizer.encode(text, add_special_tokens=False).ids, words.sep]
    texts.pack([("test", "red"), *(("train", text) for text in given)], words, tmp_path)
    packed, test = (texts.Texts(tmp_path / split, words, 0) for split in ("train", "test"))
    assert [len(packed), len(test)] == [math.ceil(len(stream) / 22), 1]
    for i in range(len(packed)):
        sample = packed[0, i]
        ids = torch.where(sample["labels"] == texts.IGNORE, sample["masked"], sample["labels"])
        expected = words.frame(stream[22 * i : 22 * i + 22])
        assert all(map(torch.equal, (ids, sample["mask"]), expected))
    first, again, other = (packed[epoch, 0]["masked"] for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    types = [texts.token_type(SimpleNamespace(size=size)) for size in (2**16, 2**16 + 1)]
    assert types == [texts.np.uint16, texts.np.uint32]


def test_packed_text_leaves_no_file_behind_and_needs_text(words, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.tempfile, "tempdir", str(tmp_path))
    pack = lambda name: texts.packed([str(tmp_path / name)], words, 0)
    contents = {"a.txt": b"red", "b.png": b"\x89", "c.txt": b"\xff", "d.txt": b"\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert {split: len(found) for split, found in pack("a.txt").items()} == {"train": 1}
    for name in (*list(contents)[1:], "absent"):
        refused(pack, name)
    assert {path.name for path in tmp_path.iterdir()} == set(contents)
