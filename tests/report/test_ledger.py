"""The ledger's section: its lines add up, and a synchronous run has none."""

import json

from lockstep.report.ledger import ledger_section
from lockstep.runs.layout import RunLayout

ROW = {
    "schema": "lockstep.ledger/1",
    "step": 1,
    "open_groups": 1,
    "issued": 40,
    "trained": 32,
    "dropped": {"too old": 4},
    "drawn_tokens": 200,
    "trained_tokens": 160,
    "dropped_tokens": {"too old": 30},
    "reissued": 2,
    "kept_lengths": {"8": 30, "16": 2},
    "dropped_lengths": {"16": 4},
}


def test_every_sample_and_token_of_the_last_step_ended_somewhere(tmp_path):
    layout = RunLayout(tmp_path)
    layout.ledger.write_text("".join(json.dumps(ROW | {"step": step}) + "\n" for step in (0, 1)))
    section = ledger_section(layout)
    ended, lengths = section.tables
    assert ended.rows == (
        ("asked for, or drawn", "40", "200"),
        ("trained on", "32", "160"),
        ("dropped: too old", "4", "30"),
        ("still open, or held", "4", "10"),
    )
    assert lengths.rows == (("≤ 8", "30", "0"), ("≤ 16", "2", "4"))
    assert section.text == ("After step 2: every line but the first adds up to the first.",)


def test_a_synchronous_run_has_none(tmp_path):
    assert ledger_section(RunLayout(tmp_path)) is None
