"""The parts under a reward: its deadline, its worker's frames, what may be sent, the user's own function."""

import signal
import socket
import struct
import sys
import threading
import time
from collections import OrderedDict
from datetime import date
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.config.imported import imported
from lockstep.errors import RecipeError, Stopped
from lockstep.rollout.deadline import SIGNAL, Overdue, deadline
from lockstep.rollout.reward_frames import Answer, Question, encode, receive, send, unsendable
from lockstep.rollout.rewards import exact_match, raised, refused, reward_named

AT_ONCE_S = 5.0


def spin(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


# ── deadline ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_body_that_takes_too_long_is_interrupted_and_the_signals_are_as_before():
    before = signal.getsignal(SIGNAL)
    began = time.monotonic()
    with pytest.raises(Overdue), deadline(0.1):
        spin(AT_ONCE_S)
    assert 0.1 <= time.monotonic() - began < AT_ONCE_S
    assert signal.getsignal(SIGNAL) is before
    assert not [thread for thread in threading.enumerate() if thread.name == "reward-deadline"]


def test_a_body_that_is_done_in_time_is_left_alone_afterwards_too():
    with deadline(0.15):
        value = 7
    spin(0.3)
    assert value == 7


def test_code_that_retries_on_every_exception_does_not_swallow_it():
    def retries():
        while True:
            try:
                spin(AT_ONCE_S)
            except Exception:
                continue

    with pytest.raises(Overdue), deadline(0.1):
        retries()


def test_what_the_body_raises_itself_comes_out():
    with pytest.raises(ValueError, match="theirs"), deadline(5.0):
        raise ValueError("theirs")


def test_an_alarm_of_the_bodys_own_is_kept():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        with deadline(5.0):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            spin(0.2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert rung == [1]


def test_0_is_never_and_another_thread_has_none():
    done = []

    def elsewhere():
        with deadline(0.05):
            spin(0.2)
        done.append(1)

    with deadline(0.0):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(AT_ONCE_S)
    assert done == [1]


def test_an_inner_deadline_gives_way_to_the_outer_one():
    def both():
        with pytest.raises(Overdue), deadline(0.05):
            spin(AT_ONCE_S)
        spin(AT_ONCE_S)

    with pytest.raises(Overdue), deadline(0.3):
        both()


# ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def ends():
    one, other = socket.socketpair()
    yield one, other
    one.close()
    other.close()


@settings(max_examples=25)
@given(bodies=st.lists(st.binary(max_size=300), max_size=5))
def test_frames_arrive_whole_and_in_order(bodies):
    one, other = socket.socketpair()
    with one, other:
        for body in bodies:
            send(one, body)
        assert [receive(other, 300) for _ in bodies] == bodies


def test_a_frame_in_pieces_is_one_frame(ends):
    one, other = ends
    body = encode(Question("so", {"answer": 4}))
    wire = struct.pack("<I", len(body)) + body

    def drip():
        for at in range(0, len(wire), 3):
            one.sendall(wire[at : at + 3])
            time.sleep(0.001)

    thread = threading.Thread(target=drip)
    thread.start()
    assert msgspec.msgpack.decode(receive(other, 1000), type=Question) == Question("so", {"answer": 4})
    thread.join()


def test_a_peer_that_is_gone_or_late_or_sends_too_much_is_told_apart(ends):
    one, other = ends
    with pytest.raises(TimeoutError):
        receive(other, 10, time.monotonic() + 0.05)
    with pytest.raises(TimeoutError):
        receive(other, 10, time.monotonic() - 1.0)
    one.sendall(struct.pack("<I", 11))
    with pytest.raises(ValueError, match="a frame of 11 bytes"):
        receive(other, 10)
    one.sendall(struct.pack("<I", 5) + b"ab")
    with pytest.raises(TimeoutError):
        receive(other, 10, time.monotonic() + 0.05)


def test_half_a_frame_and_then_the_end_is_an_end(ends):
    one, other = ends
    one.sendall(struct.pack("<I", 5) + b"ab")
    one.close()
    with pytest.raises(EOFError):
        receive(other, 10)


def test_a_peer_that_does_not_read_holds_nobody_up(ends):
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        send(ends[0], bytes(1 << 24), time.monotonic() + 0.1)
    assert time.monotonic() - began < AT_ONCE_S


def test_an_answer_says_a_value_or_an_error():
    for answer in (Answer(0.5), Answer(error="so"), Answer(recipe_error=("a", "b", "c", "d"))):
        assert msgspec.msgpack.decode(encode(answer), type=Answer) == answer


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=15)
@given(item=st.dictionaries(st.text(), plain, max_size=3))
def test_what_is_called_sendable_arrives_as_it_was(item):
    assert unsendable(item) == ""
    assert msgspec.msgpack.decode(encode(Question("", item)), type=Question).item == item


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ({"when": date(2026, 1, 1)}, "item['when'] is a date"),
        ({"a": [1, {"b": {1, 2}}]}, "item['a'][1]['b'] is a set"),
        ({"a": {1.5: "x"}}, "item['a'] has the key 1.5"),
        ({"a": (1, object())}, "item['a'][1] is a object"),
        ({(1, 2): 3}, "item has the key (1, 2)"),
    ],
)
def test_what_is_not_is_named_with_its_place(item, told):
    assert unsendable(item) == told


def test_a_mapping_of_any_kind_may_be_sent():
    assert unsendable(OrderedDict(a=1)) == ""


# ── rewards ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("4", "4", 1.0),
        (" 4\n", "4", 1.0),
        ("4", 4, 1.0),
        ("4.0", "4", 0.0),
        ("", "4", 0.0),
        ("4 4", "4", 0.0),
    ],
)
def test_exact_match_is_of_the_text_without_the_space_around_it(completion, answer, reward):
    assert exact_match(completion, {"answer": answer}) == reward


def test_the_datasets_own_scorer_gets_the_answer_and_its_question():
    asked = []
    items = SimpleNamespace(score_answer=lambda answer, entry: asked.append((answer, entry)) or 0.25)
    assert reward_named("dataset", items)(" so ", {"question": "?"}) == 0.25
    assert asked == [("so", {"question": "?"})]
    with pytest.raises(
        RecipeError, match=r"task\.reward: got 'dataset', expected a dataset with score_answer"
    ):
        reward_named("dataset", [])


def test_an_error_whose_text_raises_again_is_named_by_its_type():
    class OddError(Exception):
        def __str__(self):
            raise RuntimeError

    assert raised(OddError()) == "OddError"
    assert raised(ValueError("x" * 9000)) == f"ValueError: {'x' * 1988}"


def test_a_refused_reward_shows_the_end_of_the_question_and_the_beginning_of_the_completion():
    error = refused("m:f", "nan", "c" * 900, {"question": "q" * 900 + "END"})
    assert "END" in error.hint
    assert len(error.hint) < 600
    assert "\x1b" not in refused("m:f", "nan", "\x1b[2J", {}).hint


# ── a function of the user's ────────────────────────────────────────────────────────────────────────────────

THEIRS = {
    "good": "def f(): return 7\nvalue = 3\nclass C:\n    def __call__(self): return 8\nc = C()\n",
    "broken": "def f(:\n",
    "raises": "raise OSError('no such disk')\n",
    "exits": "import sys; sys.exit(3)\n",
    "stops": "from lockstep.errors import Stopped\nraise Stopped(143)\n",
}


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    for name, text in THEIRS.items():
        (tmp_path / f"theirs_{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"theirs_{name}", raising=False)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_and_whatever_is_called_like_one_are_found(theirs):
    assert imported("theirs_good:f", "task.reward")() == 7
    assert imported("theirs_good:C", "task.reward")()() == 8
    assert imported("theirs_good:c", "task.reward")() == 8
    assert imported("math:sqrt", "task.reward")(4.0) == 2.0


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("theirs_good:absent", "AttributeError"),
        ("theirs_good:value", "no function"),
        ("theirs_good", "AttributeError"),
        ("theirs_good:", "AttributeError"),
        (":f", "ValueError: Empty module name"),
        ("..relative:f", "TypeError"),
        ("theirs_absent:f", "ModuleNotFoundError"),
        ("theirs_broken:f", "SyntaxError"),
        ("theirs_raises:f", "OSError: no such disk"),
        ("theirs_exits:f", "SystemExit: 3"),
    ],
)
def test_what_cannot_be_is_an_error_of_the_recipe_with_its_key(theirs, name, told):
    with pytest.raises(RecipeError, match=r"recipe, key objective\.name") as error:
        imported(name, "objective.name")
    assert told in error.value.got
    assert name in error.value.got


def test_a_signal_that_stops_the_process_is_no_error_of_the_recipe(theirs):
    with pytest.raises(Stopped):
        imported("theirs_stops:f", "task.reward")
