"""The four scores' section: what verdicts hold of each pair, and what they do not, which is never made up."""

from lockstep.records.verdicts import Verdict
from lockstep.report.scores import NOT_MEASURED, QUANTILES, scores_section
from tests.report.made import ladder, spread


def verdict(layer, status="PASS", reason="", **figures):
    if status == "FAIL":
        (found,) = ladder(failed=True)[0].findings
        return Verdict.failed(layer, "it does not hold", found, figures)
    n = 512 if status == "PASS" else 0
    return Verdict(layer=layer, status=status, summary="so", reason=reason, n_tokens=n, figures=figures)


def rows(section):
    return {(row[0], row[1]): row[2:] for table in section.tables for row in table.rows}


def measured(section):
    return {pair for pair, where in rows(section) if not where.startswith(NOT_MEASURED)}


def test_pairs_with_their_quantiles_and_a_score_against_itself():
    section = scores_section(ladder(failed=False))
    assert measured(section) == {"A, B", "A, C", "B, C", "B, B", "C, C"}
    pairs, floors = section.tables
    assert pairs.rows[1] == (
        *("A, C", "as the recipe samples", "512"),
        *("5.2e-06", "1.3e-05", "2.6e-05", "5.2e-05", "6.5e-05"),
    )
    assert floors.rows[2][3:] == (*[NOT_MEASURED] * 3, "1.3e-05", NOT_MEASURED)
    assert all(len(row) == len(pairs.columns) for table in section.tables for row in table.rows)
    assert section.text[1:] == (
        "In the median the trainer is 5.2e-06 nats from what the engine reported (A, C); "
        "at p99.9 that is 4 times what a side differs from itself by.",
        "The engine is 4e-06 nats from its own re-score (A, B), and that 5e-06 from the trainer (B, C).",
        "Not measured: A, D; B, D; C, D. The table has the reason.",
    )
    assert ("A, D", "not measured: D is taken where a side computes in less than fp32") in rows(section)


def test_where_a_side_computes_in_less_than_fp32_all_six_are_there():
    found = ladder(failed=False)
    for name in ("engine_to_reference", "rescore_to_reference", "trainer_to_reference"):
        found[3].figures.update(spread(name, 0.02))
    section = scores_section(found)
    assert measured(section) >= {"A, D", "B, D", "C, D"}
    assert "From fp32 the engine is 0.02 nats away (A, D), the trainer 0.02 (C, D)." in section.text
    assert not any("Not measured" in sentence for sentence in section.text)


def test_an_engine_that_cannot_re_score_has_no_b_whatever_stands_elsewhere():
    semantics = verdict("semantics", ground_p50_nats=0.0)
    path = verdict("path", "NOT_RUN", "logged cannot re-score: it is a file")
    section = scores_section([semantics, path, verdict("numerics", n_tokens=64, **spread("gap", 1e-5))])
    assert measured(section) == {"A, C"}, "a ground of 0 is of the trainer against itself"
    assert ("B, C", "not measured: logged cannot re-score: it is a file") in rows(section)


def test_of_a_run_of_before_the_median_is_what_is_known_of_b_and_c():
    semantics = verdict("semantics", ground_p50_nats=3e-6)
    path = verdict("path", decode_vs_prefill_n_tokens=64, **spread("decode_vs_prefill", 1e-6))
    section = scores_section([semantics, path, verdict("numerics", **spread("gap", 1e-5))])
    cells = rows(section)["B, C", "at T = 1"]
    assert cells == (NOT_MEASURED, "3e-06", *[NOT_MEASURED] * (len(QUANTILES) - 1))
    assert rows(section)["A, C", "as the recipe samples"][0] == NOT_MEASURED, "how many is not known"


def test_a_layer_that_failed_is_the_reason():
    failed = scores_section([verdict("semantics", "FAIL")])
    assert failed.tables == ()
    assert failed.text[1] == "No two of them were compared: layer path was not reached."
    unclimbed = [verdict("semantics", "FAIL"), verdict("path", "NOT_RUN", "layer semantics did not pass")]
    assert scores_section(unclimbed).text[1].endswith("compared: layer semantics did not pass.")
    path = verdict("path", decode_vs_prefill_n_tokens=64, **spread("decode_vs_prefill", 1e-6))
    early = scores_section([verdict("semantics"), path, verdict("numerics", "FAIL")])
    assert ("A, C", "not measured: layer numerics failed before it was taken") in rows(early)
    assert scores_section([]) is None


def test_a_number_that_is_none_is_shown_and_one_that_is_no_number_is_not_taken_for_one():
    gap = spread("gap", float("nan")) | {"n_tokens": 64, "gap_p999_in_floors": "many"}
    section = scores_section([verdict("numerics", **gap)])
    assert rows(section)["A, C", "as the recipe samples"] == ("64", *["nan"] * 5)
    assert not any("In the median" in sentence for sentence in section.text)
