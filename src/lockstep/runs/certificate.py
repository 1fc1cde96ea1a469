"""The certificate as a file: which pair passed which layers, with which figures.

A digest proves that a file is as it was written, not who wrote it: whoever changes a file can digest it
again. A signature by a key of the user's (``signature.py``) proves the second (docs/concepts/certificate.md).
What a pair is, and whether it is still the one that was certified, is ``parity/certificate.py``'s.
"""

import hashlib
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from lockstep.errors import ParityError, RunError
from lockstep.records.verdicts import LAYERS, Verdict
from lockstep.runs.durable import write_atomically
from lockstep.runs.signature import is_signed_by, sign

SCHEMA = "lockstep.certificate/2"
HINT = "lockstep check RECIPE --out DIR issues a new one"


class Certificate(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A proof and what it is a proof of."""

    schema: str = SCHEMA
    issued: str
    """UTC, ISO 8601."""
    depth: Annotated[str, Meta(pattern="^(quick|standard|full)$")] = "standard"
    """How deep the check went."""
    pair: dict[str, Any]
    layers: list[dict[str, Any]]
    planted: tuple[str, ...] = ()
    """Faults that were planted on purpose; with any, it certifies nothing and every reader refuses it."""
    void: str = ""
    """Why it no longer holds, if a later ladder of its run did not pass; every reader then refuses it."""
    digest: str = ""
    """SHA-256 of everything above, as canonical JSON."""
    signature: str = ""
    """``hmac-sha256:<hex>`` over the digest, where a key was given."""


PAIR = (
    "lockstep",
    "weights_sha256",
    "model_config_sha256",
    "tokenizer_sha256",
    "engine",
    "engine_resolved",
    "sampling",
    "trainer",
)
"""What a description of a pair always has."""
MEASURED: dict[str, tuple[str, ...]] = {
    "semantics": ("minimal_detectable_effect_nats", "fit_p50_nats"),
    "path": ("minimal_detectable_effect_nats",),
    "weights": ("minimal_detectable_effect_nats", "before_sync_abs_mean_nats"),
    "numerics": (
        "minimal_detectable_effect_nats",
        "gap_abs_p50_nats",
        "gap_abs_p999_nats",
        "phantom_clip_fraction",
    ),
    "objective": ("minimal_detectable_effect_nats", "gap_abs_p999_nats", "phantom_clip_fraction"),
}
"""Figures that a layer which passed always has, as finite numbers."""


def void(path: Path, reason: str) -> None:
    """Make every reader refuse the certificate at ``path``, if there is one, with this reason.

    One that is void already keeps its first reason; what is no whole certificate is refused as it is. A
    signature is taken off.
    """
    try:
        certificate = whole_certificate(path)
    except RunError:
        return
    if not certificate.void:
        write_certificate(path, msgspec.structs.replace(certificate, void=f"{utc_now()}: {reason}"), b"")


def read_certificate(path: Path, key: bytes = b"") -> Certificate:
    """Read a certificate and check that it is one.

    Args:
        key: of :func:`lockstep.runs.signature.read_key`; the certificate must be signed with it.

    Raises:
        RunError: when it is truncated, of another schema, was changed after it was issued, does not hold five
            layers that passed, or is not signed with the key.
        ParityError: when it is void, or faults were planted in what it is of.
    """
    certificate = whole_certificate(path)
    boundary = f"certificate {path}"
    if certificate.void:  # first: voiding takes the signature off
        raise ParityError(
            boundary,
            got=f"void since {certificate.void}",
            expected="one that no later ladder refuted",
            hint=HINT,
        )
    if key and not is_signed_by(certificate.signature, certificate.digest, key):
        got = "another key's signature" if certificate.signature else "no signature"
        raise RunError(
            boundary,
            got=got,
            expected="a signature by the key of --verify-key",
            hint=f"{HINT}, with --sign-key FILE",
        )
    if certificate.planted:
        got = f"planted faults: {', '.join(certificate.planted)}"
        raise ParityError(
            boundary, got=got, expected="a pair that nothing was planted in", hint=f"{HINT}, without --plant"
        )
    for complaint in _incomplete(certificate):
        raise RunError(
            boundary, got=complaint, expected="five layers, in order, each PASS over tokens", hint=HINT
        )
    return certificate


def whole_certificate(path: Path) -> Certificate:
    """A certificate of this schema whose digest is its content's; it may be void, or prove too little.

    Raises:
        RunError: for any other file.
    """
    boundary = f"certificate {path}"
    try:
        content = path.read_bytes()
        # First: of another schema the fields are others, and one of them would be told in its place.
        schema = msgspec.json.decode(content).get("schema")
        if schema != SCHEMA:
            raise RunError(boundary, got=f"schema {schema!r}", expected=SCHEMA, hint=HINT)
        certificate = msgspec.json.decode(content, type=Certificate)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        # msgspec's own errors are ValueErrors.
        raise RunError(boundary, got=str(error), expected="a whole certificate", hint=HINT) from error
    if certificate.digest != _digest(certificate):
        raise RunError(
            boundary, got="another digest than its content has", expected="the file as issued", hint=HINT
        )
    return certificate


def _incomplete(certificate: Certificate) -> list[str]:
    """What a passing check would have written and this certificate lacks."""
    lacking = []
    names = [layer.get("layer") for layer in certificate.layers]
    if names != list(LAYERS):
        lacking.append(f"layers {names}")
    for layer in certificate.layers:
        try:
            verdict = msgspec.convert(layer, Verdict)
        except msgspec.ValidationError as error:  # a PASS over no tokens among them
            lacking.append(f"layer {layer.get('layer')}: {error}")
            continue
        if verdict.status != "PASS" or verdict.findings:
            lacking.append(f"layer {verdict.layer}: {verdict.status}, {len(verdict.findings)} findings")
        figures = {name: verdict.figures.get(name, "nothing") for name in MEASURED[verdict.layer]}
        lacking += [
            f"layer {verdict.layer}: {name} {figure}"
            for name, figure in figures.items()
            if not _is_number(figure)
        ]
    lacking += [f"a pair without {name}" for name in PAIR if not certificate.pair.get(name)]
    return lacking


def _is_number(figure: Any) -> bool:
    """JSON as read here has no NaN and no infinity."""
    return isinstance(figure, int | float) and not isinstance(figure, bool)


def write_certificate(path: Path, bare: Certificate, key: bytes) -> Certificate:
    """Digest a certificate, sign it where there is a key, and write it.

    Raises:
        RunError: when it cannot be written.
    """
    digest = _digest(bare)
    certificate = msgspec.structs.replace(bare, digest=digest, signature=sign(digest, key) if key else "")
    write_atomically(path, msgspec.json.format(msgspec.json.encode(certificate), indent=1))
    return certificate


def utc_now() -> str:
    """UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _digest(certificate: Certificate) -> str:
    bare = msgspec.structs.replace(certificate, digest="", signature="")
    return hashlib.sha256(msgspec.json.encode(bare, order="sorted")).hexdigest()
