"""A certificate holds for the pair that it was issued for and for no other: each change alone voids it."""

import msgspec
import pytest
import torch
from msgspec.structs import replace

from lockstep.config.recipe import with_sets
from lockstep.errors import RunError
from lockstep.parity import certificate
from lockstep.parity.ladder import climb
from lockstep.runs.certificate import read_certificate


@pytest.fixture
def issued(pair, tmp_path):
    path = tmp_path / "certificate.json"
    certificate.issue(pair, climb(pair).verdicts, path)
    return read_certificate(path)


def test_it_holds_while_nothing_changes(pair, issued):
    assert certificate.changes(issued, pair) == []


def test_each_change_alone_voids_it(pair, issued, monkeypatch):
    def voided(*needles):
        found = certificate.changes(issued, pair)
        assert len(found) >= 1
        assert all(any(needle in change for change in found) for needle in needles), found

    weight = next(pair.trainer._policy.model.parameters())
    with torch.no_grad():
        old = weight.view(-1)[7].clone()
        weight.view(-1)[7] = torch.nextafter(old, old + 1)  # the last bit of one weight
    voided("weights_sha256")
    with torch.no_grad():
        weight.view(-1)[7] = old
    assert certificate.changes(issued, pair) == []

    ready = pair.engine.ready
    for changed, needle in (
        (replace(ready, version="0.0.1"), "engine:"),
        (replace(ready, resolved=ready.resolved | {"attn_implementation": "eager2"}), "attn_implementation"),
        (
            replace(ready, resolved=ready.resolved | {"worker.parameter_dtype": "torch.bfloat16"}),
            "parameter_dtype",
        ),
        (replace(ready, resolved=ready.resolved | {"a_new_default": True}), "a_new_default: nothing → True"),
    ):
        monkeypatch.setattr(pair.engine, "ready", changed)
        voided(needle)
    monkeypatch.setattr(pair.engine, "ready", ready)

    tokenizer = pair.renderer.tokenizer
    template = tokenizer.chat_template
    tokenizer.chat_template = template + " "
    voided("tokenizer_sha256")
    tokenizer.chat_template = template

    epsilon = pair.trainer._policy.model.config.rms_norm_eps
    pair.trainer._policy.model.config.rms_norm_eps = 1e-3
    voided("model_config_sha256")
    pair.trainer._policy.model.config.rms_norm_eps = epsilon

    monkeypatch.setattr(pair.trainer._policy, "head_dtype", torch.bfloat16)
    voided("trainer.head_dtype")
    monkeypatch.undo()

    recipe = pair.recipe
    for override, needle in (
        ("sampling.temperature=0.9", "sampling.temperature"),
        ("objective.clip_low=0.1", "clip_low"),
    ):
        pair.recipe = with_sets(recipe, [override])
        voided(needle)
    pair.recipe = recipe
    assert certificate.changes(issued, pair) == []


def test_a_forged_or_truncated_one_is_refused(pair, issued, tmp_path):
    path = tmp_path / "certificate.json"
    whole = msgspec.json.format(msgspec.json.encode(issued), indent=1)
    path.write_bytes(whole)
    assert read_certificate(path) == issued
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="certificate"):
        read_certificate(path)
    path.write_bytes(whole.replace(b'"PASS"', b'"FAIL"', 1))
    with pytest.raises(RunError, match="digest"):
        read_certificate(path)
    path.write_bytes(whole.replace(issued.pair["weights_sha256"].encode(), b"0" * 64))
    with pytest.raises(RunError, match="digest"):
        read_certificate(path)
