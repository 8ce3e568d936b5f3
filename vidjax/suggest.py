"""What a misspelt word was meant to be."""

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Finds the known word that is spelled most like another one.

    Args:
      word: the word as it was typed.
      known: the words that exist. Of a dotted name such as `optim.decay` the last part is enough.
      cutoff: least similarity of the spellings, from 0 (anything) to 1 (equal).

    Returns:
      The known word, or None if none is close enough.
    """
    known = list(known)
    last = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    candidates = difflib.get_close_matches(word, last or known, n=1, cutoff=cutoff)
    return (candidates or last or [None])[0]


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown word.

    Args:
      word: the word as it was typed.
      known: the words that exist.

    Returns:
      `did you mean 'optim.decay'?`, or a list of the known words if none is close.
    """
    known = list(known)
    match = closest(word, known)
    return f"did you mean '{match}'?" if match else f"choose from {', '.join(known) or 'none'}"
