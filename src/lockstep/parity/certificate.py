"""The certificate: which pair passed which layers, with which figures. It is digested; anything that changes voids it.

A digest proves that a file is as it was written, not who wrote it: whoever changes a file can digest it again. A signature by a
key of the user's (``signature.py``) proves the second (docs/concepts/certificate.md).
"""

import hashlib
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

import lockstep
from lockstep.errors import ParityError, RunError
from lockstep.parity.pair import Pair
from lockstep.parity.signature import is_signed_by, sign
from lockstep.policy.fingerprint import tokenizer_digest
from lockstep.records.verdicts import LAYERS, Verdict
from lockstep.runs.manifest import processor, steady
from lockstep.runs.write import plain, write_atomically

SCHEMA = "lockstep.certificate/2"
HINT = "lockstep check RECIPE --out DIR issues a new one"


class Certificate(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A proof and what it is a proof of."""

    schema: str = SCHEMA
    issued: str
    """UTC, ISO 8601."""
    depth: Annotated[str, Meta(pattern="^(quick|standard|full)$")] = "standard"
    """Of the check."""
    pair: dict[str, Any]
    layers: list[dict[str, Any]]
    planted: tuple[str, ...] = ()
    """Faults that were planted on purpose; with any, it certifies nothing and every reader refuses it."""
    void: str = ""
    """Why it no longer holds, where a later ladder of its run did not pass; every reader refuses it with this."""
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
    "numerics": ("minimal_detectable_effect_nats", "gap_abs_p50_nats", "gap_abs_p999_nats", "phantom_clip_fraction"),
    "objective": ("minimal_detectable_effect_nats", "gap_abs_p999_nats", "phantom_clip_fraction"),
}
"""Figures that a layer which passed always has, as finite numbers."""


def describe_pair(pair: Pair) -> dict[str, Any]:
    """Everything that, when it changes, voids a certificate."""
    ready, digests = pair.engine.ready, pair.trainer.digests()
    return {
        "lockstep": lockstep.__version__,
        "hardware": {"processor": processor()},
        "weights_sha256": digests["weights_sha256"],
        "model_config_sha256": digests["config_sha256"],
        "tokenizer_sha256": tokenizer_digest(pair.renderer.tokenizer),
        "engine": f"{ready.engine} {ready.version} ({ready.generation})",
        "engine_resolved": steady(ready.resolved),
        "sampling": pair.recipe.sampling,
        "objective": pair.recipe.objective,
        "trainer": pair.trainer.describe(),
    }


def changes(certificate: Certificate, pair: Pair) -> list[str]:
    """What is no longer as it was certified, ``name: then → now``; empty while the certificate holds."""
    then, now = _flat(certificate.pair), _flat(plain(describe_pair(pair)))
    return [
        f"{name}: {then.get(name, 'nothing')} → {now.get(name, 'nothing')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def issue(pair: Pair, verdicts: list[Verdict], path: Path, depth: str = "standard", key: bytes = b"") -> Certificate:
    """Write a certificate for five verdicts that all passed.

    A pair with planted faults gets one that says so and that every reader refuses.

    Args:
        key: of :func:`lockstep.parity.signature.read_key`; the certificate is signed with it.
    """
    if [verdict.layer for verdict in verdicts] != list(LAYERS) or any(verdict.status != "PASS" for verdict in verdicts):
        raise ValueError("a certificate is issued for five passing verdicts only")
    bare = Certificate(
        issued=_now(),
        depth=depth,
        pair=plain(describe_pair(pair)),
        layers=[plain(verdict) for verdict in verdicts],
        planted=pair.engine.altered_by,
    )
    return _write(path, bare, key)


def void(path: Path, reason: str) -> None:
    """Make every reader refuse the certificate at ``path``, if there is one, with this reason.

    One that is void already keeps its first reason; what is no whole certificate is refused as it is. A signature is taken off.
    """
    try:
        certificate = _whole(path)
    except RunError:
        return
    if not certificate.void:
        _write(path, msgspec.structs.replace(certificate, void=f"{_now()}: {reason}"), b"")


def read_certificate(path: Path, key: bytes = b"") -> Certificate:
    """Read a certificate and check that it is one.

    Args:
        key: of :func:`lockstep.parity.signature.read_key`; the certificate must be signed with it.

    Raises:
        RunError: when it is truncated, of another schema, was changed after it was issued, does not hold five layers that passed,
            or is not signed with the key.
        ParityError: when it is void, or faults were planted in what it is of.
    """
    certificate = _whole(path)
    boundary = f"certificate {path}"
    if key and not is_signed_by(certificate.signature, certificate.digest, key):
        got = "another key's signature" if certificate.signature else "no signature"
        raise RunError(boundary, got=got, expected="a signature by the key of --verify-key", hint=f"{HINT}, with --sign-key FILE")
    if certificate.void:
        raise ParityError(boundary, got=f"void since {certificate.void}", expected="one that no later ladder refuted", hint=HINT)
    if certificate.planted:
        got = f"planted faults: {', '.join(certificate.planted)}"
        raise ParityError(boundary, got=got, expected="a pair that nothing was planted in", hint=f"{HINT}, without --plant")
    for complaint in _incomplete(certificate):
        raise RunError(boundary, got=complaint, expected="five layers, in order, each PASS over tokens", hint=HINT)
    return certificate


def _whole(path: Path) -> Certificate:
    """A certificate of this schema whose digest is its content's."""
    boundary = f"certificate {path}"
    try:
        content = path.read_bytes()
        schema = msgspec.json.decode(content).get("schema")
        if schema != SCHEMA:
            raise RunError(boundary, got=f"schema {schema!r}", expected=SCHEMA, hint=HINT)
        certificate = msgspec.json.decode(content, type=Certificate)
    except (OSError, ValueError, AttributeError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise RunError(boundary, got=str(error), expected="a whole certificate", hint=HINT) from error
    if certificate.digest != _digest(certificate):
        raise RunError(boundary, got="another digest than its content has", expected="the file as issued", hint=HINT)
    return certificate


def _incomplete(certificate: Certificate) -> list[str]:
    """What a passing check would have written and this certificate lacks."""
    found = []
    names = [layer.get("layer") for layer in certificate.layers]
    if names != list(LAYERS):
        found.append(f"layers {names}")
    for layer in certificate.layers:
        try:
            verdict = msgspec.convert(layer, Verdict)
        except msgspec.ValidationError as error:  # a PASS over no tokens among them
            found.append(f"layer {layer.get('layer')}: {error}")
            continue
        if verdict.status != "PASS" or verdict.findings:
            found.append(f"layer {verdict.layer}: {verdict.status}, {len(verdict.findings)} findings")
        figures = {name: verdict.figures.get(name, "nothing") for name in MEASURED[verdict.layer]}
        found += [f"layer {verdict.layer}: {name} {figure}" for name, figure in figures.items() if not _is_number(figure)]
    found += [f"a pair without {name}" for name in PAIR if not certificate.pair.get(name)]
    return found


def _is_number(figure: Any) -> bool:
    """JSON as read here has no NaN and no infinity."""
    return isinstance(figure, int | float) and not isinstance(figure, bool)


def _write(path: Path, bare: Certificate, key: bytes) -> Certificate:
    digest = _digest(bare)
    certificate = msgspec.structs.replace(bare, digest=digest, signature=sign(digest, key) if key else "")
    write_atomically(path, msgspec.json.format(msgspec.json.encode(certificate), indent=1))
    return certificate


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _digest(certificate: Certificate) -> str:
    bare = msgspec.structs.replace(certificate, digest="", signature="")
    return hashlib.sha256(msgspec.json.encode(bare, order="sorted")).hexdigest()
