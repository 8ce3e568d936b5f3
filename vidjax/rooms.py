"""Commands that are not of runs alone: each lives in the room that it is about.

Only that room is imported: fields of configurations, which all other commands read, take longer
than a gallery takes to answer.
"""

from collections.abc import Sequence


def run(words: Sequence[str]) -> int | None:
    """Runs the command that the first word names; returns its exit code, None for no such word."""
    first, rest = words[:1], words[1:]
    if first == ["gallery"]:
        from vidjax.gallery import commands

        return commands.main(rest)
    if first == ["extract"]:
        from vidjax.extract import commands

        return commands.main(rest)
    if first == ["who"]:
        from vidjax import who

        return who.main(rest)
    if first == ["forget"]:
        from vidjax import forget

        return forget.main(rest)
    return None
