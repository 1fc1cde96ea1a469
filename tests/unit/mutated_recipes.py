"""Mutations of the quick start's recipe and of overrides: what a user mistypes, and what nobody would."""

import random
from pathlib import Path

import msgspec

from lockstep.config.recipe import Recipe, load_recipe
from lockstep.errors import RecipeError
from lockstep.runs.strict import exact, plain

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
LINES = QUICKSTART.read_text().splitlines()
SECTIONS = {field.name: msgspec.structs.fields(field.type) for field in msgspec.structs.fields(Recipe)}
KEYS = [f"{section}.{field.name}" for section, fields in SECTIONS.items() for field in fields] + [
    *SECTIONS, "engine.options.x", "task.options.size", "sampling.logit_bias.7",
    "x", "x.y", "a..b", ".a", "a.", "''", '""', "model.path.deeper",
]  # fmt: skip
VALUES = (
    "", "0", "-1", "1", "2", "0.5", "-0.0", "1e-300", "1e400", "-1e400", "nan", "-nan", "inf", "-inf", "true",
    "false", "[]", "{}", "[[]]", "[1,]", "[-1]", '["a"]', '""', "''", '"x"', "x", "=", "==",
    '{"17"=-1.0}', '{"x"=1}', '{"-1"=1}',
    '{"17"="a"}', '{"99999999999999999999"=1}', "{a={b={c=1}}}", "1979-05-27", "07:32:00",
    "1979-05-27T07:32:00Z", "0x10", "1_000", "9" * 400, "9" * 5000, "18446744073709551616",
    "-9223372036854775809", "4294967296", "\n", "1\nx=2", "1 # c", "\x00", "\x1b[31m", "\udcff",
    "'''", '"""', "[" * 400, "[" * 2000, "{x=" * 300, "é", "\u202e",
    "reasoning_gym:", "a:b:c", ":", "float32", "engine", "tis",
)  # fmt: skip


def _line(rng: random.Random) -> str:
    return f"{rng.choice(KEYS)} = {rng.choice(VALUES)}"


def mutated_text(rng: random.Random) -> bytes:
    """The recipe with one to four lines cut, doubled, swapped, edited or invented; sometimes a raw byte."""
    lines = list(LINES)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        line = lines[at]
        cut = rng.randint(0, len(line))
        lines[at] = rng.choice(
            (
                line[:cut],
                line[cut:],
                f"{line}\n{line}",
                f"{line.partition('=')[0]}= {rng.choice(VALUES)}",
                line.replace("a", rng.choice(("", "e", "ä", "'"))),
                _line(rng),
                f"[{rng.choice(KEYS)}]",
                f"[[{rng.choice(KEYS)}]]",
                rng.choice(LINES),
            )
        )
    content = "\n".join(lines).encode(errors="surrogateescape")
    if rng.random() < 0.1:
        at = rng.randrange(len(content))
        content = content[:at] + rng.randbytes(rng.randint(1, 3)) + content[at + 1 :]
    return content


def mutated_overrides(rng: random.Random) -> list[str]:
    """A few ``--set`` arguments, most of them with a key that there is."""
    made = [
        f"{rng.choice(KEYS)}{rng.choice(('=', '=', '=', '', ' = '))}{rng.choice(VALUES)}"
        for _ in range(rng.randint(0, 3))
    ]
    return [one[: rng.randint(0, len(one))] if rng.random() < 0.05 else one for one in made]


def read_mutations(seed: int, count: int, scratch: Path) -> dict[str, int]:
    """Read ``count`` mutations; returns how many were taken and how many refused.

    What is taken comes back from a manifest's JSON as it was; what is refused is a RecipeError. Anything else
    is raised, with the number of the mutation.
    """
    file = scratch / "recipe.toml"
    found = {"taken": 0, "refused": 0, "nameless": 0}
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        if altered := rng.random() < 0.5:
            file.write_bytes(mutated_text(rng))
        overrides = mutated_overrides(rng)
        try:
            recipe = load_recipe(
                file if altered else QUICKSTART,
                overrides,
                rng.choice((None, None, "transformers", "nonsense")),
            )
        except RecipeError as error:
            found[
                "refused" if all((error.boundary, error.got, error.expected, error.hint)) else "nameless"
            ] += 1
            continue
        except BaseException as error:
            error.add_note(f"mutation {seed}/{number}, overrides {overrides!r}")
            raise
        kept = exact(msgspec.json.decode(msgspec.json.encode(plain(recipe))))
        assert msgspec.convert(kept, Recipe, str_keys=True) == recipe, f"mutation {seed}/{number}"
        found["taken"] += 1
    return found
