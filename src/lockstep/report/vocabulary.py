"""What a token's id stands for, read off a ``tokenizer.json`` without the tokenizers library.

Two ways to write bytes as text are known: byte-level BPE's table of 256 characters (GPT-2 and after), and
``▁`` for a space. A token that is no whole UTF-8 shows its bytes. Shown is what a *token* is, so a character
that two tokens make up together shows as bytes in both.
"""

import re
from pathlib import Path
from typing import Any

import msgspec

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """Texts of tokens; ids alone where the file is not there or is of another kind."""

    def __init__(self, texts: dict[int, str], why_not: str = "") -> None:
        self.texts = texts
        self.why_not = why_not

    def text(self, token: int) -> str:
        """The token's text, or its id in brackets."""
        return self.texts.get(token, f"⟨{token}⟩")


def read_vocabulary(model: Path) -> Vocabulary:
    """The vocabulary of a model's directory."""
    path = model / "tokenizer.json"
    try:
        table = msgspec.json.decode(path.read_bytes())
        known = table["model"]["vocab"]
        # BPE has a table of ids; Unigram a list of (text, score), whose places are the ids.
        pairs = known.items() if isinstance(known, dict) else ((one[0], at) for at, one in enumerate(known))
        bytewise = "ByteLevel" in str(table.get("decoder")) + str(table.get("pre_tokenizer"))
        texts = {int(token): _text(text, bytewise=bytewise) for text, token in pairs}
        texts |= {int(added["id"]): str(added["content"]) for added in table.get("added_tokens") or ()}
    except (OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError, IndexError) as error:
        return Vocabulary({}, f"tokens are shown by id: no tokenizer.json could be read ({_said(error)})")
    return Vocabulary(texts)


def _said(error: Exception) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else type(error).__name__


def _text(text: str, *, bytewise: bool) -> str:
    if bytewise and all(character in OF_CHARACTER for character in text):
        return _of_bytes(bytes(OF_CHARACTER[character] for character in text))
    if found := BYTE.fullmatch(text):
        return _of_bytes(bytes([int(found[1], 16)]))
    return text.replace("▁", " ")


def _of_bytes(content: bytes) -> str:
    return content.decode("utf-8", errors="backslashreplace")


def _characters() -> dict[str, int]:
    """GPT-2's table (encoder.py, ``bytes_to_unicode``): printable bytes stand for themselves."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + at): byte for at, byte in enumerate(rest)}


OF_CHARACTER: dict[str, Any] = _characters()
