"""Words: WordPiece and whole-word masking (Sections 3.1, 3.3, 4.1), and plain text packed into samples
(Section 3.4).

Shape letters: B batch, T text tokens with [T_CLS] and [T_SEP].
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the loader's forks

import numpy as np
import tokenizers
import torch
from torch.utils.data import Dataset

import runtime
import shapes
from data import SPLITS, split_by_hash
from reading import checked_text, files_below, read_text, text_lines
from runtime import UserError

IGNORE = -100  # a label that is not predicted

# ---- WordPiece -----------------------------------------------------------------------------------

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece(vocab=None):
    """BERT's uncased tokenizer over a {word piece: id} table; without one, ready to be trained."""
    model = tokenizers.models.WordPiece(vocab or {}, unk_token="[UNK]", max_input_chars_per_word=100)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer


def train_tokenizer(corpus, vocab_size):
    """Trains WordPiece with at most `vocab_size` entries on the texts of corpus(), which is called
    twice. The same texts give the same tokenizer.

    A letter takes two entries: "a" begins a word, "##a" continues one. Letters get up to half of all
    entries, the most frequent first; a word with any other letter is [UNK]. The "##" letters are passed
    as special tokens because the library would number them in the order of a salted hash.
    """
    tokenizer = wordpiece()
    letters = collections.Counter()
    for text in corpus():
        letters.update(tokenizer.normalizer.normalize_str(text))
    del letters[" "]
    kept = sorted(letter for letter, _ in letters.most_common(vocab_size // 4))
    if len(kept) < len(letters):
        told = f"a vocabulary of {vocab_size} has {len(kept)} of {len(letters)} letters: --vocab-size gives it more"
        print(told, file=sys.stderr, flush=True)
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL + ["##" + letter for letter in kept],
        initial_alphabet=kept,
        limit_alphabet=len(kept),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return wordpiece(tokenizer.get_vocab())


def load_tokenizer(path):
    """Reads `vocab.txt` (one piece per line, like BERT's) or `tokenizer.json`."""
    text = read_text(path)
    if Path(path).suffix == ".json":
        return tokenizer_from_json(text, path)
    pieces = text.removesuffix("\n").split("\n")
    return check_tokenizer(wordpiece({piece: i for i, piece in enumerate(pieces)}), path)


def tokenizer_from_json(text, path):
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library raises nothing narrower, and panics beyond Exception
        raise UserError(f"{path} holds no tokenizer: {runtime.first_line(error)}") from None
    return check_tokenizer(tokenizer, path)


def check_tokenizer(tokenizer, path):
    if not isinstance(tokenizer.model, tokenizers.models.WordPiece):
        raise UserError(f"vocabulary {path} is not WordPiece but {type(tokenizer.model).__name__}")
    absent = [token for token in SPECIAL if tokenizer.token_to_id(token) is None]
    if absent:
        raise UserError(f"vocabulary {path} lacks {', '.join(absent)}")
    ids = sorted(tokenizer.get_vocab().values())
    if ids != list(range(len(ids))):
        raise UserError(f"vocabulary {path} must number its {len(ids)} entries from 0 on, each once")
    tokenizer.no_padding()  # Words pads and cuts
    tokenizer.no_truncation()
    return tokenizer


def vocabulary(args, config, start, run, corpus):
    """The checkpoint's tokenizer, else --vocab, else a new one of at most config.vocab_size
    entries, trained on the texts of corpus() → Words, and the Config with their number.
    UserError if --vocab is not the checkpoint's."""
    given = load_tokenizer(args.vocab) if args.vocab else None
    known = start.tokenizer if start else None
    embedded = start.words_embedded if start else 0
    if known and given and given.get_vocab() != known.get_vocab():
        raise UserError(f"--vocab {args.vocab} is not the vocabulary that {start.path} was trained with")
    if known and config.vocab_size < known.get_vocab_size():
        raise UserError(f"--vocab-size: {start.path} keeps its vocabulary of {known.get_vocab_size()}")
    if embedded and not known and not given:
        raise UserError(f"{start.path} was imported without its vocabulary: name it with --vocab")
    tokenizer = known or given
    if not tokenizer:
        text = run.from_main(lambda: train_tokenizer(corpus, config.vocab_size).to_str())
        tokenizer = tokenizers.Tokenizer.from_str(text)
    words = Words(tokenizer, config.max_text_len)
    return words, dataclasses.replace(config, vocab_size=words.size)


class Words:
    """Texts as token ids of one length: [T_CLS] words [T_SEP] padding."""

    def __init__(self, tokenizer, length):
        self.tokenizer, self.length, self.size = tokenizer, length, tokenizer.get_vocab_size()
        named = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
        self.pad, self.cls, self.sep, self.mask = map(tokenizer.token_to_id, named)
        self.inner = np.zeros(self.size, dtype=bool)  # pieces that continue a word
        self.inner[[i for piece, i in tokenizer.get_vocab().items() if piece.startswith("##")]] = True

    def frame(self, pieces):
        """Piece ids, at most T−2 of them → ids (T,) int64, mask (T,) bool, True = real token."""
        ids = torch.full((self.length,), self.pad)
        ids[: len(pieces) + 2] = torch.tensor([self.cls, *pieces, self.sep])
        return ids, torch.arange(self.length) < len(pieces) + 2

    def encode(self, text, second=None):
        """A text, or two with a [T_SEP] in between, cut where they are too long (of two the longer
        one) → ids (T,) int64, mask (T,) bool."""
        pieces = self.tokenizer.encode(text, add_special_tokens=False).ids
        if second is None:
            return self.frame(pieces[: self.length - 2])
        more = self.tokenizer.encode(second, add_special_tokens=False).ids
        while len(pieces) + len(more) > self.length - 3:
            longer = pieces if len(pieces) > len(more) else more
            longer.pop()
        return self.frame([*pieces, self.sep, *more])

    def encode_all(self, texts):
        """Texts → ids (n, T) int64, mask (n, T) bool, cut to the longest of them. UserError for one
        that a terminal or a file system gave in another encoding than UTF-8."""
        for text in texts:
            checked_text(text, repr(text[:40]))
        ids, mask = (torch.stack(parts) for parts in zip(*map(self.encode, texts)))
        T = cut(mask)
        return ids[:, :T], mask[:, :T]

    def words(self, ids):
        """ids (T,) → the positions of each word's pieces: one that starts with "##" continues a word."""
        words, in_word = [], False  # in_word: is there a word that a piece can continue?
        for position, piece in enumerate(ids.tolist()):
            if piece in (self.pad, self.cls, self.sep):
                in_word = False
            elif in_word and self.inner[piece]:
                words[-1].append(position)
            else:
                words.append([position])
                in_word = True
        return words

    def mask_words(self, ids, rng):
        """Masks 15 % of the words as wholes, at least one. Each of their tokens becomes [MASK] in
        80 % of the cases, a random token in 10 %, itself in 10 %. → masked ids (T,), labels (T,)
        with −100 where nothing is predicted."""
        masked, labels, words = ids.clone(), torch.full_like(ids, IGNORE), self.words(ids)
        for word in rng.sample(words, min(len(words), max(1, round(0.15 * len(words))))):
            for position in word:
                labels[position] = ids[position]
                choice = rng.random()
                if choice < 0.8:
                    masked[position] = self.mask
                elif choice < 0.9:
                    masked[position] = rng.randrange(self.size)
        return masked, labels


def cut(mask):
    """The length to cut a batch of texts to: its longest, up to a multiple of 8. mask (B, T) bool."""
    longest = int(mask.sum(1).max())
    return min(-(-longest // 8) * 8, mask.shape[1])


# ---- Plain text (Section 3.4) --------------------------------------------------------------------


class Texts(Dataset):
    """Training samples of packed text, indexed by (epoch, index): masked, labels (T,) int64, mask
    (T,) bool. Documents fill a sample to the last token, and continue in the next (RoBERTa's full
    sentences)."""

    def __init__(self, path, words, seed):
        """path: a file of token ids, as pack() writes it."""
        self.words, self.seed = words, seed
        self.tokens = np.memmap(path, token_type(words), mode="r")

    def __len__(self):
        return -(-len(self.tokens) // (self.words.length - 2))

    def __getitem__(self, key):
        epoch, index = key
        room = self.words.length - 2
        text, mask = self.words.frame(self.tokens[index * room : (index + 1) * room].tolist())
        masked, labels = self.words.mask_words(text, random.Random(f"{self.seed} {epoch} {index}"))
        return {"masked": masked, "labels": labels, "mask": mask}


def token_type(words):
    return np.uint16 if words.size <= 2**16 else np.uint32


def text_files(paths):
    """Text files, and those below folders that end in .txt. UserError if there is none."""
    found = []
    for path in map(Path, paths):
        if not (path.is_dir() or path.is_file()):
            raise UserError(f"{path} does not exist, or is no regular file or folder")
        files = list(files_below(path, (".txt",))) if path.is_dir() else [str(path)]
        if not files:
            raise UserError(f"{path}: plain text is needed, and there is no *.txt below")
        found += files
    return found


def read_lines(path):
    """The lines of a text file, stripped."""
    return (line.strip() for _, line in text_lines(path))


def read_texts(path):
    """The lines that are not blank, a list. UserError if there is none."""
    found = list(filter(None, read_lines(path)))
    if not found:
        raise UserError(f"{path} holds no text")
    return found


def documents(path):
    """The documents of a text file: its paragraphs; or its lines, if there is at most one gap per
    50 of them, because gaps that rare are empty documents."""
    lines = blocks = 0
    for filled, block in itertools.groupby(read_lines(path), key=bool):
        if filled:
            lines += sum(1 for _ in block)
            blocks += 1
    by_paragraph = 50 * (blocks - 1) > lines
    for filled, block in itertools.groupby(read_lines(path), key=bool):
        if filled:
            yield from ([" ".join(block)] if by_paragraph else block)


def read_documents(paths):
    """All documents as (split, text): those of text files, split by a hash of their text; or the
    built-in world's captions, one per scene, because two that say the same would give each other's
    words away."""
    if shapes.asked(paths):
        for split in SPLITS:
            world = shapes.World.read(paths, split, 0)
            yield from ((split, random.Random(i).choice(world[i].captions)) for i in range(len(world)))
    else:
        for path in text_files(paths):
            yield from ((split_by_hash(document), document) for document in documents(path))


def corpus(paths):
    """Texts to train a vocabulary on: those of split train (of a million documents at most)."""
    if shapes.asked(paths):
        return shapes.World("train", 0).corpus()
    documents = itertools.islice(read_documents(paths), 10**6)
    return (text for split, text in documents if split == "train")


def pack(texts, words, folder):
    """Writes the token ids of (split, text) pairs, a [T_SEP] after each text: one file per split,
    which Texts reads."""
    texts = iter(texts)
    # Many texts at a time, on all cores; afterwards off again, because of the forks (see the imports)
    with contextlib.ExitStack() as stack:
        stack.callback(os.environ.update, TOKENIZERS_PARALLELISM=os.environ["TOKENIZERS_PARALLELISM"])
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        files = {split: stack.enter_context(open(Path(folder, split), "wb")) for split in SPLITS}
        while chunk := list(itertools.islice(texts, 1000)):
            encodings = words.tokenizer.encode_batch([text for _, text in chunk], add_special_tokens=False)
            for (split, _), encoding in zip(chunk, encodings):
                if encoding.ids:
                    np.array([*encoding.ids, words.sep], dtype=token_type(words)).tofile(files[split])


def open_packed(words, seed, folder):
    """{split: Texts} of the files that pack() filled."""
    return {split: Texts(folder / split, words, seed) for split in SPLITS if (folder / split).stat().st_size}


def packed(paths, words, seed):
    """{split: Texts}, of the splits that have any: tokens in files, made once per node."""
    fill = functools.partial(pack, read_documents(paths), words)
    texts = runtime.once_per_node(fill, functools.partial(open_packed, words, seed))
    if "train" not in texts:
        raise UserError(f"{' '.join(paths)}: no text to train on")
    return texts
