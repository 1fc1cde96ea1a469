"""Each objective, correction and estimator beside the peers' own code: ``make peers``.

Equal to 1e-6 in loss and in the gradient of every token, or named with the reason in :data:`DIFFERENT`; a row
that is neither ends it with exit code 1, one that has become equal too. Writes ``docs/reference/peers.md``.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from lockstep.config.objective import Kl, Objective
from lockstep.objectives.advantages import ESTIMATORS, Rewards, gae, whitened
from lockstep.objectives.dpo import pairs_of
from tests.peers import trl_side, verl_side
from tests.peers.tensors import GROUP, LENGTHS, Tensors, correction_weights, ours

PAGE = Path(__file__).parents[2] / "docs/reference/peers.md"
EQUAL = 1e-6
TOOL, PLAIN = Tensors.made(tool=True), Tensors.made(tool=False)
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
VERLS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
OFF = {"clip_ratio_c": 1e9}
"""verl's dual clip has no switch; so far away it does nothing."""


@dataclass(frozen=True)
class Row:
    """One thing that both have."""

    peer: str
    theirs: str
    ours: str
    apart: Callable[[], float]
    """The largest difference."""


DIFFERENT = {
    ("TRL", "cispo, its defaults"): "its bound is absolute and .2 by default, so every weight is at most .2",
    ("TRL", "advantages of GRPO"): "it divides by the deviation by n − 1 plus 1e-4; Lockstep by n plus 1e-6",
    ("verl", "grpo advantages"): "it divides by the deviation by n − 1; Lockstep by n",
    ("verl", "vanilla, its defaults"): "its dual clip at 3 is always on; Lockstep's is off unless asked for",
    ("verl", "seq_sum_k1, in the loss"): "it edits the mask, so that the mean is over what is left",
    (
        "verl",
        "seq_mean_k1, as written",
    ): "its k1 is −log ratio: bounds are on π_rollout / π_train, so inverted",
    ("verl", "low_var_kl, far apart"): "it clamps the log-ratio to ±20 and the estimate to ±10",
    (
        "TRL",
        "online DPO with a tie",
    ): "it takes the first of two equal ones as chosen; a tie is no pair here",
}
"""Why a row differs, of those that do."""


def flat_rewards(tensors: Tensors) -> Rewards:
    """As Lockstep takes them."""
    mask = tensors.flat(tensors.mask).bool().numpy()
    return Rewards(tensors.rewards.numpy(), GROUP, tensors.owners.numpy(), mask)


def padded(tensors: Tensors, values: np.ndarray) -> torch.Tensor:
    """[B, L] of values [T], 0 where no token of the model's is."""
    found = torch.zeros_like(tensors.mask)
    found[tensors.there] = torch.from_numpy(np.asarray(values, np.float64))
    return found * tensors.mask


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().max())


def trl_rows() -> list[Row]:
    """TRL's GRPO losses."""

    def row(name: str, objective: Objective, **settings: object) -> Row:
        mine = f"{objective.name}, {objective.aggregation}"
        return Row(
            "TRL", name, mine, lambda: trl_side.grpo_loss(TOOL, **settings).apart(ours(TOOL, objective))
        )

    own = {"epsilon_high": 0.28}
    sequence = "seq-mean-token-mean"
    return [
        row("grpo", Objective(**CLIP, aggregation=sequence), loss_type="grpo", **own),
        row("dr_grpo", Objective(**CLIP, aggregation="seq-mean-token-sum-norm"), loss_type="dr_grpo", **own),
        row("dapo", Objective(**CLIP), loss_type="dapo", **own),
        row("bnpo", Objective(**CLIP), loss_type="bnpo", **own),
        row("dapo, delta 2", Objective(**CLIP, options={"dual_clip": 2.0}), delta=2.0, **own),
        row("cispo, ε_high 5", Objective(name="cispo"), loss_type="cispo", epsilon_high=5.0),
        row("cispo, its defaults", Objective(name="cispo"), loss_type="cispo"),
        row(
            "grpo by sequence (GSPO)",
            Objective(name="gspo", options={"low": 0.2, "high": 0.28}, aggregation=sequence),
            loss_type="grpo",
            importance_sampling_level="sequence",
            **own,
        ),
        row("dapo, β .3 (k3 in the loss)", Objective(**CLIP, kl=Kl(coef=0.3)), beta=0.3, **own),
        *trl_corrections(),
        Row(
            "TRL",
            "advantages of GRPO",
            "group, std",
            lambda: largest(
                padded(PLAIN, ESTIMATORS["group"](flat_rewards(PLAIN), "std")),
                trl_side.grpo_advantages(PLAIN.rewards)[:, None] * PLAIN.mask,
            ),
        ),
        *dpo_rows(),
    ]


def trl_corrections() -> list[Row]:
    """Its ratios of sampler and trainer, as its generation makes them: truncated at 3, or masked."""
    ratio = torch.exp(TOOL.old - TOOL.engine)
    whole = torch.exp(((TOOL.old - TOOL.engine) * TOOL.mask).sum(1, keepdim=True))
    cases = {
        "token_truncate": ("tis", ratio.clamp(max=1.5), None),
        "sequence_truncate": ("sequence_tis", whole.clamp(max=1.5), None),
        "token_mask": ("masked_is", ratio.masked_fill(ratio > 1.5, 0.0), 1e-9),
    }
    return [
        Row(
            "TRL",
            f"dapo, {name} at 1.5",
            f"grpo, {correction}",
            lambda correction=correction, weights=weights, low=low: trl_side.grpo_loss(
                TOOL, epsilon_high=0.28, importance_sampling_ratio=weights
            ).apart(
                ours(
                    TOOL,
                    Objective(**CLIP, correction=correction, correction_low=low, correction_high=1.5),
                )
            ),
        )
        for name, (correction, weights, low) in cases.items()
    ]


def dpo_rows() -> list[Row]:
    """Its pairs are completion i of the first half against i of the second: three groups of two of ours."""
    half = len(LENGTHS) // 2
    order = np.arange(len(LENGTHS)).reshape(2, half).T.reshape(-1)

    def pairs(rewards: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(order[pairs_of(rewards.numpy()[order], 2)])

    def apart(rewards: torch.Tensor, kind: str) -> float:
        found = pairs(rewards)
        objective = Objective(name="dpo", options={"kind": kind, "beta": 0.1})
        mine = ours(PLAIN, objective, pairs=found, pair_weight=1.0 / len(found))
        return trl_side.online_dpo_loss(PLAIN, rewards, kind, 0.1).apart(mine)

    tied = torch.tensor([1.0, 0.0, 0.3, 0.0, 2.0, 0.3], dtype=torch.float64)
    return [
        Row("TRL", "online DPO, sigmoid", "dpo", lambda: apart(PLAIN.rewards, "sigmoid")),
        Row("TRL", "online DPO, ipo", "dpo, ipo", lambda: apart(PLAIN.rewards, "ipo")),
        Row("TRL", "online DPO with a tie", "dpo", lambda: apart(tied, "sigmoid")),
    ]


def verl_rows() -> list[Row]:
    """verl's policy losses."""

    def row(name: str, theirs: str, objective: Objective, **settings: object) -> Row:
        def apart() -> float:
            found = verl_side.policy_loss(TOOL, theirs, objective.aggregation, **settings)
            return found.apart(ours(TOOL, objective))

        return Row("verl", name, f"{objective.name}, {objective.aggregation}", apart)

    four = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
    dual = Objective(**CLIP, options={"dual_clip": 2.0})
    cispo = Objective(name="cispo", options={"low": 0.8, "high": 1.28})
    dppo = Objective(name="dppo_tv", options={"low": 0.2, "high": 0.28})
    gspo = Objective(name="gspo", options={"low": 0.2, "high": 0.28}, aggregation="seq-mean-token-mean")
    return [
        *(row(f"vanilla, {a}", "vanilla", Objective(**CLIP, aggregation=a), **VERLS, **OFF) for a in four),
        row("vanilla, dual clip 2", "vanilla", dual, **VERLS, clip_ratio_c=2.0),
        row("vanilla, its defaults", "vanilla", Objective()),
        row("gspo", "gspo", gspo, **VERLS),
        row("cispo", "cispo", cispo, **VERLS),
        row("dppo_tv", "dppo_tv", dppo, **VERLS, clip_ratio_c=20.0),
        *verl_estimators(),
        *verl_kls(),
        *verl_corrections(),
    ]


def verl_estimators() -> list[Row]:
    """Advantages, GAE and the value loss."""

    def row(theirs: str, mine: str) -> Row:
        return Row(
            "verl",
            f"{theirs} advantages",
            mine,
            lambda: largest(
                padded(TOOL, ESTIMATORS[mine](flat_rewards(TOOL), "std")), verl_side.advantages(TOOL, theirs)
            ),
        )

    def of_gae(gamma: float, lam: float) -> float:
        found = gae(flat_rewards(TOOL), TOOL.flat(TOOL.values).numpy(), gamma, lam)
        theirs, returns = verl_side.gae(TOOL, gamma, lam)
        mine = whitened(found.advantages, flat_rewards(TOOL).loss_mask)
        off = largest(padded(TOOL, mine), theirs * TOOL.mask)
        return max(off, largest(padded(TOOL, found.returns), returns * TOOL.mask))

    return [
        row("rloo", "leave_one_out"),
        row("reinforce_plus_plus", "batch"),
        row("reinforce_plus_plus_baseline", "group_batch"),
        row("grpo", "group"),
        Row("verl", "gae, γ 1, λ .95", "gae, whitened", lambda: of_gae(1.0, 0.95)),
        Row("verl", "gae, γ .9, λ .7", "gae, whitened", lambda: of_gae(0.9, 0.7)),
        Row("verl", "value loss, clipped at .2", "ppo, value_clip .2", value_loss),
    ]


def value_loss() -> float:
    """The value term alone: the surrogate's advantage is 0."""
    still = replace(TOOL, advantages=torch.zeros_like(TOOL.advantages))
    # any numbers do
    values = TOOL.reference.clone()
    returns = TOOL.engine.clone()
    flat = {"values": values, "old_values": TOOL.values, "returns": returns}
    found = ours(
        still,
        Objective(name="ppo", advantage="gae", options={"value_clip": 0.2}),
        **{name: TOOL.flat(value) for name, value in flat.items()},
    )
    return abs(found.loss - float(verl_side.value_loss(TOOL, values, returns, 0.2)))


def verl_kls() -> list[Row]:
    """Estimators of the divergence, and what its clamps do far away."""
    still = replace(TOOL, advantages=torch.zeros_like(TOOL.advantages))
    far = replace(still, reference=still.now + 4.0)
    rows = [
        Row(
            "verl",
            f"kl_penalty {name}",
            f"kl {name}",
            lambda name=name: verl_side.kl(still, name).apart(
                ours(still, Objective(kl=Kl(coef=1.0, estimator=name)))
            ),
        )
        for name in ("k1", "k2", "k3", "k1+", "k3+")
    ]
    k3 = Objective(kl=Kl(coef=1.0, estimator="k3"))
    far_apart = lambda: verl_side.kl(far, "low_var_kl").apart(ours(far, k3))  # noqa: E731
    return [*rows, Row("verl", "low_var_kl, far apart", "kl k3", far_apart)]


def verl_corrections() -> list[Row]:
    """Its weights on its own loss; its rejections, which edit the mask, as masks."""

    def weighed(level: str, threshold: object, correction: str, low: float | None, high: float) -> float:
        weights = verl_side.correction_weights(TOOL, level, threshold)
        theirs = verl_side.policy_loss(TOOL, "vanilla", "token-mean", weights=weights, **VERLS, **OFF)
        own = Objective(**CLIP, correction=correction, correction_low=low, correction_high=high)
        return theirs.apart(ours(TOOL, own))

    def kept(option: str, threshold: str, correction: str, low: float, high: float) -> float:
        mask = verl_side.rejection_mask(TOOL, option, threshold)
        own = Objective(**CLIP, correction=correction, correction_low=low, correction_high=high)
        return largest(mask, padded(TOOL, correction_weights(TOOL, own).numpy()))

    def rejected() -> float:
        mask = verl_side.rejection_mask(TOOL, "seq_sum_k1", "0.5_2.0")
        theirs = verl_side.policy_loss(replace(TOOL, mask=mask), "vanilla", "token-mean", **VERLS, **OFF)
        own = Objective(**CLIP, correction="sequence_mask", correction_low=0.5, correction_high=2.0)
        return theirs.apart(ours(TOOL, own))

    mean = ("geometric_rejection", 1 / 1.1, 1 / 0.7)
    product = ("sequence_mask", 0.5, 2.0)
    upright = ("geometric_rejection", 0.7, 1.1)
    return [
        Row("verl", "token IS 1.5 (TIS)", "tis", lambda: weighed("token", 1.5, "tis", None, 1.5)),
        Row(
            "verl",
            "sequence IS 1.5",
            "sequence_tis",
            lambda: weighed("sequence", 1.5, "sequence_tis", None, 1.5),
        ),
        Row(
            "verl",
            "token IS .5_5 (IcePop)",
            "masked_is",
            lambda: weighed("token", "0.5_5", "masked_is", 0.5, 5.0),
        ),
        Row("verl", "seq_mean_k1 .7_1.1", "[1/1.1, 1/.7]", lambda: kept("seq_mean_k1", "0.7_1.1", *mean)),
        Row("verl", "seq_mean_k1, as written", "[.7, 1.1]", lambda: kept("seq_mean_k1", "0.7_1.1", *upright)),
        Row("verl", "seq_sum_k1 .5_2", "sequence_mask", lambda: kept("seq_sum_k1", "0.5_2.0", *product)),
        Row("verl", "seq_sum_k1, in the loss", "sequence_mask, token-mean", rejected),
    ]


def main() -> int:
    """Compare, write the table, and say what is neither equal nor explained."""
    wrong, lines = [], []
    for row in (*trl_rows(), *verl_rows()):
        apart = row.apart()
        reason = DIFFERENT.get((row.peer, row.theirs), "")
        if (apart <= EQUAL) == bool(reason):
            wrong.append(f"{row.peer} {row.theirs}: {apart:.2e} apart, {reason or 'and no reason is known'}")
        lines.append(f"| {row.peer} | {row.theirs} | {row.ours} | {apart:.0e} | {reason or 'the same'} |")
        print(lines[-1], flush=True)
    text = (
        HEAD.format(trl=version("trl"), verl=version("verl"), torch=version("torch"))
        + "\n".join(lines)
        + "\n"
    )
    if "--check" not in sys.argv and not wrong:
        PAGE.write_text(text, encoding="utf-8")
    print(
        "\n".join(wrong) or f"{len(lines)} rows: equal to {EQUAL:g}, or different for a reason that is named"
    )
    return bool(wrong)


HEAD = """# Beside the peers' own code

The same tensors through Lockstep's objectives and through the functions of TRL {trl} and verl {verl} (torch
{torch}, CPU, float64): the largest difference in loss and in the gradient of each token; of advantages and
masks in their values. Six completions of one to seven tokens in two groups, two tokens of a tool, ratios from
.3 to 5. A row that is not equal to 1e-6 and has no reason here fails `make peers`, which makes this page; so
does one that is equal and has a reason.

| peer | theirs | ours | largest difference | |
|---|---|---|---|---|
"""

if __name__ == "__main__":
    sys.exit(main())
