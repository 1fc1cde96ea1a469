"""A number that decides stands in tolerances.py or search_tolerances.py: read off the code.

Two forms are found: a constant in capitals of a module, and a number in a comparison or a numeric tolerance.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lockstep

SOURCE = Path(lockstep.__file__).parent
FLOORS = ("parity", "deep", "diagnose")
HELD = {"tolerances.py", "search_tolerances.py"}

NONE_OF_THEM = {
    "how much is drawn, scored or held: more would cost more, and show more": """
        attribution.TOKENS canary.SEQUENCE_TOKENS directions.MORE directions.SEQUENCES
        directions.SEQUENCES_COARSE draws.CROWD draws.MOST_DRAWS draws.SINGLES factors.PROMPTS groups.PROMPTS
        groups.TOKENS held.FITTED_TOKENS ladder.PROOF_TOKENS left_behind.EACH left_behind.PROMPTS
        objective.GROUP objective.PROMPTS path.ALONE path.WARM_TOKENS portions.ROW_TOKENS precision.FEW_TOKENS
        probes.LONGEST probes.ROOM switch.ENOUGH switch.PROMPTS switch.TOKENS trainer_hypotheses.SCALED_TOKENS
        trainer_hypotheses.SCREENED_CONTEXT trainer_hypotheses.SETTING_ROWS weights.CACHE_PROMPTS
        weights.CACHE_TOKENS directions.MARGIN battery.ALONE by_token.KEPT_AT_MOST alignment.STOP_TOKENS
        alignment.SWAP_TOKENS vocabulary.ROWS vocabulary.TOKENS joint.RANKS
    """,
    "how many hypotheses are tried, or on how much first; what is named is judged on all": """
        ablation.EVERY_ORDER alignment.FARTHEST_SHIFT alignment.MOST_EDITS alignment.NEAREST
        alignment.SCREENED attribution.GREEDY attribution.REFINED attribution.VERIFIED held.SCREENED_TOKENS
        left_behind.TRIED logit_bias.CANDIDATES logit_bias.MOST_BIASED prompt_edits.SCREENED
        sampler.SCREENED_ROWS upgrade.MOST_FLAGS vocabulary.PLACES
    """,
    "values that are tried": """
        fitted_settings.CAPS fitted_settings.SCALES fitting.ROUNDED_TO spans.MOVES switch.BEGINS
        transforms.DECIMALS truncation.USUAL_TOP_K vocabulary.MOVES
    """,
    "into how many parts a figure is split, and where": """
        numerics.POSITIONS numerics.PROBABILITIES own_noise.BINS own_noise.FEWEST score_test.BINS
    """,
    "a unit, a step or a constant of mathematics": """
        by_token.CAP_UNIT by_token.EPSILONS_STEP by_token.TOP_K by_token.TOP_P fitting.GOLDEN
        perturbation.PROBE_VERSION
    """,
    "how much is told, or how often": """
        attribution.MANY_KINDS corruption.SHOWN corruption.SHOWN_CHARACTERS grammar.SHOWN
        path.ENOUGH_FOR_A_FLOOR portions.SHOWN search.SAID_EVERY_S search.SHOWN
    """,
}
"""Why a number may stand where it is → those that may, as module.NAME."""

PLAIN = {0, 1, -1, 2}
"""Nothing, one, a pair, and every other."""
COMPARED = {("own_noise", 0.5): "a median is where half lie beyond"}


def files() -> Iterator[Path]:
    """Of the floors, but for the two that hold what decides."""
    every = (path for floor in FLOORS for path in sorted((SOURCE / floor).rglob("*.py")))
    return (path for path in every if path.name not in HELD)


def is_number(tree: ast.expr) -> bool:
    """A number, or some of them, written down; sums with a name in them too."""
    if isinstance(tree, ast.Constant):
        return isinstance(tree.value, int | float) and not isinstance(tree.value, bool)
    if isinstance(tree, ast.Tuple | ast.List):
        return bool(tree.elts) and all(is_number(part) for part in tree.elts)
    if isinstance(tree, ast.UnaryOp):
        return is_number(tree.operand)
    return isinstance(tree, ast.BinOp) and (is_number(tree.left) or is_number(tree.right))


def constants(path: Path) -> Iterator[str]:
    """Each module.NAME = number."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if isinstance(name, ast.Name) and name.id.isupper() and is_number(value):
                    yield f"{path.stem}.{name.id}"


def numbers_within(tree: ast.AST) -> Iterator[float]:
    """But for places in a sequence and exponents."""
    if (
        isinstance(tree, ast.UnaryOp)
        and isinstance(tree.op, ast.USub)
        and isinstance(tree.operand, ast.Constant)
    ):
        yield -tree.operand.value
    elif isinstance(tree, ast.Constant):
        if is_number(tree):
            yield tree.value
    elif isinstance(tree, ast.Subscript):
        yield from numbers_within(tree.value)
    elif isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Pow):
        yield from numbers_within(tree.left)
    else:
        for part in ast.iter_child_nodes(tree):
            yield from numbers_within(part)


def compared(path: Path) -> Iterator[tuple[str, float, int]]:
    """(module, number, line) of what comparisons, and tolerances of numpy's and torch's, hold."""
    for node in ast.walk(ast.parse(path.read_text())):
        judged: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            judged = [node.left, *node.comparators]
        elif isinstance(node, ast.Call):
            judged = [one.value for one in node.keywords if one.arg in ("atol", "rtol")]
        yield from ((path.stem, value, node.lineno) for tree in judged for value in numbers_within(tree))


def test_no_other_constant_decides():
    known = {name for names in NONE_OF_THEM.values() for name in names.split()}
    found = {name for path in files() for name in constants(path)}
    assert found - known == set(), "a threshold goes to tolerances.py; what is none, here with its reason"
    assert known - found == set(), "gone"


def test_no_comparison_holds_a_number_of_its_own():
    found = [one for path in files() for one in compared(path) if one[1] not in PLAIN]
    assert [one for one in found if one[:2] not in COMPARED] == []
    assert {one[:2] for one in found} == set(COMPARED), "gone"


@pytest.mark.parametrize(
    ("code", "named", "numbers"),
    [
        ("LIMIT = 0.9\n", ["m.LIMIT"], []),
        ("LOW, HIGH = -1.5, 3\n", ["m.LOW", "m.HIGH"], []),
        ("LIMIT: float = 3 * OTHER\n", ["m.LIMIT"], []),
        ("NAME = 'text'\nKINDS = {'a': 1}\nFLAG = True\n", [], []),
        ("def f(x):\n    return x <= 5.0 * g(x) or x[7] > -0.3 or x**0.5 < y\n", [], [5.0, -0.3]),
        ("same = isclose(a, b, rtol=0.0, atol=1e-6)\n", [], [1e-6]),
    ],
)
def test_a_threshold_is_seen(tmp_path, code, named, numbers):
    path = tmp_path / "m.py"
    path.write_text(code)
    assert list(constants(path)) == named
    assert [value for _, value, _ in compared(path) if value not in PLAIN] == numbers
