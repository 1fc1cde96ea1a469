"""A signature by a key of the user's: HMAC-SHA256 over a digest; the key file is readable to nobody else."""

import hashlib
import hmac
import stat
from pathlib import Path

from lockstep.errors import UsageError

ALGORITHM = "hmac-sha256"
LEAST_KEY_BYTES = 32
"""Least bytes of a key, SHA-256's own size: a shorter key is what would be guessed."""


def read_key(path: Path, flag: str) -> bytes:
    """The bytes of a key file.

    Raises:
        UsageError: for a file that is not there, that others can read, or that is too short.
    """
    hint = f"head -c 32 /dev/urandom > {path} && chmod 600 {path}"
    try:
        mode = path.stat().st_mode
        key = path.read_bytes() if stat.S_ISREG(mode) else b""  # a device may have no end
    except OSError as error:
        raise UsageError(
            f"flag {flag} {path}", got=error.strerror or str(error), expected="a key file", hint=hint
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        got = f"mode {stat.S_IMODE(mode):04o}: others can read or write it"
        raise UsageError(
            f"flag {flag} {path}", got=got, expected="mode 0600 or 0400", hint=f"chmod 600 {path}"
        )
    if len(key) < LEAST_KEY_BYTES:
        expected = f"at least {LEAST_KEY_BYTES} random bytes"
        raise UsageError(f"flag {flag} {path}", got=f"{len(key)} bytes", expected=expected, hint=hint)
    return key


def sign(digest: str, key: bytes) -> str:
    """``hmac-sha256:<hex>``."""
    return f"{ALGORITHM}:{hmac.new(key, digest.encode(), hashlib.sha256).hexdigest()}"


def is_signed_by(signature: str, digest: str, key: bytes) -> bool:
    """True when ``signature`` was made over ``digest`` with ``key``; compared in constant time."""
    return hmac.compare_digest(signature.encode(), sign(digest, key).encode())
