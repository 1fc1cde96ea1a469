"""Every threshold of the search for a cause, with its derivation.

It says what is looked at, and which of two explanations is meant. What is named has explained
the numbers to within the ladder's own thresholds (``tolerances.py``) in any case.
"""

IMPROVES = 0.9
"""Share of a miss: where the best value of a coarse grid leaves more, no value between two of them is looked
for. A setting that is right leaves a third of the miss at most (``EXPLAINS``), and the grids are dense enough
that its neighbours mend a tenth."""

TAIL = 0.99
"""Quantile of |gap| that a hypothesis is held against beside the median."""

TAIL_OVER_MEDIAN = 10.0
"""What that quantile counts less than the median: what the arithmetic of a body's dtype brings has a p999 of
ten times its median (``NOISE``), and a p99 below that."""

EXPLAINS = 1 / 3
"""Share of a miss: a hypothesis that leaves more of it, be that within arithmetic, explains nothing."""

ALIKE = 1.5
"""Tensors that explain a gap within this multiple of the best miss are named beside it: some edits cannot be
told apart by any score. Two re-scores of one edit differ by arithmetic alone; the half is room for that."""

LIMIT_OVER_ALIKE = 10.0
"""Misses this many times below what is a proof at all are alike too: arithmetic alone makes the best."""

MOST_ROWS = 0.5
"""Share of rows, or of their tokens, that an explanation must concern: what strikes most of them is a fault
of the whole path, what strikes fewer is corruption, which layer 2 looks for."""

LEAST_ROWS = 2
"""Rows that are off before an explanation of rows is looked for: one is corruption."""

LEAST_TOKENS = 12
"""Numbers of the rows that are off, from which an explanation of these alone is looked for: what is fitted is
judged by their median, which of fewer is within reach of some setting or other."""

MOST_TEMPERATURES = 4
"""Temperatures that rows of one file are told apart by: with one for every row, rows that are off for another
reason would be called tempered."""

OFF_QUANTILE = 0.8
"""Quantile of a row's |gap|: a setting that a fifth of a row's tokens feel makes the row one that is off."""

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

LEAST_P = 0.02
"""Quantile of the kept masses that is read as a top-p: their least is it, but for noise, which brings one
token in fifty below (``RARELY_ABOVE``)."""

BIAS_ENOUGH = 0.5
"""Share of the median noise that the fitted tokens have left in the mean when no more biases are looked for.
Less is arithmetic's."""

BIAS_SUPPORT = 4
"""Numbers that each bias must mend on average. One that mends the number of a single drawn token explains
nothing, for there is one for every number."""

MOVE_IMPROVES = 0.8
"""Share of the miss: a move of the vocabulary's ids that leaves more at each of a dozen places is no better
between them, for with each place passed a twelfth more of the tokens is read as drawn."""

TOKEN_AT_MOST_NATS = 3.0
"""What a token's |gap| counts at most in that comparison: how far off one wrong token is says little, that it
is off says all."""

MOVED_AT_LEAST_NATS = 0.5
"""Mean of those, from which a move of the vocabulary is looked for: what one wrong token in six brings. A
moved id makes its own number wrong and those behind it; a rarer one leaves the median right."""

LEAST_REPLACED = 3
"""Numbers beyond a threshold that must be one and the same value to be replaced ones: float32 numbers of
different tokens agree bit for bit once in some million pairs."""

ON_GRID = 1e-6
"""What a number on a grid may be off it, nats: the spacing of float32 near −10."""

ROUNDINGS = 2
"""Times the largest rounding that the right numbers show: what a number may be off by under its own. It
doubles past a power of two, which the right numbers may lie just below."""

DRAWS_POWER = 0.9
"""Chance with which the effects that a check says it would have seen are seen."""

# Of a log: which of its numbers are none of their tokens.

ONE_VALUE = 0.9
"""Share of the tokens that are off which carry one value, or stand in one place: then it is a placeholder."""

LONG_RUN = 4
"""So many exact zeros on end, beside improbable tokens, are no draws, whatever else is off: a number of 0.0
says certainty, where the model gives four such tokens e^−8."""

IMPROBABLE_NATS = -2.0
"""The model's log-probability that half of those tokens have at most."""

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

# Of the score test, which looks for a direction in a gap (explain/score_test.py).

FEWEST_PROMPTS = 16
"""Fewest prompts of which a direction is looked for: t is at most their root, and noise alone reaches 3.7."""

SCORE_LEVEL = 0.01
"""Chance, over all directions of one test together, that noise is called a direction."""

SCORE_FLIPS = 4000
"""Draws of signs: the chance at ``SCORE_LEVEL`` is then known to .16 % (its standard error, √(.01 · .99 /
4000))."""

SCORE_POWER = 0.99
"""Chance with which a departure of the size that a PASS states would have been called."""

NARROWEST = 1e-2
"""Least width, in shares of the whole gap's: tokens that agree better by chance would each weigh ten thousand
times what the others do."""

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
