"""Checks names of clips and identities, and escapes text from strangers in messages."""

import itertools
import re
import sys
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Iterable

from vidjax.utils.errors import UserError

# Unicode categories of control characters, and of line and paragraph separators, which would break
# the lines of a file.
_BREAKS = ("Cc", "Zl", "Zp")
# Characters that `escape` replaces: white space and the byte order mark, which readers of text
# drop; and a % before two hexadecimal digits, so that `unescape` is unambiguous.
_UNSAFE = re.compile(r"[\s\ufeff]|%(?=[0-9A-Fa-f]{2})")
_JOINERS = "\u200c\u200d"  # ZWNJ and ZWJ, in Persian and Indic names and in emoji
# Invisible letters outside the category Cf: fillers and variation selectors.
_SHAPELESS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)

MAX_STEM_BYTES = 200  # a file name, even if temporary, has at most 255 bytes


def show(text: str | bytes) -> str:
    """Shortens and escapes text from a file for a line of an error message."""
    if isinstance(text, bytes):
        text = text[:400].decode("utf-8", "backslashreplace")
    text = text if len(text) <= 100 else text[:100] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


def check_name(name: str, kind: str = "clip name") -> str:
    """Checks that text files and HTML pages can contain a name, and returns it unchanged.

    Raises:
      UserError: the name is empty or blank, is not valid unicode, or contains a newline or another
        control character.
    """
    if not name.strip():
        raise UserError(f"{kind} '{show(name)}' is empty")
    if name.isprintable():  # fast, and sufficient for most names
        return name
    broken = [letter for letter in name if unicodedata.category(letter) in _BREAKS]
    if broken:
        raise UserError(
            f"{kind} '{show(name)}' contains the control character {broken[0]!a}: rename it"
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        remedy = "rename it"
        if sys.getfilesystemencoding() != "utf-8":  # the name may be valid
            remedy = "set PYTHONUTF8=1, because the locale allows only ASCII in file names"
        raise UserError(f"{kind} '{show(name)}' is not valid unicode: {remedy}") from None
    return name


def clean_identity(name: str) -> str:
    """Checks the name of a person and returns its `normal_form`. All new names are checked here.

    Raises:
      UserError: the name has leading or trailing blanks, `check_name` refuses it, or it contains an
        invisible letter (category Cf). A joiner between two letters or symbols is allowed.
    """
    if name != name.strip() and name.strip():
        raise UserError(
            f"identity '{show(name)}' has leading or trailing blanks: remove them with strip()"
        )
    name = normal_form(check_name(name, "identity"))
    if name.isprintable():  # no letter is of the category Cf
        return name
    for place, letter in enumerate(name):
        neighbours = [unicodedata.category(other)[0] for other in name[place - 1 : place + 2 : 2]]
        joins = letter in _JOINERS and place and len(neighbours) == 2 and {*neighbours} <= {*"LMS"}
        if unicodedata.category(letter) == "Cf" and not joins:
            raise UserError(
                f"identity '{show(name)}' contains the invisible letter {letter!a}: leave it out"
            )
    return name


def normal_form(name: str) -> str:
    """Returns a name in the Unicode form NFC, where `e` and an accent are a single letter.

    Names of people are compared in this form. File systems and keyboards may use other forms.
    """
    return unicodedata.normalize("NFC", name)


def is_unknown(name: str) -> bool:
    """Returns True for the name of an unknown person: `unknown`, or `unknown 3`."""
    return re.fullmatch("unknown( [0-9]+)?", name.casefold()) is not None


def fold(name: str) -> str:
    """Returns a key that is equal for names that look alike.

    The key ignores case, compatible letters (`\ufb01` and `fi`), invisible letters and repeated
    blanks.

    Source: NFKC_Casefold of the Unicode standard.
    """
    if name.isascii():
        return " ".join(name.casefold().split())
    text = unicodedata.normalize("NFKC", name).casefold()
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", _SHAPELESS.sub("", text)).split())


def find_similar_names(new: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Returns new name -> another name, new or known, that looks like it."""
    seen, similar = dict[str, str](), dict[str, str]()
    new = [*new]
    for name in itertools.chain(known, new) if new else ():
        if (other := seen.setdefault(fold(name), name)) != name:
            similar[name] = other
    return {name: similar[name] for name in new if name in similar}


def make_file_stems(labels: Iterable[str]) -> list[str]:
    """Returns a distinct file name without suffix for each label, of at most MAX_STEM_BYTES.

    Many file systems do not distinguish `ada` and `Ada`, so the second label becomes `ada (2)`.
    """
    stems, taken = list[str](), Counter[str]()
    for label in labels:
        stem = _cut(label, MAX_STEM_BYTES)
        word, number = fold(stem), 1
        while fold(stem) in taken:
            number = max(number, taken[word]) + 1
            stem = f"{_cut(label, MAX_STEM_BYTES - 10)} ({number})"
        taken[word] = number
        taken[fold(stem)] = max(1, taken[fold(stem)])
        stems.append(stem)
    return stems


def _cut(text: str, max_bytes: int) -> str:
    return text.encode()[:max_bytes].decode(errors="ignore")


def clean_name(name: str) -> str:
    """Removes `.mp4` at the end of a clip name. Raises the errors of `check_name`."""
    end = len(name)
    while name.endswith(".mp4", 0, end):  # without copies, because a name may be `.mp4` * 10**6
        end -= 4
    if not name[:end].strip():
        raise UserError(f"clip name '{show(name)}' is empty")
    return check_name(name[:end])


def clean_name_at(place: str, name: object) -> str:
    """Returns `clean_name`; `place` (a file, line or split) is the start of an error message."""
    if not isinstance(name, str):
        raise UserError(f"{place} a clip name is text, not {type(name).__name__}: {name!r:.40}")
    try:
        return clean_name(name)
    except ValueError as error:
        raise UserError(f"{place} {error}") from None


def escape(name: str) -> str:
    """Returns a name without white space for the official format: `First%20Last`."""
    return _UNSAFE.sub(lambda match: urllib.parse.quote(match[0], safe=""), name)


def unescape(text: str) -> str:
    """Reverses `escape`. Text that `escape` cannot have written is returned unchanged."""
    if "%" not in text:
        return text
    name = urllib.parse.unquote(text)
    try:
        return check_name(name) if escape(name) == text else text
    except ValueError:
        return text
