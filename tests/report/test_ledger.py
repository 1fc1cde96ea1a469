"""The ledger's section: its lines add up, and a synchronous run has none."""

import json

from lockstep.report.ledger import ledger_section
from lockstep.runs.layout import RunLayout
from tests.report.made import LEDGER


def test_every_sample_and_token_of_the_last_step_ended_somewhere(tmp_path):
    layout = RunLayout(tmp_path)
    layout.ledger.write_text("".join(json.dumps(LEDGER | {"step": step}) + "\n" for step in (0, 1)))
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
