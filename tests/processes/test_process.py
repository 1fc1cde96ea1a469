"""A worker that dies, is silent, lies or is unwanted ends within seconds, and all who wait are told why."""

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from lockstep.engines.base import EngineSpec
from lockstep.engines.environments.locate import Environment
from lockstep.engines.process import (
    SHORT_PATH,
    WorkerProcess,
    WorkerProgram,
    private_directory,
    scarce_memory,
)
from lockstep.engines.vllm.served import CORE_ERROR
from lockstep.engines.worker_engine import WorkerEngine
from lockstep.errors import EngineDied, EngineError, ProtocolError
from lockstep.records.messages import Draw, Drawn, Score, Scored
from lockstep.records.tokens import SamplingParams, pack_ids
from tests import worker_that_lies

LOG = """\
(EngineCore pid=31) ERROR 11-22 01:18:52 [core.py:1512] EngineCore encountered a fatal error.
(EngineCore pid=31) ERROR 11-22 01:18:52 [core.py:1512]   File "gdn_attn.py", line 81, in forward
(EngineCore pid=31) ERROR 11-22 01:18:52 [core.py:1512] AssertionError: CPU GDN attention requires BF16.
(MainProcess pid=30) ERROR 11-22 01:18:52 [async_llm.py:906] EngineDeadError: \
EngineCore encountered an issue. See above.
"""
AT_ONCE_S = 5.0
PROGRAM = WorkerProgram("-", temporary=("ITS_OWN_BASE",))
IDS = [pack_ids([5, 6, 7])]


def test_the_cores_own_error_is_found_and_not_the_one_that_points_at_it():
    assert CORE_ERROR.findall(LOG) == ["AssertionError: CPU GDN attention requires BF16."]


@pytest.fixture
def start(tmp_path):
    """Start ``worker_that_lies.py`` as an engine's worker."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{worker_that_lies.__file__}" "$@"\n')
    python.chmod(0o700)
    started = []

    def worker(program=PROGRAM, **config):
        process = WorkerProcess(
            python, program, json.dumps(config).encode(), dict(os.environ), tmp_path / "engine.log"
        )
        started.append(process)
        return process

    yield worker
    for process in started:
        process.close()


def gone(process):
    """True when neither the process nor its directory is left."""
    return process.popen.poll() is not None and not process.directory.exists()


def test_an_honest_worker_is_believed(start):
    process = start()
    assert process.wait_ready(30).engine == "fake"
    reply = process.request(Drawn, Draw, IDS, [SamplingParams(max_tokens=3, n=2)], timeout_s=30)
    assert [np.frombuffer(c.token_ids, np.int32).tolist() for c in reply.completions] == [[5, 6, 7]] * 2
    assert (
        process.request(Scored, Score, IDS, timeout_s=30).scores[0].logprobs == np.float32([-1, -1]).tobytes()
    )


def test_an_adapter_is_what_its_worker_is_started_with(start, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text((tmp_path / "python").read_text())
    (tmp_path / "bin" / "python").chmod(0o700)
    known = {
        "name": "vllm",
        "version": "0.32.0",
        "generation": "V1",
        "flavour": "cpu",
        "digest": "",
        "smoke": "",
        "built": "",
    }
    environment = Environment(**known, size_bytes=0, path=str(tmp_path))
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    spec = EngineSpec(
        model_path=tmp_path,
        dtype="float32",
        head_dtype="float32",
        max_model_len=8,
        options={},
        weights_dir=tmp_path,
        log_path=tmp_path / "engine.log",
    )
    engine = WorkerEngine(spec, environment, PROGRAM, {}, {"LIAR_START_S": "0.1"})
    try:
        engine.wait_ready()
        assert (engine.ready.engine, engine.vocabulary) == ("fake", 8)
        drawn = engine.sample([np.array([5, 6, 7])], [SamplingParams(max_tokens=3, n=2)])
        assert [np.frombuffer(c.token_ids, np.int32).tolist() for c in drawn] == [[5, 6, 7]] * 2
        (scores,) = engine.score([np.array([5, 6, 7])])
        np.testing.assert_array_equal(scores, np.float32([-1, -1]))
    finally:
        engine.close()
    assert gone(engine._process)


@pytest.mark.parametrize(
    ("answer", "kind", "needle"),
    [
        ("garbage", ProtocolError, r"\xc1 no msgpack"),
        ("death", EngineDied, "exit status -7"),
        ("silence", EngineError, "no answer"),
    ],
)
def test_everyone_who_waits_is_told_at_once(start, answer, kind, needle):
    """Three requests wait; the worker answers the first of them wrongly, dies of it, or says nothing."""
    process = start(answer=answer)
    told = []
    process.wait_ready(30)

    def ask(timeout_s):
        try:
            process.request(Scored, Score, IDS, timeout_s=timeout_s)
        except (EngineError, ProtocolError) as error:
            told.append(error)

    began = time.monotonic()
    threads = [threading.Thread(target=ask, args=[1.0 if answer == "silence" else 1800.0]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(AT_ONCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert time.monotonic() - began < AT_ONCE_S
    assert len(told) == 3
    assert all(isinstance(error, kind) and needle in str(error) for error in told), told
    process.popen.wait(AT_ONCE_S)


def test_a_time_out_says_what_was_waited_for(start):
    process = start(answer="silence")
    process.wait_ready(30)
    with pytest.raises(
        EngineError, match=r"sample \(1 prompts, 2 completions of at most 3 tokens\): got no answer in 0.3 s"
    ):
        process.request(Drawn, Draw, IDS, [SamplingParams(max_tokens=3, n=2)], timeout_s=0.3)
    assert gone(process)


def test_a_worker_that_does_not_read_holds_nobody_up(start):
    """40 MB to a worker that reads nothing: the sender's deadline holds.

    So does that of who waits to send behind it.
    """
    process = start(deaf=True)
    told = []
    process.wait_ready(30)

    def ask(sequences, timeout_s):
        with pytest.raises(EngineError) as raised:
            process.request(Scored, Score, sequences, timeout_s=timeout_s)
        told.append(str(raised.value))

    first = threading.Thread(target=ask, args=[[bytes(40_000_000)], 1800.0])
    first.start()
    time.sleep(0.2)
    began = time.monotonic()
    ask(IDS, 1.0)
    assert time.monotonic() - began < AT_ONCE_S
    first.join(AT_ONCE_S)
    assert not first.is_alive()
    assert all("score (1 sequences, 3 tokens): got no answer in 1 s" in text for text in told), told
    assert len(told) == 2


def test_a_worker_that_refuses_to_start_says_why(start):
    process = start(refuse="no such model")
    with pytest.raises(EngineDied, match="engine, start: got no such model"):
        process.wait_ready(30)
    assert gone(process)


def test_a_slow_start_ends_when_it_is_not_wanted_any_more(start):
    process = start(start_s=60)

    def wait():
        with pytest.raises(EngineDied):
            process.wait_ready(600)

    waited = threading.Thread(target=wait)
    waited.start()
    began = time.monotonic()
    process.close()
    waited.join(AT_ONCE_S)
    assert not waited.is_alive()
    assert time.monotonic() - began < AT_ONCE_S
    assert gone(process)


def test_an_interpreter_that_is_not_there_is_named_and_leaves_nothing(tmp_path):
    before = set(psutil.Process().open_files())
    with pytest.raises(EngineError, match="a process of /no/python"):
        WorkerProcess(Path("/no/python"), PROGRAM, b"{}", {}, tmp_path / "engine.log")
    assert set(psutil.Process().open_files()) == before


def test_a_long_tmpdir_is_no_obstacle(start, tmp_path, monkeypatch):
    """A Unix socket's path has at most 107 bytes, and an engine's own 37 after its temporary directory."""
    long = tmp_path / ("x" * 130)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    process = start()
    assert process.wait_ready(30).engine == "fake"
    assert len(str(process.directory)) <= SHORT_PATH + len("/lockstep-") + 8
    assert process.directory.stat().st_mode & 0o777 == 0o700
    process.close()
    assert gone(process)


@pytest.mark.parametrize("ended", ["closed", "its own death"])
def test_what_an_engine_writes_as_temporary_files_goes_with_it(start, tmp_path, monkeypatch, ended):
    """In the longest directory that is taken, so that a socket in it still has a path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        root = Path(short) / ("x" * (SHORT_PATH - len(short) - 1))
        root.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(root))
        process = start(litter=True, answer="honest" if ended == "closed" else "death")
        told = process.wait_ready(30).resolved
        (private,) = root.iterdir()
        assert told == {"tmp": f"{private}/tmp", "base": f"{private}/tmp", "mode": 0o700}
        assert sorted(path.name[:10] for path in (private / "tmp").iterdir()) == ["00000000-0", "vllm_dist_"]
        if ended == "closed":
            process.close()
        else:
            with pytest.raises(EngineDied):
                process.request(Scored, Score, IDS, timeout_s=30)
            process.close()
        assert list(root.iterdir()) == []


def test_a_launcher_is_run_and_told_the_workers_module():
    assert WorkerProgram("a.worker", launcher="a.launcher").command == ["-u", "-m", "a.launcher", "a.worker"]
    assert WorkerProgram("a.worker").command == ["-u", "-m", "a.worker"]


def test_no_short_directory_at_all_is_a_named_error(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 130)))
    monkeypatch.setattr("lockstep.engines.process.SHORT_ROOTS", (str(tmp_path / "not there"),))
    with pytest.raises(EngineError, match="no directory for its sockets"):
        private_directory()


def test_scarce_shared_memory_is_told_and_ample_is_not(tmp_path, monkeypatch):
    def room(free):
        return os.statvfs_result((4096, 4096, 16384, free // 4096, free // 4096, 0, 0, 0, 0, 255))

    for free, told in ((3_000_000, True), (3_000_000_000, False)):
        monkeypatch.setattr(os, "statvfs", lambda path, free=free: room(free))
        assert ("3 MB free of 67" in scarce_memory(tmp_path)) is told
