"""Text that others wrote, as it may be shown: what a terminal or a page would obey is its escape."""

import re

OBEYED = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
"""C0 but tab and newline, DEL, C1, what turns the writing's direction, other line ends, halves of a pair."""


def printable(text: str) -> str:
    """The text with what a terminal would obey as its escape."""
    return OBEYED.sub(lambda found: escaped(found[0], "\\x{:02x}"), text)


def escaped(character: str, short: str) -> str:
    """One character's escape; those below U+0100 as ``short`` says."""
    return short.format(ord(character)) if character < "\u0100" else f"\\u{ord(character):04x}"
