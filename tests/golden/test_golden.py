"""The promises of ``surface.py``, held.

Recipe keys, metric names, verbs and options, files, exit codes, public names.
"""

import pytest

from tests.golden.surface import FILES, HERE, golden


@pytest.mark.parametrize("name", FILES)
def test_what_others_build_on_is_as_it_was_promised(name):
    promised = golden(name)
    now = FILES[name]()
    gone = sorted(set(promised) - set(now))
    new = sorted(set(now) - set(promised))
    assert (gone, new) == ([], []), (
        f"if it is meant: python -m tests.golden.surface, and have {name}.txt reviewed"
    )
    assert promised == now == sorted(set(now)), "sorted, each line once"
    assert len(now) > 10


def test_every_golden_file_is_held():
    assert {path.stem for path in HERE.glob("*.txt")} == {*FILES, "json_documents"}
