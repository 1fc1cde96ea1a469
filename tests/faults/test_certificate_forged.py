"""A certificate that proves less than a passing check is refused, whatever its digest says.

A signature says who wrote it.
"""

import os

import msgspec
import pytest
from msgspec.structs import replace

from lockstep.errors import LockstepError, ParityError, RunError, UsageError
from lockstep.faults.at_load import AtLoad
from lockstep.parity import certificate
from lockstep.parity.certificate import issue
from lockstep.parity.ladder import climb
from lockstep.runs.certificate import read_certificate, void, write_certificate
from lockstep.runs.signature import read_key

KEY, OTHER = b"k" * 32, b"o" * 32


@pytest.fixture(scope="module")
def verdicts(session):
    return climb(session.pair).verdicts


@pytest.fixture
def path(tmp_path):
    return tmp_path / "certificate.json"


@pytest.fixture
def issued(pair, verdicts, path):
    return issue(pair, verdicts, path)


def forged(path, issued, **changes):
    """What anyone can write: any content, with the digest of that content."""
    return write_certificate(path, replace(issued, **changes), b"")


def layer(issued, number, **changes):
    layers = [dict(entry) for entry in issued.layers]
    layers[number] |= changes
    return layers


def test_the_trainers_libraries_threads_and_device_are_part_of_the_pair(issued, pair):
    import torch
    import transformers

    trainer = issued.pair["trainer"]
    assert (trainer["torch"], trainer["transformers"]) == (torch.__version__, transformers.__version__)
    assert (trainer["threads"], trainer["device"]) == (torch.get_num_threads(), "cpu")
    for name, other in (("torch", "2.0.0"), ("transformers", "4.0.0"), ("threads", 64), ("device", "cuda:0")):
        other_pair = issued.pair | {"trainer": trainer | {name: other}}
        changed = certificate.changes(replace(issued, pair=other_pair), pair)
        assert changed == [f"trainer.{name}: {other} → {trainer[name]}"]


FORGERIES = {
    "no layer": lambda c: {"layers": []},
    "a layer left out": lambda c: {"layers": c.layers[:4]},
    "a layer twice": lambda c: {"layers": [*c.layers[:4], c.layers[3]]},
    "another order": lambda c: {"layers": c.layers[::-1]},
    "a layer that failed": lambda c: {"layers": layer(c, 3, status="FAIL")},
    "a layer that was not run": lambda c: {"layers": layer(c, 2, status="NOT_RUN", reason="no")},
    "a PASS over nothing": lambda c: {"layers": layer(c, 1, n_tokens=0)},
    "a PASS with a finding": lambda c: {
        "layers": layer(
            c,
            0,
            findings=[
                {"cause": "x", "effect_nats": 1.0, "ci95": [0, 1], "n_tokens": 9, "fix": "y", "evidence": "z"}
            ],
        )
    },
    "no figures": lambda c: {"layers": layer(c, 3, figures={})},
    "a figure that is no number": lambda c: {
        "layers": layer(c, 3, figures=c.layers[3]["figures"] | {"gap_abs_p999_nats": {"nonfinite": "nan"}})
    },
    "another depth": lambda c: {"depth": "none"},
    "no pair": lambda c: {"pair": {}},
    "no weights in the pair": lambda c: {"pair": c.pair | {"weights_sha256": ""}},
    "another schema": lambda c: {"schema": "lockstep.certificate/1"},
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_one_is_refused_although_its_digest_is_right(name, issued, path):
    forged(path, issued)
    assert read_certificate(path) == issued
    forged(path, issued, **FORGERIES[name](issued))
    with pytest.raises(RunError, match="certificate"):
        read_certificate(path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"{}", b"\xff", b"[" * 100_000, b'{"schema": "lockstep.certificate/2"}']
)
def test_what_is_no_certificate_is_refused_by_name(content, path):
    path.write_bytes(content)
    with pytest.raises(RunError, match="certificate"):
        read_certificate(path)


def test_an_unknown_field_is_refused(issued, path):
    path.write_bytes(msgspec.json.encode(msgspec.to_builtins(issued) | {"note": "trust me"}))
    with pytest.raises(RunError, match="unknown field `note`"):
        read_certificate(path)


def test_a_void_one_says_why_to_every_reader(issued, path):
    void(path, "layer weights of the ladder before step 12 did not pass")
    with pytest.raises(ParityError, match=r"void since .*before step 12") as raised:
        read_certificate(path)
    assert raised.value.exit_code == 1
    with pytest.raises(ParityError, match="before step 12"):
        read_certificate(
            path, b"k" * 32
        )  # voiding takes the signature off, which is not what is wrong with it
    void(path, "another reason")
    with pytest.raises(ParityError, match="before step 12"):
        read_certificate(path)
    void(path.with_name("none.json"), "nothing is made of nothing")
    assert not path.with_name("none.json").exists()


def test_a_planted_fault_that_nothing_caught_leaves_no_certificate_that_holds(
    pair, verdicts, path, monkeypatch
):
    monkeypatch.setattr(pair, "engine", AtLoad(pair.engine, ("stale_head",)))
    assert issue(pair, verdicts, path).planted == ("stale_head",)
    with pytest.raises(ParityError, match="stale_head"):
        read_certificate(path)


def test_only_five_passing_layers_are_certified(pair, verdicts, path):
    for too_few in ([], verdicts[:4], [*verdicts[1:], verdicts[0]]):
        with pytest.raises(ValueError, match="five passing"):
            issue(pair, too_few, path)
    assert not path.exists()


def test_a_signature_is_of_one_key_and_one_content(pair, verdicts, path, issued):
    with pytest.raises(RunError, match="no signature"):
        read_certificate(path, KEY)
    signed = issue(pair, verdicts, path, key=KEY)
    assert read_certificate(path, KEY) == signed == read_certificate(path)
    with pytest.raises(RunError, match="another key"):
        read_certificate(path, OTHER)
    # Digested again, the old signature put back.
    other = write_certificate(path, replace(signed, depth="full"), b"")
    path.write_bytes(msgspec.json.encode(replace(other, signature=signed.signature)))
    assert read_certificate(path).depth == "full"
    with pytest.raises(RunError, match="another key"):
        read_certificate(path, KEY)


def test_a_key_is_long_and_nobody_elses(tmp_path):
    key = tmp_path / "key"
    with pytest.raises(UsageError, match="No such file"):
        read_key(key, "--sign-key")
    key.write_bytes(os.urandom(32))
    key.chmod(0o640)
    with pytest.raises(UsageError, match="mode 0640"):
        read_key(key, "--sign-key")
    key.chmod(0o600)
    assert len(read_key(key, "--sign-key")) == 32
    key.write_bytes(b"short")
    with pytest.raises(UsageError, match="5 bytes"):
        read_key(key, "--sign-key")


def command(*args):
    """The exit code and the error of a command."""
    from lockstep.cli.main import app

    try:
        return app([*map(str, args)], standalone_mode=False) or 0, ""
    except LockstepError as error:
        return error.exit_code, str(error)


@pytest.fixture
def flags(recipe, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(
        f'[model]\npath = "{recipe.model.path}"\n[engine]\nname = "transformers"\nmax_model_len = 128\n'
        '[task]\nname = "reasoning_gym:basic_arithmetic"\n[task.options]\nmin_terms = 2\nmax_terms = 2\n'
        "min_digits = 1\nmax_digits = 1\n[sampling]\nmax_tokens = 5\n[training]\nsteps = 1\n"
        "[parity]\nprobe_prompts = 8\n"
    )
    return [file]


@pytest.fixture
def keys(tmp_path):
    for file in (tmp_path / "key", tmp_path / "other"):
        file.write_bytes(os.urandom(40))
        file.chmod(0o600)
    return tmp_path / "key", tmp_path / "other"


def test_the_commands_sign_verify_and_void(flags, keys, tmp_path, capsys):
    out = tmp_path / "out"
    key, other = keys
    held = out / "certificate.json"
    verify = ["certificate", "verify", held]
    check = ["check", *flags, "--depth", "quick"]
    assert command(*check, "--out", out, "--sign-key", key) == (0, "")
    assert command(*verify, *flags, "--verify-key", key) == (0, "")
    assert "by the key of --verify-key" in capsys.readouterr().out
    assert command("check", *flags, "--certificate", held, "--verify-key", key) == (0, ""), "the old flag"
    old = capsys.readouterr()
    assert "by the key of --verify-key" in old.out
    assert "type: lockstep certificate verify" in old.err
    code, error = command(*verify, *flags, "--verify-key", other)
    assert code == 3
    assert "another key" in error
    assert command(*verify, *flags, "--set", "sampling.top_k=3") == (1, "")
    assert "void: sampling.top_k: 0 → 3" in capsys.readouterr().out
    code, _ = command(*check, "--out", out, "--set", "sampling.top_k=3")
    assert code == 1
    for pair in ([], flags):
        code, error = command(*verify, *pair)
        assert code == 1
        assert "layer semantics of a later check here did not pass" in error


def test_without_a_pair_the_file_alone_is_verified_and_that_is_no_pass(issued, path, capsys):
    import json

    assert command("certificate", "verify", path, "--json") == (3, "")
    document = json.loads(capsys.readouterr().out)
    assert (document["verdict"], document["signature"], document["changes"]) == ("NOT_RUN", "none", [])
    assert "not compared with any pair" in document["reason"]
    path.write_bytes(path.read_bytes()[:-2])
    assert command("certificate", "verify", path)[0] == 3


def test_a_key_goes_with_what_it_is_for(flags, tmp_path):
    for use in (["--verify-key", "k"], ["--sign-key", "k"], ["--verify-key", "k", "--out", tmp_path / "o"]):
        code, error = command("check", *flags, *use)
        assert code == 2
        assert f"{use[0]} " in error
