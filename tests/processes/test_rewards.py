"""Whatever a reward does, it ends in a number or in an error that shows the completion.

No hang, no success untrained.
"""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from lockstep.config.recipe import TaskConfig
from lockstep.errors import RecipeError, RewardError, Stopped
from lockstep.records.samples import Sample, Samples
from lockstep.records.tokens import Completion, SamplingParams
from lockstep.rollout.collect import score
from lockstep.rollout.tasks import Task

THEIRS = """\
import ctypes, os, signal, sys, time

ITEMS = [
    {"question": "1+1", "answer": "2", "metadata": {"terms": (1, 1)}},
    {"question": "2+2", "answer": "4"},
]


def items(seed=0, **_):
    return ITEMS


def odd_items(seed=0, **_):
    return [{"question": "1+1", "answer": "2", "metadata": {"seen": {1, 2}}}]


def length(text, item):
    return len(text) + (0.5 if item["question"] == "2+2" else 0.0)


def where(text, item):
    return os.getpid()


def exits(text, item):
    sys.exit(0) if text == "bad" else None
    return 1.0


def interrupts(text, item):
    raise KeyboardInterrupt


def hangs(text, item):
    while text == "bad":
        try:
            time.sleep(60)
        except Exception:
            pass
    return 1.0


def hangs_on(text, item):
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            if text == "twice":
                text = ""
                continue
            raise


def hangs_in_c(text, item):
    ctypes.PyDLL(None).sleep(60) if text == "bad" else None
    return 1.0


def dies(text, item):
    os._exit(0) if text == "bad" else None
    return 1.0


def crashes(text, item):
    ctypes.string_at(0) if text == "bad" else None
    return 1.0


def chatters(text, item):
    print("\\x00" * 100000)
    return "0.25"


def raises(text, item):
    raise Unprintable


class Unprintable(Exception):
    def __str__(self):
        raise ValueError


def not_finite(text, item):
    return float("nan")


def stops(text, item):
    from lockstep.errors import Stopped

    raise Stopped(143)
"""
AT_ONCE_S = 10.0


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task of a user's module, on sys.path as theirs would be."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    made = []

    def make(reward, name="theirs:items", **settings):
        made.append(Task(TaskConfig(name=name, reward=reward, **settings), 0))
        return made[-1]

    yield make
    for one in made:
        one.close()
    sys.modules.pop("theirs", None)


def rewards(task, *texts):
    return list(task.rewards(texts, [task.item(i) for i in range(len(texts))]))


def workers_of_mine():
    return [p for p in psutil.Process().children() if "lockstep.rollout.reward_worker" in p.cmdline()]


@pytest.mark.parametrize("workers", [0, 2])
def test_rewards_come_in_order(task, workers):
    texts = ["a" * n for n in range(9)]
    assert rewards(task("theirs:length", reward_workers=workers), *texts) == [
        n + (0.5 if n % 2 else 0.0) for n in range(9)
    ]
    assert rewards(task("exact_match", reward_workers=workers), "2", "5") == [1.0, 0.0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("reward", "needle"),
    [
        ("exits", "SystemExit: 0"),
        ("interrupts", "KeyboardInterrupt"),
        ("hangs", "no answer in 0.5 s"),
        ("raises", "Unprintable"),
        ("not_finite", "got nan"),
    ],
)
def test_a_reward_that_is_none_is_an_error_with_the_completion(task, workers, reward, needle):
    judged = task(f"theirs:{reward}", reward_workers=workers, reward_timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(RewardError) as raised:
        rewards(judged, "bad", "x\x1b[2J")
    assert time.monotonic() - began < AT_ONCE_S
    assert needle in str(raised.value)
    assert f"reward theirs:{reward}" in raised.value.boundary
    assert "prompt '1+1', completion 'bad'" in raised.value.hint
    assert raised.value.exit_code == 2


def test_a_reward_with_an_alarm_of_its_own_that_swallows_the_first_deadline_meets_the_second(task):
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"no answer in 0.5 s"):
        rewards(task("theirs:hangs_on", reward_timeout_s=0.5), "twice")
    assert 1.4 < time.monotonic() - began < AT_ONCE_S


def test_what_stops_the_process_is_no_error_of_the_reward(task):
    with pytest.raises(Stopped) as stopped:
        rewards(task("theirs:stops"), "x")
    assert stopped.value.code == 143


@pytest.mark.parametrize(
    ("reward", "needle"),
    [
        ("dies", r"the end of its process \(exit status 0\)"),
        ("crashes", r"the end of its process \(SIGSEGV\)"),
        ("hangs_in_c", r"no answer in 0.5 s"),
    ],
)
def test_what_ends_or_wedges_a_worker_is_an_error_and_the_next_rewards_are_computed(task, reward, needle):
    judged = task(f"theirs:{reward}", reward_workers=2, reward_timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(RewardError, match=needle) as raised:
        rewards(judged, "good", "bad", "good")
    assert "prompt '2+2', completion 'bad'" in raised.value.hint
    assert rewards(judged, "good", "good") == [1.0, 1.0]
    assert time.monotonic() - began < AT_ONCE_S
    judged.close()
    assert workers_of_mine() == []


def test_workers_are_processes_of_their_own_and_what_they_print_is_no_answer(task, capfd):
    judged = task("theirs:where", reward_workers=2)
    pids = set(rewards(judged, *"abcdefgh"))
    assert pids == {p.pid for p in workers_of_mine()}
    assert os.getpid() not in pids
    assert rewards(task("theirs:chatters", reward_workers=1), "x") == [0.25]
    assert capfd.readouterr().out == ""


def test_a_worker_ends_with_its_trainer_in_the_middle_of_a_reward(tmp_path):
    (tmp_path / "theirs.py").write_text(THEIRS)
    code = (
        "from lockstep.config.recipe import TaskConfig as Config; "
        "from lockstep.rollout.tasks import Task; import os, threading\n"
        "task = Task(Config("
        "name='theirs:items', reward='theirs:hangs', reward_workers=1, reward_timeout_s=0), 0)\n"
        "threading.Timer(0.5, lambda: ("
        "print(*[w.process.pid for w in task._judge._workers._live], flush=True), os._exit(9))).start()\n"
        "list(task.rewards(['bad'], [task.item(0)]))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 9, done.stderr
    deadline = time.monotonic() + AT_ONCE_S
    while psutil.pid_exists(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rewards_before_a_failing_one_stay_filled_in(task, workers):
    judged = task("theirs:exits", reward_workers=workers)
    texts = ["a", "b", "bad", "c"]
    none = np.empty(0, np.int32)
    made = [
        Sample.of(Completion(at // 2, at % 2, b"", b"", "stop", ()), none, at // 2, text)
        for at, text in enumerate(texts)
    ]
    rollouts = Samples(made, SamplingParams(max_tokens=1))
    with pytest.raises(RewardError):
        score(rollouts, judged, SimpleNamespace(task=judged.config))
    assert rollouts.rewards[:2].tolist() == [1.0, 1.0]
    assert np.isnan(rollouts.rewards[2:]).all()


@pytest.mark.parametrize(
    ("reward", "needle"), [("theirs:no_such", "theirs:no_such"), ("dataset", "a dataset with score_answer")]
)
def test_a_reward_that_no_worker_can_have_is_said_before_anything_is_drawn(task, reward, needle):
    with pytest.raises(RecipeError, match=needle):
        task(reward, reward_workers=1)
    assert workers_of_mine() == []


def test_an_item_that_would_not_arrive_as_it_is_is_named(task):
    judged = task("exact_match", name="theirs:odd_items", reward_workers=1)
    with pytest.raises(RecipeError, match=r"item\['metadata'\]\['seen'\] is a set"):
        rewards(judged, "2")


def test_the_datasets_own_scorer_works_in_a_worker(task):
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    judged = task("dataset", name="reasoning_gym:chain_sum", options=options, reward_workers=1)
    right = judged.item(0)["answer"]
    assert list(judged.rewards([right, "nonsense"], [judged.item(0)] * 2)) == [1.0, 0.0]
