"""``lockstep diagnose``: which of a recipe's settings make up the gap, and how much each."""

from pathlib import Path
from typing import Annotated

import typer

from lockstep.cli.console import Console, emit, show
from lockstep.cli.flags import EngineName, Json, Sets


def diagnose(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe whose check fails.")],
    set_: Sets = None,
    engine: EngineName = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="vllm==VERSION", help="An engine version that is known to be good; the last factor."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Mend one setting at a time, measure again each time, and show what each is worth.

    Of up to five settings an effect is the mean over all orders of mending, so it depends on none; settings
    whose errors cancel are named. Effects and rest sum to the total.

    Exit code: 0 when the settings explain the gap down to what arithmetic brings, 1 when something is left
    unexplained.
    """
    from lockstep.cli.common import recipe_of

    loaded = recipe_of(recipe, set_, engine)
    # Behind the recipe: what is wrong in that is said before torch, which takes seconds, is imported.
    from lockstep.diagnose.ablation import ablate, known_good, mended
    from lockstep.parity.tolerances import noise_of

    version = known_good(loaded, against) if against else None
    with Console() as console:
        ablation = ablate(loaded, version, console.say)
    # Mending may change the dtypes: what arithmetic brings is by those of the mended pair.
    good = mended(loaded, None)
    explained = (
        ablation.unexplained_nats
        <= noise_of(f"torch.{good.engine.dtype or good.model.dtype}", f"torch.{good.model.dtype}").p50
    )
    if as_json:
        emit("diagnose", {"explained": explained, "ablation": ablation})
    else:
        low, high = ablation.ci95
        print(
            f"mean |trainer − engine| {ablation.total_nats:.5f} nats per token "
            f"(95 % {low:.5f} to {high:.5f})\n"
        )
        print(f"{'factor':<52} {'effect':>9} {'alone':>9}  mend")
        for factor in ablation.factors:
            print(f"{factor.name:<52} {factor.effect_nats:>9.5f} {factor.alone_nats:>9.5f}  {factor.flag}")
        rest = "what arithmetic brings" if explained else "unexplained: lockstep check names the layer"
        for one, other, nats in ablation.cancel:
            show(f"{one} and {other} cancel: mended together they take off {nats:.5f} nats more than alone")
        print(f"{'left':<52} {ablation.unexplained_nats:>9.5f} {'':>9}  {rest}")
    raise typer.Exit(0 if explained else 1)
