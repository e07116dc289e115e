"""Text, JSON and folders, one record at a time. What cannot be read is a UserError that
names the file and the record."""

import codecs
import contextlib
import json
import os
import sys
import tarfile
from pathlib import Path

from runtime import UserError, first_line

# ---- Text ----------------------------------------------------------------------------------------


def read_text(path):
    """A text file without its byte-order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def text_lines(path):
    """(number from 1, line with its end); only "\\n" ends a line. A byte-order mark is left out."""
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
        raise UserError(f"{path}, line {number}: not UTF-8 text: {error}") from None


def checked_captions(captions, where):
    """captions that are not blank; UserError unless they are a list of at least one such text."""
    texts = isinstance(captions, list) and all(isinstance(text, str) for text in captions)
    if not texts or not any(map(str.strip, captions)):
        given = json.dumps(captions)[:80]
        raise UserError(f"{where}: captions must be a list of at least one text, not {given}")
    return [checked_text(caption, where) for caption in captions if caption.strip()]


def checked_text(text, where):
    """text; UserError if it holds half a character, as where UTF-16 was cut in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not valid text: {error}") from None
    return text


# ---- JSON ----------------------------------------------------------------------------------------


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None


def json_lines(path):
    """(where, value) of each line that is not blank."""
    path = str(path)
    for number, line in text_lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where)


def fields(where, entry, **kinds):
    """The values of a record's fields, of these types. UserError that names record and field."""
    for name, kind in kinds.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
            raise UserError(f'{where}: "{name}" is required, as a {kind.__name__}')
    return [entry[name] for name in kinds]


# What a damaged file or a record of another kind raises in the code that reads it
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, AssertionError)
MALFORMED += (RuntimeError, OSError, EOFError, MemoryError, tarfile.TarError)


@contextlib.contextmanager
def malformed(where):
    """Turns what a malformed record or a damaged shard raises into one line that names it."""
    try:
        yield
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{where} is damaged or not as published ({reason})") from None


def official_records(path, name):
    """(where, entry) of the list of that name in the object that an official JSON file holds. The
    file is read as a whole: VQA 2.0's largest take about 2 GB until they are through."""
    content = parse_json(read_text(path), path)
    with malformed(path):
        entries = content[name]
        assert isinstance(entries, list), f"{name} is no list"
    for number, entry in enumerate(entries):
        yield f"{path}, {name} {number}", entry


# ---- Folders -------------------------------------------------------------------------------------

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def files_below(folder, endings):
    """All files below a folder with one of these endings, in order. A folder that several links
    lead to is read once. UserError for a folder that cannot be read."""
    seen = set()
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(where) in seen:
            folders.clear()  # a link that leads back would never end
            continue
        seen.add(os.path.realpath(where))
        folders[:] = sorted(name for name in folders if not hidden(name))  # os.walk goes on in this order
        for name in sorted(names):
            if name.lower().endswith(endings) and not hidden(name):
                yield os.path.join(where, name)


def hidden(name):
    """Whether a file or folder is not meant as data: previews and the like."""
    return name.startswith(".") or name in ("@eaDir", "__MACOSX")


def refuse(error):
    raise UserError(f"{error.filename} cannot be read: {error.strerror}")


def path_below(folder, name, where):
    """The path of a file that a record names. UserError if it is not below the folder."""
    if os.path.isabs(name) or os.path.normpath(name).split("/")[0] == "..":
        raise UserError(f"{where}: {name[:200]!r} is not below {folder} (put a symbolic link there)")
    return os.path.join(folder, name)


def print_left_out(where, left_out, count, needed):
    """Says on stderr which of `count` samples are left out."""
    if left_out:
        names = ", ".join(left_out[:3]) + (", …" if len(left_out) > 3 else "")
        text = f"{where}: {len(left_out)} of {count} samples are left out, they lack {needed}: {names}"
        print(text, file=sys.stderr, flush=True)
