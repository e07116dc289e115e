"""Text, JSON and folders of any size, one record at a time. What cannot be read is a UserError that
names the file and the record."""

import codecs
import contextlib
import json
import os
import re
import sys
from pathlib import Path

from runtime import UserError

# ---- Text ----------------------------------------------------------------------------------------


def read_text(path):
    """A text file without its byte-order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def text_lines(path):
    """(number from 1, line with its end) of a text file; only "\\n" ends a line. A byte-order mark is
    left out."""
    number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield number, line.decode()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: no UTF-8 text: {error}") from None


def checked_captions(captions, where):
    """captions; UserError unless they are a list of at least one text."""
    texts = isinstance(captions, list) and all(isinstance(text, str) for text in captions)
    if not texts or not captions:
        given = json.dumps(captions)[:80]
        raise UserError(f"{where}: captions must be a list of at least one string, not {given}")
    return [checked_text(caption, where) for caption in captions]


def checked_text(text, where):
    """text; UserError if it holds half a character, as where UTF-16 was cut in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: no valid text: {error}") from None
    return text


# ---- JSON ----------------------------------------------------------------------------------------


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no valid JSON: {error}") from None


def json_lines(path):
    """(where, value) of each line that is not blank."""
    path = str(path)
    for number, line in text_lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where)


def fields(where, entry, **kinds):
    """The values of a record's fields, of these types. UserError that names the record and the
    field."""
    for name, kind in kinds.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
            raise UserError(f'{where}: "{name}" must be there, a {kind.__name__}')
    return [entry[name] for name in kinds]


@contextlib.contextmanager
def malformed(where):
    """Turns what a malformed record of an official file raises into one line that names file and
    record."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"{where} is not as published ({type(error).__name__}: {error})") from None


def official_records(path, name):
    """(where, entry) of the list of that name in the object that an official JSON file holds."""
    where, found = path, False
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = LargeJSON(file)
            for _ in text.elements("{", "}"):
                key = text.value()
                text.take(":")
                if key != name:
                    text.value()
                    continue
                where, found = f"{path}, {name} 0", True
                for number, _ in enumerate(text.elements("[", "]"), start=1):
                    yield where, text.value()
                    where = f"{path}, {name} {number}"
            text.take("")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no valid JSON: {getattr(error, 'msg', error)}") from None
    if not found:
        raise UserError(f"{path} is not as published: it has no {name}")


BLANK = re.compile(r"[ \t\n\r]*")
PIECE = 2**20  # characters that are read at once, at least
LARGEST = 2**26  # characters of a value, about


class LargeJSON:
    """A JSON text that is read piece by piece. ValueError where it is not valid."""

    def __init__(self, file):
        self.file, self.decode = file, json.JSONDecoder().raw_decode
        self.piece, self.at = "", 0  # what was read, and how much of it is done

    def more(self):
        """Reads on, so much that what is not done is doubled at least. False at the end of the file."""
        rest = self.piece[self.at :]
        new = self.file.read(max(PIECE, len(rest)))
        if new:
            self.piece, self.at = rest + new, 0
        return bool(new)

    def peek(self):
        """The next character that is not blank, "" at the end of the file."""
        self.at = BLANK.match(self.piece, self.at).end()
        while self.at == len(self.piece) and self.more():
            self.at = BLANK.match(self.piece).end()
        return self.piece[self.at : self.at + 1]

    def take(self, sign):
        if self.peek() != sign:
            found = self.piece[self.at : self.at + 20]
            raise ValueError(f"{sign or 'its end'} was expected, not {found!r}")
        self.at += len(sign)

    def value(self):
        self.peek()
        while True:
            try:
                value, end = self.decode(self.piece, self.at)
            except ValueError:  # or the value is not yet read to its end
                if len(self.piece) - self.at > LARGEST or not self.more():
                    raise
            else:
                # A number could go on with what follows: 1 with "e+", but not with three signs
                if end + 2 < len(self.piece) or not self.more():
                    self.at = end
                    return value

    def elements(self, first, last):
        """Yields before each element between two brackets, which must be read before the next."""
        self.take(first)
        while self.peek() != last:
            yield
            if self.peek() != last:
                self.take(",")
        self.take(last)


# ---- Folders -------------------------------------------------------------------------------------

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def files_below(folder, endings):
    """All files below a folder with one of these endings, in order. A folder that several links lead
    to is read once. UserError for a folder that cannot be read."""
    seen = set()
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        state = os.stat(where)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()  # a link that leads back would never end
            continue
        seen.add((state.st_dev, state.st_ino))
        folders.sort()  # os.walk goes on in this order
        for name in sorted(names):
            if name.lower().endswith(endings):
                yield os.path.join(where, name)


def refuse(error):
    raise UserError(f"{error.filename} cannot be read: {error.strerror}")


def path_below(folder, name, where):
    """The path of a file that a record names. UserError if it is not below the folder."""
    above = ".." in name and os.path.normpath(name).split("/")[0] == ".."
    if above or name.startswith("/"):
        raise UserError(f"{where}: {name[:200]!r} is not below {folder} (a symbolic link there can be)")
    return os.path.join(folder, name)


def print_left_out(where, left_out, count, names, needed):
    """Says on stderr how many samples are left out, and which are the first."""
    if left_out:
        names = ", ".join(names) + (", …" if left_out > len(names) else "")
        text = f"{where}: {left_out} of {count} samples are left out, they lack {needed}: {names}"
        print(text, file=sys.stderr, flush=True)
