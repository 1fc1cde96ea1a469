"""What others wrote reaches the terminal as text and never as a command to it."""

import json
import os
import subprocess
import sys
import time

import pytest

from lockstep.cli.check import show_result
from lockstep.cli.common import show_ladder
from lockstep.cli.console import OBEYED, UNREAD, Console, emit, fail, guarded, printable, show
from lockstep.cli.live import DRAWN_PER_S, NowTable
from lockstep.cli.main import main
from lockstep.errors import EngineError
from lockstep.parity.ladder import LadderResult
from lockstep.records.verdicts import LAYERS, Finding, Verdict

HOSTILE = "a\x1b]0;owned\x07b\x9b2Jc\rd\x7fe\u202ef\u2066g\u2028h\ud800i\x00j"
SHOWN = r"a\x1b]0;owned\x07b\x9b2Jc\x0dd\x7fe\u202ef\u2066g\u2028h\ud800i\x00j"


def test_everything_that_a_terminal_obeys_is_escaped_and_nothing_else():
    assert printable(HOSTILE) == SHOWN
    kept = "tab\tline\n|trainer − engine| ≤ 1e-3 → é 汉 👍\u200d"
    assert printable(kept) == kept
    controls = {chr(code) for code in [*range(32), *range(127, 160)]} - {"\t", "\n"}
    bidi = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert all(OBEYED.fullmatch(character) for character in controls | bidi)


def test_say_show_fail_and_the_ladder_show_it_escaped(capsys):
    Console().say(HOSTILE)
    show(HOSTILE)
    error = EngineError(HOSTILE, got=HOSTILE, expected=HOSTILE, hint=HOSTILE)
    error.add_note(HOSTILE)
    fail(error, as_json=False)
    found = Finding(
        cause=HOSTILE, effect_nats=1.0, ci95=(0.5, 1.5), n_tokens=3, evidence=HOSTILE, fix=HOSTILE
    )
    show_ladder([Verdict(layer="path", status="FAIL", summary=HOSTILE, n_tokens=3, findings=(found,))])
    out, err = capsys.readouterr()
    assert not OBEYED.search(out + err)
    assert (out.count(SHOWN), err.count(SHOWN)) == (5, 6)


def test_the_clock_is_drawn_and_the_text_in_it_is_not_obeyed(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with guarded(), Console() as console:
        console.say(HOSTILE)
    err = capsys.readouterr().err
    drawn = err.split("\r\x1b[K")
    assert len(drawn) >= 3
    assert all(part.rstrip("\n").endswith(SHOWN) for part in drawn[1:])
    assert not OBEYED.search("".join(drawn))


def test_on_a_terminal_a_table_of_now_stands_under_the_lines_and_is_not_obeyed(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    asked = []

    def now():
        asked.append(len(asked))
        return {"ledger": f"{len(asked)} samples {HOSTILE}"}

    with guarded(), Console() as console:
        with console.live(now):
            time.sleep(3.0 / DRAWN_PER_S)
            console.say(f"step 1 {HOSTILE}")
            drawn = len(asked)
            under_it = capsys.readouterr().err
        console.say("the end")
    assert drawn >= 3, "asked again for each drawing"
    assert f"2 samples {SHOWN}" in under_it
    assert under_it.index("ledger") < under_it.index(f"step 1 {SHOWN}") < under_it.rindex("ledger")
    assert "the end" in capsys.readouterr().err


def test_a_table_that_cannot_be_filled_stands_as_it_was(capsys):
    rows = [{"ledger": "4 samples"}]

    def now():
        if rows:
            return rows.pop()
        raise RuntimeError("dictionary changed size during iteration")

    with NowTable(now, sys.stderr) as table:
        table.above("step 1")
    assert "4 samples" in capsys.readouterr().err


def test_elsewhere_there_is_no_table(capsys):
    with Console() as console, console.live(lambda: pytest.fail("nobody looks")):
        console.say("step 1")
    assert capsys.readouterr().err.endswith("step 1\n")


def test_what_a_users_own_code_prints_is_guarded_too_and_the_streams_come_back():
    code = f"""
import sys
from lockstep.cli.console import guarded
outer = sys.stdout, sys.stderr
with guarded():
    print({HOSTILE!r})
    sys.stderr.writelines([{HOSTILE!r}])
    assert sys.stdout.encoding and not sys.stdout.isatty()
assert (sys.stdout, sys.stderr) == outer
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == SHOWN + "\n"
    assert done.stderr == SHOWN


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_hostile_argument_is_no_command_either(flags):
    done = subprocess.run(
        [sys.executable, "-m", "lockstep.cli.main", "train", b"\x1b]0;x\x07\xc2\x9b\xff.toml", *flags],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    text = (done.stdout + done.stderr).decode()
    assert not OBEYED.search(text)
    assert r"\x1b]0;x\x07\x9b\udcff.toml" in done.stderr.decode()


@pytest.mark.parametrize("words", [["report"], ["compare", "a" * 300], ["certificate", "verify"]])
def test_a_path_that_the_system_refuses_is_no_traceback(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lockstep.cli.main._end_in_order", lambda: None)
    monkeypatch.setattr("sys.argv", ["lockstep", *words, "a" * 300])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (2, 3)
    said = capsys.readouterr().err
    assert "File name too long" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("buffered", [-1, 1])
@pytest.mark.parametrize("words", ["metrics", "metrics --json", "check --help", "report none"])
def test_a_reader_that_goes_ends_a_verb_without_a_word(words, buffered, monkeypatch):
    """``lockstep VERB 2>&1 | head -n 0``, on a real pipe."""
    monkeypatch.setattr("lockstep.cli.main._end_in_order", lambda: None)
    monkeypatch.setattr("sys.argv", ["lockstep", *words.split()])
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffered) as writer, open(os.dup(write), "w", 1) as errors:
        monkeypatch.setattr("sys.stdout", writer)
        monkeypatch.setattr("sys.stderr", errors)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == UNREAD


def test_json_holds_every_character_as_its_own_escape(capsys):
    text = HOSTILE.replace("\ud800", "")
    emit("test", {"text": text, "more": "é"})
    out = capsys.readouterr().out
    assert not OBEYED.search(out)
    assert json.loads(out)["text"] == text
    assert json.loads(out)["more"] == "é"


@pytest.mark.parametrize(
    ("unable", "said"),
    [
        ({"weights"}, "nothing failed; weights needs an engine that Lockstep starts"),
        ({"path", "weights"}, "nothing failed; path and weights need an engine that Lockstep starts"),
        ({"semantics", "path", "weights", "numerics", "objective"}, ""),
        (set(), ""),
    ],
)
def test_a_check_that_could_not_judge_a_layer_says_that_nothing_failed(unable, said, capsys):
    def verdict(layer):
        if layer in unable:
            return Verdict(layer=layer, status="NOT_RUN", summary="not judged", reason="the engine cannot")
        return Verdict(layer=layer, status="PASS", summary="ok", n_tokens=5)

    result = LadderResult([verdict(layer) for layer in LAYERS], None)
    for as_json in (False, True):
        show_result(result, "standard", (), None, as_json=as_json)
        out = capsys.readouterr().out
        assert said in out
        assert ("nothing failed" in out) == bool(said)
    assert json.loads(out)["note"].startswith(said)
