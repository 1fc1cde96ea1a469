"""Objective-level corrections for what is left of the mismatch between engine and trainer.

A correction is a factor on each token, without a gradient. It is of the *mismatch ratio* alone, w =
exp(trainer − engine) under the weights that sampled; what optimizer steps have changed since is the policy
ratio's, and the objective's own business.

    tis                  min(w, high)                      truncation.py
    sequence_tis         min(∏ w, high)                    truncation.py
    masked_is            w where low ≤ w ≤ high, else 0    rejection.py
    geometric_rejection  1 where low ≤ (∏ w)^(1/n) ≤ high, else 0: the whole sequence
    sequence_mask        1 where low ≤ ∏ w ≤ high, else 0: the whole sequence

The denominator of the loss stays: a token that is masked takes its loss away, and the others count for no
more than before (verl edits its response mask, so that its mean is over what is left). What a correction took
away is reported: ``correction_mass_removed``, ``correction_masked_fraction``.

They are locked until the ladder has passed. A correction is no mend: it trades bias for variance on what is
left, and never changes a figure by which the backend is judged.

A token's gap of up to 2e-4 nats is what the order of fp32 sums brings, and counts as none (w = 1): so on a
certified fp32 pair at equal versions each correction is the identity, bit for bit, where no gap is wider, as
on the quick start (1.3e-4). In bf16 rounding itself is a gap of 0.03 nats, on which they act:

    tis, masked_is; |gap| below 0.69             each factor is w itself
    sequence_tis; |sum of gaps| below 0.69       as these, of the sequence's sum
    sequence_mask; |sum of gaps| below 0.69      the identity
    geometric_rejection                          of gaps that err to both sides, a sequence of 100 tokens has
                                                 a mean beyond 1.0e-3 three times in four, and the published
                                                 bounds then leave it out: they are for fp32
"""
