"""Names, settings and messages of other hands, as text that does nothing but be read."""


def plain(text: object) -> str:
    """One line without control characters, whatever a terminal, a page or a file would make of them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def label(text: object, most: int = 200) -> str:
    """The same for a figure, where a dollar sign begins no formula and a first underscore hides nothing."""
    shown = plain(text)[:most].replace("$", r"\$")
    return f"\u2009{shown}" if shown.startswith("_") else shown
