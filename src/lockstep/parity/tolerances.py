"""Every threshold of the ladder, and of what is diagnosed with it, with its derivation.

Nothing else in parity/, deep/ or diagnose/ holds a number that decides a verdict or a cause, but
``search_tolerances.py``, the search's for a cause. ``tests/unit/test_thresholds.py`` reads the code for
others, and says of each number that stays where it is why it is none.

A gap is judged against what the arithmetic of a dtype can bring about, measured on this project's own clean
runs, and against the objective's clip range; never against a mean that can cancel.
"""

import numpy as np
from msgspec import Struct


class Tolerance(Struct, frozen=True):
    """What two computations of one log-probability may differ by in one dtype, nats; what stands out from
    that."""

    p50: float
    p999: float
    perturbation: float
    """Noise of layer 3 that stands out, relative to each tensor's root mean square: 0.02 moves SmolLM2's
    log-probabilities by 0.3 nats, three orders above fp32 noise; 0.04 by 0.6, where 0.02 did not stand out
    from bf16 on every probe seed."""


NOISE: dict[str, Tolerance] = {
    # Unit roundoff 6e-8 times logits of about 20 over 30 layers gives 1e-5 to 1e-4; SmolLM2 on a CPU measured
    # 4e-5 at most. Ten times that, for longer models and sequences.
    "torch.float32": Tolerance(p50=1e-4, p999=1e-3, perturbation=0.02),
    # Unit roundoff 4e-3: one engine's decode against its own prefill measured a mean of 0.043 and a maximum
    # of 0.29 in bf16; twice the mean for the median, three times the maximum for the tail.
    "torch.bfloat16": Tolerance(p50=0.09, p999=0.9, perturbation=0.04),
    "torch.float16": Tolerance(p50=0.02, p999=0.2, perturbation=0.02),
    # Keys and values alone: what is nearly on a border is rounded to either side, three bits coarse. Decode
    # against prefill measured 5e-4 in the mean and 0.075 at most (SmolLM2 in fp32, vLLM 0.32.0, a CPU); four
    # times that.
    "fp8": Tolerance(p50=0.002, p999=0.3, perturbation=0.02),
}

SEMANTICS_MARGIN = 3.0
"""The tempered hypothesis may fit worse than the two sides agree at T = 1 by this factor. Dividing logits by
0.7 multiplies their error by 1.4; the rest is the spread of a median over a few hundred tokens. A wrong
hypothesis misses by 0.25 nats in the median on SmolLM2, where the two sides agree to 1e-5."""

DISTINGUISHING_TEMPERATURE = 0.7
"""Where the recipe samples at T = 1, raw and tempered log-probabilities coincide; this probe tells them apart
by 0.15 nats in the mean on SmolLM2."""

KEPT_MASS_SLACK = 3.0
"""What arithmetic may bring to the mass of a truncated distribution that was kept, as a multiple of the
median |gap| allowed: of a normal error that multiple of the median is two standard deviations, so that one
token in fifty lies above it. The mass is at most 1, so that its own error is at most that of its logarithm,
which is the gap."""

RARELY_ABOVE = 0.02
"""Share of tokens whose number may lie below the whole distribution's when it is truncated, which only makes
numbers larger: noise alone brings them there, one token in fifty by the slack above."""

LOG_CHANCE = -21.0
"""Draws are not of their distribution when what was seen has a chance of e^−21 = 8e-10 or less. A hidden
top-p of 0.9 over 500 tokens has 0.9^500 = e^−53."""

TELLING_LOG_T = 0.1
"""|log T| from which a recipe's own sample tells raw from tempered: at T = 0.9 the two differ by 0.14 nats in
the median on SmolLM2, where bf16 brings 0.03. Nearer to 1 another temperature is drawn at."""

DRAWS_Z = 6.0
"""The same chance in standard errors of Σ(log p + H), whose sum over some hundred bounded terms is close to
normal."""

DRAWS_FALSE_ALARM = 1e-4
"""Chance at most, by Markov's inequality and without an approximation, that honest draws fail the test of
many draws (``draws.py``): one check in ten thousand. At 8e-10, as above, it would take half as many draws
again to see the same."""

REPLAY_WRONG_MULTIPLE = 3.0
"""The two assumptions about the cache are told apart when the one that is not in force misses by this
multiple of the other. In fp32 it missed by 0.15 nats in the mean against 1e-5 (SmolLM2, vLLM 0.32.0)."""

ABSURD_NATS = 5.0
"""A token is absurd when the engine gave it 150 times the probability of a re-score. fp32 and bf16 pairs
measured 1e-4 and 0.3 at most."""

CORRUPTED_AT_MOST = 0.5
"""Share of completions: corruption strikes some of them. What strikes most is a fault of the whole path."""

PHANTOM_CLIP_FRACTION = 0.05
"""Share of tokens that the objective may clip because of the mismatch alone. Such a token has no gradient on
one side of its advantage, so this bounds the lost signal at a twentieth. bf16 on both sides with fp32 heads
measured 1.3 % outside [0.8, 1.2] at T = 0.7 (SmolLM2, CPU), and pairs of that kind train; a public report of
a collapse had 45 %."""

PRECISION_MULTIPLE = 6.0
"""A difference of dtype explains a gap of at most this multiple of what the trainer's own model shows between
the two: another kernel rounds in other places. A bf16 body beside an fp32 trainer measured 0.9 times that on
vLLM 0.32.0 (0.024 against 0.027 nats in the median), and 4.4 times on 0.8.5 (0.12), whose norms round between
their steps."""

QUANTISED_CORRELATION = 0.7
"""Between the gaps and what the trainer's own weights, rounded alike, bring to each token: weights that are
rounded in one way err in one way, where another kernel's roundings are its own. Two bf16 kernels on one
checkpoint in bf16 correlate by less."""

CENTRED = 0.5
"""|median gap| over median |gap|: rounding errs to both sides; what errs to one side by more than half of its
size is no rounding."""

POLICY_RATIO_AT_LAG_0 = 0.0
"""At lag 0 the trainer's log-probabilities are compared with themselves, bit for bit."""

LOSS_SLACK = 1.01
"""The loss with the engine's numbers as denominator may move by max|A| · (exp(max|gap|) − 1): each ratio
moves by at most that factor. The hundredth covers the rounding of the sum."""

LEAST_TENSOR = 4.0
"""How much less than the root mean square over tensors one may move a token: a tiny model's down_proj .036
nats, where all 16 together moved it by .45."""

PERTURBATION_OVER_NOISE = 3.0
"""Layer 3 is NOT_RUN unless the perturbation moves the trainer's own canary scores by this multiple of the
dtype's median noise: a proof that could not have failed is none."""

CANARY_MULTIPLE = 5.0
"""A sync is refused when the canary's mean |gap| exceeds this multiple of the mean |gap| that the ladder
measured (``Canary.clean_gap_nats``), and proven when it does not although the update moved the trainer's own
scores by more than that. Over 93 clean fp32 syncs of the quick start the ratio stayed below 1.2; one of its
steps moves the canary by 1.5e-3 to 5e-3 nats, which is 130 to 450 times the clean gap. In bf16 the clean gap
is 3e-2 nats: there a step is lost in the noise, and is counted as not proven."""

CANARY_FLOOR = 1e-6
"""Least mean |gap| assumed in that comparison, nats: the spacing of float32 log-probabilities near −10."""

CANARY_MOST = 0.5
"""Share of the canary's tokens: where an update moves so many on the trainer, it moves one on the engine.

Scores alone do not tell an update that was lost from one that there was not: where a step's rewards are all
the same no weight moves, and yet the trainer's scores do, in their last bit, with the threads it has. And
under an update that moves a number here and there an engine may keep all of its own."""

OTHER_CHECKPOINT = 2.0
"""The engine held other weights before the first sync when the sides then differed by more than this multiple
of the dtype's median noise, and by more than what a later sync is refused at. The factor is for the mean of a
gap, which lies above its median."""

LARGEST_OVER_P999 = 3.0
"""The largest error of a token's log-odds, as a multiple of the dtype's tail. Of a normal error the largest
of 10^8 tokens is 1.7 times the 0.999 quantile; the rest is for the weight of real tails: 5,120 fp32 tokens at
T = 0.7 measured a largest gap of 4e-5 to 8e-5, single tokens behind random ids 4.5e-4."""

SIGMA_OVER_MEDIAN = 1.4826
"""Standard deviation over median |x| of a normal: a width that a few wild tokens do not move."""

NEGLIGIBLE_NATS = 1e-4
"""A ratio of 1.0001. Less is never refused as such: float32 log-sums near 30 have a spacing of 2e-6, and a
few of them add up."""

OWN_NOISE_RATIO = 2.0
"""A gap's width over both sides' own rounding, at most (``own_noise.py``). vLLM 0.32.0 in bf16 was .024 nats
from an fp32 trainer whose own model rounds .027 away in bf16 (SmolLM2); another order of the operations may
bring twice that. 0.8.5 brought 4.4 times, which the table of dtypes refuses too."""
OWN_NOISE_Z = 3.0
"""Standard errors of that ratio's interval: at the limit one check in a thousand is beyond."""
OWN_NOISE_LARGEST = 30.0
"""Widths that one token may be off by: three (``LARGEST_OVER_P999``) times bf16's tail of ten medians, seven
widths (``NOISE``), and half as much again for the width's own error."""
OWN_NOISE_CERTAIN = 1e-4
"""1 − p below which log p has no digits left to tell a rounding by."""
OWN_NOISE_SEQUENCES = 8
"""From which an error over sequences is known; of fewer the ratio has no interval, and refuses nothing."""

P999_TOKENS = 1000
"""Tokens below which the 0.999 quantile is the largest, which limits by a token's own probability judge."""

GATE_MEDIAN_MULTIPLE = 3.0
"""A step's median |gap| may be this multiple of what the ladder measured on this pair. Its probes hold random
ids, on which the gap is larger than on a task's own text; a bias of .3 nats is ten times a bf16 pair's median
of .03. A third of the dtype's noise is never refused: two sides with the same kernels agree to 0 in bf16
before training moves the logits, and to .003 after it."""

BIAS_Z = 6.0
"""Standard errors over sequences by which a step's mean gap may lie beyond the ladder's, besides one median
of slack: a chance of 2e-9 where sequences are many, and the slack holds where they are few."""


# Of a replay, and what both sides share.

REPLAY_ATOL = 1e-6
"""Figures of a replayed step that are sums which cancel (a loss of 0) have no scale of their own."""


def replay_rtol(dtype: str) -> float:
    """By how much a replayed step's figures may differ, relatively. The same machine gives them bit for bit;
    another one rounds elsewhere: a thousandth in fp32 is a hundred roundings of a sum, and bf16's unit
    roundoff of 4e-3 needs ten times that."""
    return 1e-3 if dtype == "torch.float32" else 5e-2


def largest_gap(logprobs: np.ndarray, noise: Tolerance, temperature: float) -> np.ndarray:
    """The largest |gap| that arithmetic can bring at each token's probability p, nats.

    An error of d in a token's log-odds log(p / (1 − p)) moves log p by at most log(1 + (1 − p)(e^d − 1)): by
    d for an unlikely token, by nothing for a certain one. A temperature below 1 divides the logits' errors as
    it divides the logits.

    Args:
        logprobs: float [T], the higher of the two sides' numbers. Then the bound says exactly that the two
        log-odds differ by d.
    """
    log_odds = LARGEST_OVER_P999 * noise.p999 / min(1.0, temperature)
    unlikely = -np.expm1(np.minimum(logprobs.astype(np.float64), 0.0))
    return NEGLIGIBLE_NATS + np.log1p(unlikely * np.expm1(log_odds))


def noise_of(*dtypes: str) -> Tolerance:
    """The widest noise among the dtypes that took part (``"torch.float32"`` …); an empty one is not known."""
    return max((NOISE[dtype] for dtype in dtypes if dtype), key=lambda tolerance: tolerance.p999)


# Of a sync that a step's own rollouts prove (delivered.py), and of tensors that stay behind (left_behind.py).

DELIVERED_Z = 4.0
"""Standard errors within which a sync is neither proven nor refuted by its rollouts: of noise one step in
30,000 is beyond, and a run has hundreds."""

DELIVERED_MISSING = 0.1
"""Least share of an update that is called missing. Below it lies what rounding itself does to an update: the
trainer's rounding is not the engine's, and both change with the weights."""

DELIVERED_LEAST_MOVE = 2e-5
"""Root mean square of what an update does to its tokens, nats, below which they say nothing of it. Both
scores are fp32, with a rounding of their own of up to 4e-6 (the quick start's canary under one thread and
under two). It is in the gap and in the move both, and of a move of d roundings 1 / (d² + 2) seems to be
missing: at five a twenty-seventh, far from a tenth (``DELIVERED_MISSING``). A step of the quick start moves
1.5e-3; at a learning rate of 1e-12, or where a schedule ends, it moves less, and .66 and .76 of such an
update were called missing."""

DELIVERED_PROVEN = 0.5
"""Share of an update that would have shown, had it been missing, where the sync is proven. Halfway between
all and nothing; what is lost in practice is all, or single tensors, which are asked one by one."""

DELIVERED_SETTLED = 1e-3
"""A step, in shares of the update, below which the descent ends. A proof leaves an error of up to .125."""

DELIVERED_STEPS = 12
"""Steps of the descent at most; four or five do where the noise is wider than the update."""

SUSPECTED = 0.5
"""Share of a tensor's change that tokens seem to lack, from which it is suspected: one that stayed behind
lacks all of it, within the error that the score test allows."""

ARRIVED = 0.5
"""Share of the trainer's move, root mean square: an engine that moved so far was sent something. Halfway
between the two that there are, all and nothing."""

FARTHER = 3.0
"""Multiple of layer 3's perturbation by which single tensors are moved: there the whole is to show, here each
tensor's part. On SmolLM2 in bf16 93 of 273 tensors would have shown at once, 160 at three times."""

# Of the alarms that training gives (alarms.py); what refuses tokens is the gate's.

ALARM_ESS = 0.99
"""Mismatch ESS. For a small gap it is 1 less the gap's variance: 1 − 1e-9 of the fp32 pairs in the README,
and .9975 of a bf16 body, whose mean |gap| is .05; at .99 the gap is twice as wide as that. Of a pair that the
ladder found wider it is the ESS of a gap ``ALARM_DRIFT_MULTIPLE`` times as wide as the ladder's. The alarm of
clips has no such measure: ``PHANTOM_CLIP_FRACTION`` bounds a loss of signal, whatever pair it is of."""

ALARM_DRIFT_MULTIPLE = 2.0
"""Median |gap| over the ladder's from which it drifts; the gate refuses at ``GATE_MEDIAN_MULTIPLE``, 3. Where
the ladder measured next to nothing, over a third of what the gate never refuses."""

ALARM_FLAT_GROUPS = 0.9
"""Share of flat groups. A tenth of the batch is what is left to learn from, at ten times the price."""

ALARM_ENTROPY_LEFT = 0.05
"""Share of the first step's entropy. The quick start, which learns as it should, ends at .11 of it."""

ALARM_LENGTH_LEFT = 0.25
"""Share of the first step's mean length. An answer with the reasoning gone is shorter than that; one that has
learned to be brief is not, of the tasks that are run here."""

# Of what is diagnosed: an atlas's cells (diagnose/battery.py), an upgrade's differences (changes.py), factors
# (ablation.py).

SAME_NATS = 1e-3
"""In fp32: kernels of two shapes differ by 1e-5, another distribution, row or version by 0.01 and more."""

MODE_Z = 5.0
"""Standard errors of a mean gap beyond which an engine's numbers are of another distribution: by chance alone
once in a million."""

Z_OF_95 = 1.96
"""Standard errors to either side of a mean that hold 95 % of a normal's: the interval that is shown beside
it."""

CANCELS = 0.1
"""Share of the total gap: what two factors take off together beyond each alone is no noise from here on."""
