"""What a certificate is of: the pair, that is everything which voids the certificate when it changes.

The file itself, what makes a reader refuse it, and how it is voided are ``runs/certificate.py``'s.
"""

from pathlib import Path
from typing import Any

import lockstep
from lockstep.parity.pair import Pair
from lockstep.policy.fingerprint import tokenizer_digest
from lockstep.records.verdicts import LAYERS, Verdict
from lockstep.runs.certificate import Certificate, utc_now, write_certificate
from lockstep.runs.manifest import processor, steady
from lockstep.runs.strict import plain


def describe_pair(pair: Pair) -> dict[str, Any]:
    """Everything that, when it changes, voids a certificate."""
    ready = pair.engine.ready
    digests = pair.trainer.digests()
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
    then = _flat(certificate.pair)
    now = _flat(plain(describe_pair(pair)))
    return [
        f"{name}: {then.get(name, 'nothing')} → {now.get(name, 'nothing')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def issue(
    pair: Pair, verdicts: list[Verdict], path: Path, depth: str = "standard", key: bytes = b""
) -> Certificate:
    """Write a certificate for five verdicts that all passed.

    A pair with planted faults gets one that says so and that every reader refuses.

    Args:
        key: of :func:`lockstep.runs.signature.read_key`; the certificate is signed with it.
    """
    if [verdict.layer for verdict in verdicts] != list(LAYERS) or any(
        verdict.status != "PASS" for verdict in verdicts
    ):
        raise ValueError("a certificate is issued for five passing verdicts only")
    bare = Certificate(
        issued=utc_now(),
        depth=depth,
        pair=plain(describe_pair(pair)),
        layers=[plain(verdict) for verdict in verdicts],
        planted=pair.engine.altered_by,
    )
    return write_certificate(path, bare, key)
