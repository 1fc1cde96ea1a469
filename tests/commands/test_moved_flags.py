"""What were flags of ``check``: they do as they did, and say what to type.

Other flags that contradict each other are refused.
"""

import json
import subprocess
import sys

import pytest


def lockstep(*args):
    command = [sys.executable, "-m", "lockstep.cli.main", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("old", "typed"),
    [
        (["--rollouts", "a b.jsonl", "--model", "m"], "lockstep check-log 'a b.jsonl'"),
        (["r.toml", "--rollouts", "l.jsonl"], "lockstep check-log l.jsonl r.toml"),
        (["r.toml", "--certificate", "c.json"], "lockstep certificate verify c.json r.toml"),
        (["r.toml", "--audit-only"], "lockstep engines audit r.toml"),
    ],
)
def test_a_flag_that_became_a_command_says_on_stderr_what_to_type(old, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = lockstep("check", *old, "--json")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].endswith(f"type: {typed} …")
    assert json.loads(done.stdout)["schema"] == "lockstep.error/1", "stdout is data only"
    assert not any(
        flag in lockstep("check", "--help").stdout for flag in ("--rollouts", "--certificate", "--audit")
    )


@pytest.mark.parametrize(
    "args",
    [
        ["--audit-only"],
        ["r.toml", "--rows", "3"],
        ["r.toml", "--verify-key", "k"],
        ["r.toml", "--sign-key", "k"],
        ["r.toml", "--rollouts", "l", "--plant", "stale_head"],
        ["r.toml", "--rollouts", "l", "--sign-key", "k"],
        ["r.toml", "--rollouts", "l", "--out", "d"],
        ["r.toml", "--engine", "vllm", "--engine-url", "http://127.0.0.1:9"],
    ],
)
def test_flags_that_do_not_go_together_are_refused(args):
    done = lockstep("check", *args)
    assert done.returncode == 2
    assert done.stderr.startswith("error: check: got --")
