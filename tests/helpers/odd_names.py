"""Two hundred names that break programs: blanks, quotes, HTML, formulas, forms of unicode."""

import unicodedata

FRAGMENTS = (
    *(" ", "  ", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u202e"),
    *('"', "'", "`", ",", ";", "|", "\\", "/", "../", "#", "$"),
    *("{0}", "${HOME}", "[x](y)", "**b**"),
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&amp;", "</td>", "-->"),
    *("=1+1", "+1", "-2+3", "@SUM(A1)", "%20", "%", "%zz", "%2520"),
    *(unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é"), "名前", "🎬", "ß"),
    *("NaN", "null", "-inf", "1e5", "007", ".mp4", "x" * 300),
)


def make_names() -> list[str]:
    """Returns over 200 different names without outer blanks; some differ in one letter alone."""
    forms = ("{}Ada Byron", "Ada{}Byron", "Ada Byron{}", "{0}{0}", "{} {}")
    found = dict.fromkeys(
        form.replace("{0}", part).replace("{}", part).strip()
        for part in FRAGMENTS
        for form in forms
    )
    # As a clip, a name loses `.mp4` at its end, and two clips may not become one.
    return [name for name in found if name and not name.endswith(".mp4")]
