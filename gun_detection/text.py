"""Text from outside, such as keys of objects, as people can look at it."""


def printable(text: str) -> str:
    """The text on one line: what cannot be seen, or turns others around, is written out."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def printable_lines(text: str) -> str:
    """Line by line; those after the first are indented, so that none passes for a message."""
    return "\n    ".join(printable(line) for line in text.split("\n"))
