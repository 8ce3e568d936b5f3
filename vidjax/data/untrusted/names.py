"""Names of clips and identities, and text of unknown origin in messages."""

import itertools
import re
import sys
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Iterable

from vidjax.utils.errors import UserError

# Control characters, line and paragraph separators: they would break the lines of a file.
_BREAKS = ("Cc", "Zl", "Zp")
# White space and the byte order mark, which readers of text drop; and a % before two hexadecimal
# digits, so that every name is read back.
_UNSAFE = re.compile(r"[\s\ufeff]|%(?=[0-9A-Fa-f]{2})")
_JOINERS = "\u200c\u200d"  # ZWNJ and ZWJ, of Persian and Indic names, and of emoji
# Letters without a shape that are not of the category Cf: fillers, and selectors of a variant.
_SHAPELESS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)

STEM_BYTES = 200  # names of files have 255 bytes at most, also while they are written


def show(text: str | bytes) -> str:
    """Returns text from a file, shortened and escaped for one line of an error message."""
    if isinstance(text, bytes):
        text = text[:400].decode("utf-8", "backslashreplace")
    text = text if len(text) <= 100 else text[:100] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


def check_name(name: str, kind: str = "clip name") -> str:
    """Returns a name unchanged if text files and HTML pages can hold it; it may contain blanks.

    ValueError if it is empty or blank, is not valid unicode, or holds a newline or another control
    character.
    """
    if not name.strip():
        raise UserError(f"{kind} '{show(name)}' is empty")
    if name.isprintable():  # a fast test, which few names fail
        return name
    broken = [letter for letter in name if unicodedata.category(letter) in _BREAKS]
    if broken:
        raise UserError(
            f"{kind} '{show(name)}' holds the control character {broken[0]!a}: rename it"
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        remedy = "rename it"
        if sys.getfilesystemencoding() != "utf-8":  # and nothing may be wrong with the name
            remedy = "set PYTHONUTF8=1, as the locale lets names of files be ASCII alone"
        raise UserError(f"{kind} '{show(name)}' is not valid unicode: {remedy}") from None
    return name


def clean_identity(name: str) -> str:
    """Returns the name of a person in its `normal_form`. All new names pass through here.

    UserError for outer blanks, as in `Ann ` for `Ann`, for what `check_name` refuses, and for an
    invisible letter (category Cf). A joiner is allowed between two letters, or symbols as in emoji.
    """
    if name != name.strip() and name.strip():
        raise UserError(f"identity '{show(name)}' has outer blanks: strip() it")
    name = normal_form(check_name(name, "identity"))
    if name.isprintable():  # then it has no letter of the category Cf
        return name
    for place, letter in enumerate(name):
        beside = [unicodedata.category(other)[0] for other in name[place - 1 : place + 2 : 2]]
        joins = letter in _JOINERS and place and len(beside) == 2 and {*beside} <= {*"LMS"}
        if unicodedata.category(letter) == "Cf" and not joins:
            raise UserError(
                f"identity '{show(name)}' holds the invisible letter {letter!a}: leave it out"
            )
    return name


def normal_form(name: str) -> str:
    """Returns a name in the Unicode form NFC: `e` and an accent are one letter.

    Names of people are compared in this form. File systems and keyboards write others.
    """
    return unicodedata.normalize("NFC", name)


def is_unknown(name: str) -> bool:
    """Returns whether a name says that nobody is known: `unknown`, or a number as `unknown 3`."""
    return re.fullmatch("unknown( [0-9]+)?", name.casefold()) is not None


def fold(name: str) -> str:
    """Returns the form that a name shares with names that look like it, and may differ from it.

    Case, compatible letters (`\ufb01` and `fi`), invisible letters and runs of blanks do not count.

    Source: NFKC_Casefold of the Unicode standard.
    """
    if name.isascii():
        return " ".join(name.casefold().split())
    text = unicodedata.normalize("NFKC", name).casefold()
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", _SHAPELESS.sub("", text)).split())


def similar_names(new: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Returns new name -> a known or another new name that looks like it and is not equal."""
    seen, found = dict[str, str](), dict[str, str]()
    new = [*new]
    for name in itertools.chain(known, new) if new else ():
        if (other := seen.setdefault(fold(name), name)) != name:
            found[name] = other
    return {name: found[name] for name in new if name in found}


def file_stems(labels: Iterable[str]) -> list[str]:
    """Returns the begin of a file's name for each label: STEM_BYTES at most, and none looks alike.

    Many systems do not tell `ada` from `Ada`: the second one becomes `ada (2)`.
    """
    stems, taken = list[str](), Counter[str]()
    for label in labels:
        stem = _cut(label, STEM_BYTES)
        word, number = fold(stem), 1
        while fold(stem) in taken:
            number = max(number, taken[word]) + 1
            stem = f"{_cut(label, STEM_BYTES - 10)} ({number})"
        taken[word] = number
        taken[fold(stem)] = max(1, taken[fold(stem)])
        stems.append(stem)
    return stems


def _cut(text: str, most_bytes: int) -> str:
    return text.encode()[:most_bytes].decode(errors="ignore")


def clean_name(name: str) -> str:
    """Returns a clip name without `.mp4` at its end; ValueError as of `check_name`."""
    end = len(name)
    while name.endswith(".mp4", 0, end):  # no copy: a name may be nothing but suffixes
        end -= 4
    if not name[:end].strip():
        raise UserError(f"clip name '{show(name)}' is empty")
    return check_name(name[:end])


def clean_name_at(place: str, name: object) -> str:
    """Returns `clean_name`; its ValueError begins with the place: a file, line or split."""
    if not isinstance(name, str):
        raise UserError(f"{place} a clip name is text, not {type(name).__name__}: {name!r:.40}")
    try:
        return clean_name(name)
    except ValueError as error:
        raise UserError(f"{place} {error}") from None


def escape(name: str) -> str:
    """Returns a name without white space, as the official format writes it: `First%20Last`."""
    return _UNSAFE.sub(lambda match: urllib.parse.quote(match[0], safe=""), name)


def unescape(text: str) -> str:
    """Returns the name that `escape` turned into this text; any other text stays as it is."""
    if "%" not in text:
        return text
    name = urllib.parse.unquote(text)
    try:
        return check_name(name) if escape(name) == text else text
    except ValueError:
        return text
