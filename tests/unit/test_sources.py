"""What trajectories are read from. The event file and the .wandb file were written by their own libraries."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lockstep.errors import RunError, UsageError
from lockstep.report.sources.protobuf import fields
from lockstep.report.sources.read import read_runs
from lockstep.report.sources.tensorboard import masked_crc32c

LOGS = Path(__file__).parents[1] / "data" / "logs"
EVENTS, WANDB = LOGS / "events.out.tfevents.1.example", LOGS / "example.wandb"


def test_an_event_file_is_read_scalars_of_both_forms_and_no_words():
    (run,) = read_runs(EVENTS, {})
    assert run.steps.tolist() == list(range(20))
    assert run.figures.keys() == {"reward_mean", "policy_kl_k3_nats"}
    np.testing.assert_allclose(run.figures["reward_mean"], 0.5 * np.arange(20))
    np.testing.assert_allclose(run.figures["policy_kl_k3_nats"], 0.01 * np.arange(20), rtol=1e-6)
    assert run.logged_as == {"reward_mean": "train/reward", "policy_kl_k3_nats": "kl_new_old"}


def test_a_wandb_file_is_read_across_blocks_with_its_nan():
    (run,) = read_runs(WANDB, {})
    assert WANDB.stat().st_size > 32768
    assert run.steps.tolist() == list(range(50))
    np.testing.assert_allclose(run.figures["reward_mean"], 0.5 * np.arange(50))
    kl = run.figures["policy_kl_k3_nats"]
    assert np.flatnonzero(np.isnan(kl)).tolist() == [3]
    assert not run.absent["policy_kl_k3_nats"][3], "a NaN was logged; it is no gap in the log"
    assert run.figures["nested/a"].tolist() == list(range(50))


@pytest.mark.parametrize("source", [EVENTS, WANDB])
def test_a_changed_byte_is_refused_and_a_cut_end_is_left_out(source, tmp_path):
    content = source.read_bytes()
    path = tmp_path / source.name
    path.write_bytes(content[:-3])
    assert len(read_runs(path, {})[0].steps) >= 19
    at = len(content) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(RunError, match="checksum"):
        read_runs(path, {})
    path.write_bytes(b"no such format, but long enough to be one")
    with pytest.raises(RunError):
        read_runs(path, {})


def test_the_checksum_is_castagnolis():
    crc = 0xE3069283  # of b"123456789", RFC 3720's check value
    assert masked_crc32c(b"123456789") == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize("message", [b"\x08", b"\x0a\x05ab", b"\x0b", b"\x00\x01", b"\x08" + b"\xff" * 11])
def test_bytes_that_are_no_message_are_refused(message):
    with pytest.raises(ValueError, match=r"cut|wire type"):
        list(fields(message))


def test_json_lines_of_verl_and_a_trainer_state_of_trl_are_read(tmp_path):
    rows = [{"step": s, "data": {"actor/entropy": 2.0 - s, "critic/score/mean": float(s)}} for s in range(3)]
    (tmp_path / "verl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = read_runs(tmp_path / "verl.jsonl", {"entropy_mean_nats": "actor/entropy"})
    assert run.figures["entropy_mean_nats"].tolist() == [2.0, 1.0, 0.0]
    history = [
        {"step": 1, "reward": 0.5, "loss": float("nan")},
        {"step": 2, "reward": 0.6},
        {"train_runtime": 5.0},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (run,) = read_runs(tmp_path / "trainer_state.json", {})
    assert run.steps.tolist() == [1.0, 2.0]
    assert run.figures["reward_mean"].tolist() == [0.5, 0.6]
    assert run.absent["loss"].tolist() == [False, True]


def test_a_table_with_a_column_of_seeds_is_several_runs(tmp_path):
    lines = ["it,run,kl,reward", *(f"{s},{run},{s * run},NaN" for run in (1, 2) for s in range(4))]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    runs = read_runs(tmp_path / "all.csv", {"step": "it", "seed": "run", "policy_kl_k3_nats": "kl"})
    assert [run.seed for run in runs] == ["1", "2"]
    assert runs[1].figures["policy_kl_k3_nats"].tolist() == [0.0, 2.0, 4.0, 6.0]
    assert np.isnan(runs[0].figures["reward_mean"]).all()


@pytest.mark.parametrize(
    ("name", "text", "error", "match"),
    [
        ("a.csv", "step,x\n1,2,3\n", RunError, "more values than columns"),
        ("a.csv", "x,y\n1,2\n", UsageError, "no step"),
        ("a.csv", "step,x\none,2\n", UsageError, "no number"),
        ("a.jsonl", '{"step": 1}\n[1]\n', RunError, "JSON object"),
        ("trainer_state.json", "{}", RunError, "log_history"),
        ("a.txt", "", UsageError, "kind"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, name, text, error, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=match):
        read_runs(tmp_path / name, {})


def test_a_mapping_to_a_column_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("step,x\n1,2\n")
    with pytest.raises(UsageError, match="no column 'y'"):
        read_runs(tmp_path / "a.csv", {"reward_mean": "y"})


def test_directories_are_a_log_or_runs_beside_each_other(tmp_path):
    shutil.copy(EVENTS, tmp_path / EVENTS.name)
    assert len(read_runs(tmp_path, {})) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no log"):
        read_runs(tmp_path / "empty", {})
