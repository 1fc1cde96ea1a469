"""Every threshold of the ladder, with its derivation. Nothing else in parity/ holds a number that decides.

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

IMPROVES = 0.9
"""Of a miss: where the best value of a coarse grid leaves more of it, no value between two of them is looked
for. A setting that is right leaves a third of the miss at most (``EXPLAINS``), and the grids are dense enough
that its neighbours mend a tenth."""

TAIL, TAIL_OVER_MEDIAN = 0.99, 10.0
"""A hypothesis is held against a tenth of this quantile of |gap| too: what the arithmetic of a body's dtype
brings has a p999 of ten times its median (``NOISE``), and a p99 below that."""

EXPLAINS = 1 / 3
"""Of a miss: a hypothesis that leaves more of it, be that within arithmetic, explains nothing."""

ALIKE = 1.5
"""Tensors that explain a gap within this multiple of the best miss are named beside it: some edits cannot be
told apart by any score. Two re-scores of one edit differ by arithmetic alone; the half is room for that."""

LIMIT_OVER_ALIKE = 10.0
"""Misses this many times below what is a proof at all are alike too: arithmetic alone makes the best."""

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

OTHER_CHECKPOINT = 2.0
"""The engine held other weights before the first sync when the sides then differed by more than this multiple
of the dtype's median noise, and by more than what a later sync is refused at. The factor is for the mean of a
gap, which lies above its median."""

LARGEST_OVER_P999 = 3.0
"""The largest error of a token's log-odds, as a multiple of the dtype's tail. Of a normal error the largest
of 10^8 tokens is 1.7 times the 0.999 quantile; the rest is for the weight of real tails: 5,120 fp32 tokens at
T = 0.7 measured a largest gap of 4e-5 to 8e-5, single tokens behind random ids 4.5e-4."""

NEGLIGIBLE_NATS = 1e-4
"""A ratio of 1.0001. Less is never refused as such: float32 log-sums near 30 have a spacing of 2e-6, and a
few of them add up."""

OWN_NOISE_RATIO = 2.0
"""Of a gap's width to both sides' own rounding (``own_noise.py``). vLLM 0.32.0 in bf16 was .024 nats from an
fp32 trainer whose own model rounds .027 away in bf16 (SmolLM2); another order of the operations may bring
twice that. 0.8.5 brought 4.4 times, which the table of dtypes refuses too."""
OWN_NOISE_Z = 3.0
"""Standard errors of that ratio's interval: at the limit one check in a thousand is beyond."""
OWN_NOISE_LARGEST = 30.0
"""Widths that one token may be off by: three (``LARGEST_OVER_P999``) times bf16's tail of ten medians, seven
widths (``NOISE``), and half as much again for the width's own error."""

GATE_MEDIAN_MULTIPLE = 3.0
"""A step's median |gap| may be this multiple of what the ladder measured on this pair. Its probes hold random
ids, on which the gap is larger than on a task's own text; a bias of .3 nats is ten times a bf16 pair's median
of .03. A third of the dtype's noise is never refused: two sides with the same kernels agree to 0 in bf16
before training moves the logits, and to .003 after it."""

BIAS_Z = 6.0
"""Standard errors over sequences by which a step's mean gap may lie beyond the ladder's, besides one median
of slack: a chance of 2e-9 where sequences are many, and the slack holds where they are few."""


# Of the search for a cause. What is named has explained the numbers to within NOISE in any case; these say
# what is looked at, and which of two explanations is meant.

MOST_ROWS = 0.5
"""Share of rows, or of their tokens, that an explanation must concern: what strikes most of them is a fault
of the whole path, what strikes fewer is corruption, which layer 2 looks for."""

LEAST_ROWS = 2
"""Rows that are off before an explanation of rows is looked for: one is corruption."""

OFF_QUANTILE = 0.8
"""Of a row's |gap|: a setting that is felt by a fifth of a row's tokens makes the row one that is off."""

TELLING_NATS = 1e-2
"""Noise beyond which a log-probability fits too many tokens to tell which one it is of: 50,000 tokens over
some 20 nats lie half a thousandth apart in the mean, so that dozens are this near."""

PROVING_TOKENS = 1
"""Tokens after an edited one that must agree once it is put right. With an error of a nat or so after a wrong
token and fp32's noise of 1e-3 one or two in a thousand agree by chance, and most of the rows must."""

UNEDITED_AT_MOST = 0.25
"""Share of rows that may stay off under the right edit of their prompts: those whose prompts are so short
that the edit leaves nothing of them."""

SCREEN_SLACK = 2.0
"""A setting may miss on the few tokens it is fitted on by this multiple of what is an explanation: the median
of 24 normal errors exceeds twice the median of all less than once in a thousand times. What passes is judged
on all."""

SETTING_SCREEN_SLACK = 3.0
"""The same for settings of the model, which are fitted on a few rows whose tokens' errors go together."""

TEMPERATURES_APART = 5e-3
"""|log ratio| up to which two temperatures are one: with logits spread over 10 nats that far apart they
differ by 0.05 nats, and people set temperatures in steps of a hundredth at least."""

LARGEST_TOP_K = 4096
"""Ranks past this speak against a truncation that matters: the tail beyond holds next to no mass, and nobody
sets such a k."""

BIAS_ENOUGH = 0.5
"""Of the median noise: what the fitted tokens are left with in the mean when no more biases are looked for.
Less is arithmetic's."""

BIAS_SUPPORT = 4
"""Numbers that each bias must mend on average. One that mends the number of a single drawn token explains
nothing, for there is one for every number."""

MOVE_IMPROVES = 0.8
"""Of the miss: a move of the vocabulary's ids that leaves more at each of a dozen places is no better between
them, for with each place passed a twelfth more of the tokens is read as drawn."""

TOKEN_AT_MOST_NATS = 3.0
"""Of a token's |gap| in that comparison: how far off one wrong token is says little, that it is off says
all."""

MOVED_AT_LEAST_NATS = 0.5
"""Mean of those, from which a move of the vocabulary is looked for: what one wrong token in six brings. A
moved id makes its own number wrong and those behind it; a rarer one leaves the median right."""

LEAST_REPLACED = 3
"""Numbers beyond a threshold that must be one and the same value to be replaced ones: float32 numbers of
different tokens agree bit for bit once in some million pairs."""

DRAWS_POWER = 0.9
"""Chance with which the effects that a check says it would have seen are seen."""

# Of a log: which of its numbers are none of their tokens.

ONE_VALUE = 0.9
"""Share of the tokens that are off which carry one value, or stand in one place: then it is a placeholder."""

LONG_RUN, IMPROBABLE_NATS = 4, -2.0
"""So many exact zeros on end, beside tokens so improbable to the model, are no draws, whatever else is off: a
number of 0.0 says certainty, where the model gives four such tokens e^−8."""

RIGHT_TOKENS = 8
"""Tokens beside the placeholders at least: that they are right must be seen on more than a few."""

STRUCK = 0.05
"""Share of a row's tokens beyond arithmetic's tail that makes a row one that is not right: fifty times what a
0.999 quantile lets through."""

UNRELATED = 0.5
"""Correlation of a row's numbers with the scores of its tokens below which they are of other tokens. Right
numbers of a coarse dtype correlate by far more, those of other tokens by about nothing."""

PLAUSIBLE_NATS = -1.0
"""Mean of log p + entropy per token: 0 for draws of the model, nats below for other tokens."""

NEARLY_ALL, HALF = 0.9, 0.5
"""A mask is the other way round when at least this share of the numbers beside 1s is 0.0, and less than this
of those beside 0s: a token that was not sampled carries 0.0."""

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


# Of the score test, which looks for a direction in a gap (explain/score_test.py).

SCORE_LEVEL = 0.01
"""Chance, over all directions of one test together, that noise is called a direction."""

SCORE_FLIPS = 4000
"""Of the signs: the chance at ``SCORE_LEVEL`` is then known to .16 % (its standard error, √(.01 · .99 /
4000))."""

SCORE_POWER = 0.99
"""Chance with which a departure of the size that a PASS states would have been called."""

SIGMA_OVER_MEDIAN = 1.48
"""Standard deviation over median |x| of a normal: a width that a few wild tokens do not move."""

NARROWEST = 1e-2
"""Of the whole gap's width: tokens that agree better than that by chance would each weigh ten thousand times
what the others do."""

SCORE_WINSOR = 3.0
"""Widths at which a token's gap is clipped: of a normal one .3 % are beyond, and their mean says as much as
if none were."""

SCORE_AGAIN_T = 2.33
"""t of a direction that was found, on tokens drawn anew: of noise one in a hundred is beyond, and one in ten
thousand checks calls noise a direction."""

SYSTEMATIC_NATS = 1e-3
"""Root mean square of what a direction does to a token, from which it is a fault: a phantom shift of a ratio
by .1 %. Below it lie what two right implementations in fp32 differ by all the same (1e-5)."""

SYSTEMATIC_LEFT = 0.25
"""Share of a direction that may be left once the trainer is moved along it, and it still is the
explanation."""

SCORE_STEP = 0.02
"""How far a tensor is scaled to see what a scale of it does: log-probabilities are straight that far to a few
per cent, and bf16 weights, rounded to .4 %, still carry it."""

SCORE_ALIKE = 0.9
"""Cosine between the pulls of two directions from which they are told as one: the second's share of the
first's evidence is then its square, .81, and which of the two is larger is chance."""

DELIVERED_Z = 4.0
"""Standard errors within which a sync is neither proven nor refuted by its rollouts: of noise one step in
30,000 is beyond, and a run has hundreds."""

DELIVERED_MISSING = 0.1
"""Least share of an update that is called missing. Below it lies what rounding itself does to an update: the
trainer's rounding is not the engine's, and both change with the weights."""

DELIVERED_PROVEN = 0.5
"""Share of an update that would have shown, had it been missing, where the sync is proven. Halfway between
all and nothing; what is lost in practice is all, or single tensors, which are asked one by one."""

DELIVERED_SETTLED = 1e-3
"""Of a share: where the descent ends. A proof leaves an error of up to .125."""

DELIVERED_STEPS = 12
"""Of the descent at most; four or five do where the noise is wider than the update."""

SUSPECTED = 0.5
"""Share of a tensor's change that tokens seem to lack, from which it is suspected: one that stayed behind
lacks all of it, within the error that the score test allows."""

FARTHER = 3.0
"""Times layer 3's perturbation, of which the whole is to show, where each tensor's part is to: on SmolLM2 in
bf16 93 of 273 tensors would have shown at once, 160 at three times."""

# Of the alarms that training gives (alarms.py); what refuses tokens is the gate's.

ALARM_ESS = 0.99
"""Mismatch ESS. For a small gap it is 1 less the gap's variance: 1 − 1e-9 of the fp32 pairs in the README,
and .9975 of a bf16 body, whose mean |gap| is .05; at .99 the gap is twice as wide as that."""

ALARM_DRIFT_MULTIPLE = 2.0
"""Median |gap| over the ladder's from which it drifts; the gate refuses at ``GATE_MEDIAN_MULTIPLE``, 3."""

ALARM_FLAT_GROUPS = 0.9
"""Share of flat groups. A tenth of the batch is what is left to learn from, at ten times the price."""

ALARM_ENTROPY_LEFT = 0.05
"""Of the first step's entropy. The quick start, which learns as it should, ends at .11 of it."""

ALARM_LENGTH_LEFT = 0.25
"""Of the first step's mean length. An answer with the reasoning gone is shorter than that; one that has
learned to be brief is not, of the tasks that are run here."""
