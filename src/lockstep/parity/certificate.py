"""The certificate: which pair passed which layers, with which figures. It is digested; anything that changes voids it."""

import hashlib
import re
import time
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

import lockstep
from lockstep.errors import RunError
from lockstep.parity.pair import Pair
from lockstep.policy.fingerprint import config_digest, tokenizer_digest, weights_digest
from lockstep.records.verdicts import Verdict
from lockstep.runs.manifest import processor
from lockstep.runs.write import plain, write_atomically

VOLATILE = re.compile(r"(?:^|[._])(?:pid|instance|port|ports|path|ip|rank)(?:$|[._])", re.IGNORECASE)
"""Words in resolved names that differ from start to start and cannot move a log-probability."""


class Certificate(Struct, frozen=True, kw_only=True):
    """A proof and what it is a proof of."""

    schema: str = "lockstep.certificate/1"
    issued: str
    depth: str = "standard"
    """Of the check: quick, standard or full."""
    pair: dict[str, Any]
    layers: list[dict[str, Any]]
    digest: str = ""
    """SHA-256 of everything above, as canonical JSON."""


def describe_pair(pair: Pair) -> dict[str, Any]:
    """Everything that, when it changes, voids a certificate."""
    ready = pair.engine.ready
    return {
        "lockstep": lockstep.__version__,
        "hardware": {"processor": processor(), "trainer_device": str(pair.policy.head.device)},
        "weights_sha256": weights_digest(pair.policy.model),
        "model_config_sha256": config_digest(pair.policy.model),
        "tokenizer_sha256": tokenizer_digest(pair.renderer.tokenizer),
        "engine": f"{ready.engine} {ready.version} ({ready.generation})",
        "engine_resolved": {k: v for k, v in sorted(ready.resolved.items()) if not VOLATILE.search(k)},
        "sampling": pair.recipe.sampling,
        "objective": pair.recipe.objective,
        "trainer": {
            "model_class": type(pair.policy.model).__name__,
            "dtype": str(pair.policy.model.dtype),
            "head_dtype": str(pair.policy.head_dtype),
            "share_prompts": pair.policy.share_prompts,
        },
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


def issue(pair: Pair, verdicts: list[Verdict], path: Path, depth: str = "standard") -> Certificate:
    """Write a certificate for verdicts that all passed."""
    if any(verdict.status != "PASS" for verdict in verdicts):
        raise ValueError("a certificate is issued for passing verdicts only")
    layers = [plain(verdict) for verdict in verdicts]
    issued = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    bare = Certificate(issued=issued, depth=depth, pair=plain(describe_pair(pair)), layers=layers)
    certificate = msgspec.structs.replace(bare, digest=_digest(bare))
    write_atomically(path, msgspec.json.format(msgspec.json.encode(certificate), indent=1))
    return certificate


def read_certificate(path: Path) -> Certificate:
    """Read and check a certificate.

    Raises:
        RunError: when it is truncated, of another schema, or was changed after it was issued.
    """
    hint = "lockstep check RECIPE issues a new one"
    try:
        certificate = msgspec.json.decode(path.read_bytes(), type=Certificate)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise RunError(f"certificate {path}", got=str(error), expected="a whole certificate", hint=hint) from error
    if certificate.digest != _digest(msgspec.structs.replace(certificate, digest="")):
        raise RunError(f"certificate {path}", got="another digest than its content has", expected="the file as issued", hint=hint)
    return certificate


def _digest(certificate: Certificate) -> str:
    return hashlib.sha256(msgspec.json.encode(certificate, order="sorted")).hexdigest()
