"""Mathematics as a reward, with the library itself."""

import pytest

from lockstep.rollout import math_reward
from tests.conftest import need_extra


@pytest.mark.parametrize(
    ("answer", "completion", "worth"),
    [
        ("1/2", r"so \boxed{0.5}", 1.0),
        (r"\frac{1}{2}", r"The answer is $\frac{2}{4}$", 1.0),
        ("x+1", "$1+x$", 1.0),
        ("12", "it is 13", 0.0),
        ("5", "", 0.0),
    ],
)
def test_with_the_library_itself(answer, completion, worth):
    need_extra("math_verify", "math")
    assert math_reward.math_verify(completion, {"answer": answer}) == worth
