"""What a dying engine leaves in its log is what the user is told."""

from lockstep.engines.process import CORE_ERROR

LOG = """\
(EngineCore pid=31) ERROR 11-22 01:18:52 [core.py:1512] EngineCore encountered a fatal error.
(EngineCore pid=31) ERROR 11-22 01:18:52 [core.py:1512]   File "gdn_attn.py", line 81, in forward
(EngineCore pid=31) ERROR 11-22 01:18:52 [core.py:1512] AssertionError: CPU GDN attention requires BF16.
(MainProcess pid=30) ERROR 11-22 01:18:52 [async_llm.py:906] EngineDeadError: EngineCore encountered an issue. See above.
"""


def test_the_cores_own_error_is_found_and_not_the_one_that_points_at_it():
    assert CORE_ERROR.findall(LOG) == ["AssertionError: CPU GDN attention requires BF16."]
