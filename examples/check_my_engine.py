"""Ask, from a script of your own, whether an engine is the policy that you train; and what to do if not.

The recipe's engine, and a server that runs:

    python examples/check_my_engine.py recipes/quickstart.toml
    python examples/check_my_engine.py recipes/quickstart.toml engine.name=openai \\
        engine.options.base_url=http://127.0.0.1:8000/v1

Put it before a training script, or into CI after an upgrade of the engine. Exit code: 0 the same policy, 1
not, 3 not all could be judged (a server over HTTP takes no weights, so that two layers are left).
"""

import sys
from pathlib import Path

import lockstep
from lockstep.config.recipe import load_recipe


def main() -> int:
    """Judge, and print what a person needs to know."""
    recipe = load_recipe(Path(sys.argv[1]), sys.argv[2:])
    result = lockstep.check(recipe, depth="quick", say=lambda text: print(text, file=sys.stderr))
    for verdict in result.verdicts:
        # NOT_RUN is never PASS: a layer is judged only when those before it hold, and says why it was not.
        print(
            f"{verdict.layer:<10} {verdict.status:<8} "
            f"{verdict.summary if verdict.status != 'NOT_RUN' else verdict.reason}"
        )
        for finding in verdict.findings:
            low, high = finding.ci95
            print(f"  cause    {finding.cause}: {finding.evidence}")
            print(f"  effect   {finding.effect_nats:.3g} nats per token (95 %: {low:.3g} to {high:.3g})")
            print(f"  mend     {finding.fix or 'none is known'}")
    return {"PASS": 0, "FAIL": 1, "NOT_RUN": 3}[result.status]


if __name__ == "__main__":
    sys.exit(main())
