"""Log files out of a broken disk, a bug or a hostile hand.

Each is read or refused by name, quickly and in little memory.

Half are bytes of good files changed at random, half are rows and tables with values that no row should hold.
What is read is also taken through masks and pads and scored, as the check does before it tries any
hypothesis.
"""

import json
import resource
import time

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lockstep.config.recipe import parse_overrides
from lockstep.errors import UsageError
from lockstep.logged.columns import MASKS, SETTINGS
from lockstep.logged.file import read_logged
from lockstep.logged.judge import judge
from lockstep.logged.masks import settle
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import LAYERS
from tests.faults import conftest
from tests.faults.conftest import NEUTRAL

pair = conftest.pair
recipe = conftest.recipe
session = conftest.session

SLOWEST_S, SLOWEST_CHECK_S = 10.0, 100.0
LARGEST_KIB = 1 << 20
"""What the process may grow by, over all files."""
DEFAULT = SamplingParams(max_tokens=1)
HOSTILE = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**63,
        2**70,
        -(2**80),
        1e308,
        -1e308,
        10**400,
        0.5,
        "",
        "NaN",
        "\x1b[2J",
        [],
        {},
        [[]],
        [None],
    ),
    *(
        [1, 2, "x"],
        [1] * 1000,
        [-5],
        [2**31],
        [0.0],
        [True, False],
        ["\x00"],
        [{}],
        {"a": 1},
        [[1], [2]],
        [96] * 600,
        [None] * 3,
    ),
)
TYPES = (
    pa.list_(pa.int64()),
    pa.list_(pa.float64()),
    pa.large_list(pa.int32()),
    pa.list_(pa.bool_()),
    pa.list_(pa.string()),
)
OTHER_TYPES = (
    pa.list_(pa.list_(pa.int64())),
    pa.int64(),
    pa.float64(),
    pa.string(),
    pa.binary(),
    pa.bool_(),
    pa.null(),
)


def good_rows(random, n=6):
    rows = []
    for _ in range(n):
        length, prompt = random.integers(1, 12), random.integers(1, 9)
        row = {
            "prompt_ids": random.integers(3, 97, prompt).tolist(),
            "completion_ids": random.integers(3, 97, length).tolist(),
            "logprobs": np.round(-random.random(length), 4).tolist(),
            "response_mask": random.integers(0, 2, length).tolist(),
            "attention_mask": [1] * int(prompt + length),
            "temperature": float(random.choice([0.5, 1.0])),
        }
        for name in ("response_mask", "attention_mask", "temperature"):
            if random.random() < 0.3:
                rows = [{k: v for k, v in other.items() if k != name} for other in rows]
                del row[name]
        rows.append({k: v for k, v in row.items() if not rows or k in rows[0]})
    return rows


def as_jsonl(rows):
    return b"\n".join(json.dumps(row).encode() for row in rows)


def as_parquet(rows, path):
    parquet.write_table(pa.Table.from_pylist(rows), path, compression=None)
    return path.read_bytes()


def bytes_changed(data, random):
    data = bytearray(data)
    for _ in range(random.integers(1, 6)):
        at = int(random.integers(0, len(data) + 1))
        n = int(random.integers(1, 17))
        kind = random.integers(0, 6)
        if kind == 0:
            data[at : at + n] = b""
        elif kind == 1:
            data[at:at] = random.bytes(n)
        elif kind == 2:
            data[at : at + n] = random.bytes(len(data[at : at + n]))
        elif kind == 3:
            data[at:at] = data[max(0, at - n) : at] * int(random.integers(1, 9))
        elif kind == 4 and random.random() < 0.3:
            del data[at:]
        elif data:
            data[min(at, len(data) - 1)] ^= 1 << int(random.integers(0, 8))
    return bytes(data)


def hostile(random):
    return HOSTILE[int(random.integers(0, len(HOSTILE)))]


def rows_changed(rows, random):
    """JSON lines, some of them no objects, with values of every wrong kind in a few places."""
    columns = [*rows[0], *MASKS, *SETTINGS, "input_ids", "responses"]
    for _ in range(random.integers(1, 4)):
        row = rows[int(random.integers(0, len(rows)))]
        column = columns[int(random.integers(0, len(columns)))]
        values = row.get(column)
        if isinstance(values, list) and values and random.random() < 0.6:
            values[int(random.integers(0, len(values)))] = hostile(random)
        elif random.random() < 0.2:
            row.pop(column, None)
        else:
            row[column] = hostile(random)
    lines = [json.dumps(row) for row in rows]
    if random.random() < 0.1:
        lines[int(random.integers(0, len(lines)))] = json.dumps(hostile(random))
    if random.random() < 0.02:
        lines.append("[" * int(random.integers(1, 200_000)))
    return "\n".join(lines).encode()


def table_changed(rows, random, path):
    """A table with a column of another type, or with holes."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    name = [*columns, *MASKS, *SETTINGS][int(random.integers(0, len(columns) + len(MASKS) + len(SETTINGS)))]
    kinds = (*TYPES, *OTHER_TYPES)
    kind = kinds[int(random.integers(0, len(kinds)))]
    values = [
        hostile(random) if random.random() < 0.3 else columns.get(name, [[1]] * len(rows))[at]
        for at in range(len(rows))
    ]
    try:
        columns[name] = pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        columns[name] = pa.nulls(len(rows), kind)
    parquet.write_table(pa.table(columns), path)


def written(tmp_path, number, random):
    """One changed file."""
    rows = good_rows(random)
    kind = number % 4
    path = tmp_path / ("x.jsonl" if kind < 2 else "x.parquet")
    if kind == 0:
        path.write_bytes(bytes_changed(as_jsonl(rows), random))
    elif kind == 1:
        path.write_bytes(rows_changed(rows, random))
    elif kind == 2:
        path.write_bytes(bytes_changed(as_parquet(rows, path), random))
    else:
        table_changed(rows, random, path)
    return path


def held_against(path, policy, renderer):
    """Read, unpad, mask and score a file. Returns whether it could be used."""
    try:
        logged = read_logged(path, DEFAULT)
        settle(logged, policy, renderer)
        for setting in np.unique(logged.settings):
            rows = np.array([row for row in logged.usable() if logged.settings[row] == setting], np.int64)
            for gap in logged.gaps(policy, rows, 1.0) if rows.size else ():
                assert gap.dtype == np.float32
    except UsageError as error:
        return not (error.got and error.expected and error.hint)
    return True


ENDED_THE_PROCESS = (11_002, 11_798, 15_798, 19_470, 20_578)
"""Files whose columns' metadata pyarrow 26 ended the process at: their levels are counted wrongly."""


def fuzz(tmp_path, policy, renderer, numbers):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = 0
    slowest = 0.0
    for number in numbers:
        path = written(tmp_path, number, np.random.default_rng(number))
        began = time.perf_counter()
        try:
            used += held_against(path, policy, renderer)
        except BaseException as error:
            error.add_note(f"file {number}")
            raise
        slowest = max(slowest, time.perf_counter() - began)
        assert slowest <= SLOWEST_S, f"file {number}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{len(numbers)} files, {used} usable, slowest {slowest:.2f} s, grown by {grown >> 10} MiB")
    assert grown <= LARGEST_KIB
    assert len(numbers) / 20 < used < len(numbers)


@pytest.fixture(scope="module")
def sides(tiny_checkpoint):
    from lockstep.policy.model import load_policy
    from lockstep.rendering import Renderer
    from lockstep.training.trainer import Trainer

    return Trainer(load_policy(tiny_checkpoint, "float32", "float32"), None), Renderer(tiny_checkpoint)


def test_a_changed_file_is_read_or_refused_by_name(tmp_path, sides):
    fuzz(tmp_path, *sides, [*range(1000), *ENDED_THE_PROCESS])


@pytest.mark.chaos
def test_many_changed_files_are_read_or_refused_by_name(tmp_path, sides):
    fuzz(tmp_path, *sides, range(1000, 21_000))


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path, sides):
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.truncate(8 << 30)  # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match="row 1: got more than 32 MiB, expected one completion a line"):
        read_logged(path, DEFAULT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18


def judged(tmp_path, pair, number):
    """The whole check of a changed file."""
    random = np.random.default_rng(number)
    path = tmp_path / "x.jsonl"
    path.write_bytes(rows_changed(good_rows(random), random))
    recipe = parse_overrides(NEUTRAL, [], "test")
    began = time.perf_counter()
    try:
        verdicts = judge(read_logged(path, recipe.sampling), pair.trainer, pair.renderer, recipe)
    except UsageError:
        return 0
    assert [v.layer for v in verdicts] == list(LAYERS)
    assert time.perf_counter() - began < SLOWEST_CHECK_S, f"file {number}"
    return 1


def test_what_could_be_read_comes_to_a_verdict(tmp_path, pair):
    assert sum(judged(tmp_path, pair, number) for number in range(3)) > 0


@pytest.mark.chaos
def test_much_that_could_be_read_comes_to_a_verdict(tmp_path, pair):
    assert sum(judged(tmp_path, pair, number) for number in range(3, 100)) > 0
