"""Which tokens of a log the model sampled: pads are taken away, what a tool or an environment put in is left
out.

A mask column says so (``file.MASKS``, 1 where the model sampled, which is what verl's response_mask and TRL's
tool_mask and env_mask mean). What it says is held against the numbers: beside a token that was not sampled
stands 0.0, or nothing. ``tool_mask`` and ``env_mask`` are 1 for the *tool's* tokens in some frameworks: they
are read the way the numbers say.

Pads without a mask are told by their id, which is one of the tokenizer's or of the checkpoint's, and by where
they stand: on the right with one and the same number (0.0, or −1 in some versions of verl), or on the left of
prompts. There the trainer says whether the engine saw them; where it cannot tell, prompts that are all of one
length are taken to be padded.
"""

import numpy as np

from lockstep.errors import UsageError
from lockstep.logged.rows import Logged
from lockstep.parity.search_tolerances import HALF, NEARLY_ALL
from lockstep.parity.tolerances import SEMANTICS_MARGIN
from lockstep.records.samples import Group
from lockstep.rendering import Renderer
from lockstep.training.trainer import Trainer

EITHER_WAY = ("tool_mask", "env_mask")
"""Masks of which frameworks disagree what 1 means."""
FEW_PROMPTS, FEW_TOKENS = 4, 32
"""Scored to tell pads from the beginning of a prompt."""


def settle(logged: Logged, trainer: Trainer, renderer: Renderer) -> str:
    """Take pads away and mark what was sampled. Returns what is wrong with a mask, for people; empty when
    nothing is.

    Raises:
        UsageError: when nothing is left.
    """
    pads = pads_of(trainer, renderer)
    _refuse(logged, trainer, pads)
    if not logged.padded:
        _strip_completions(logged, pads)
        _strip_prompts(logged, trainer, pads, renderer.tokenizer.bos_token_id)
    # Now without exception: an id of a pad that is still here stands where tokens do.
    _refuse(logged, trainer, set())
    wrong = ""
    inside = _inside(logged)
    for name, mask in list(logged.masks.items()):
        polarity = _polarity(logged, name, mask, inside)
        kept = ~mask if polarity == "inverted" and name in EITHER_WAY else mask
        if polarity == "inverted" and name in EITHER_WAY:
            logged.notes.append(
                f"{name} read as 1 for what was not sampled, since its 1s stand beside numbers of 0.0"
            )
        elif polarity:
            wrong = wrong or (
                f"{name} is 1 beside {_counted(logged, mask & inside)}, "
                f"and 0 beside {_counted(logged, ~mask & inside)}"
            )
        before = np.count_nonzero(logged.sampled & inside)
        logged.sampled &= kept
        left = before - np.count_nonzero(logged.sampled & inside)
        if left:
            logged.notes.append(f"{left:,} tokens left out by {name}")
    logged.masks.clear()
    if wrong:
        logged.sampled[:] = True
    elif not len(logged.usable()):
        got = "masks and pads that leave no token" if logged.notes else "no token that was sampled"
        hint = "masks are 1 where the model sampled the token"
        raise UsageError(
            f"rollouts {logged.path}", got=got, expected="at least one token to judge", hint=hint
        )
    return wrong


def pads_of(trainer: Trainer, renderer: Renderer) -> set[int]:
    """Ids that sequences are padded with."""
    tokenizer = renderer.tokenizer
    config = trainer.text_config
    known = (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        getattr(config, "pad_token_id", None),
        *renderer.stop_token_ids,
    )
    return {int(token) for token in known if token is not None}


def _refuse(logged: Logged, trainer: Trainer, pads: set[int]) -> None:
    """Ids that the model does not have, but for pads; rows that are longer than its positions."""
    vocabulary = trainer.vocabulary
    config = trainer.text_config
    hint = "is --model the one that drew them?"
    for role, ids, spans in (
        ("prompt", logged.prompt_ids, logged.prompt_spans),
        ("completion", logged.token_ids, logged.spans),
    ):
        for at in np.flatnonzero(ids >= vocabulary):
            row = int(np.searchsorted(spans[:, 0], at, side="right")) - 1
            if row >= 0 and at < spans[row, 1] and int(ids[at]) not in pads:
                boundary = f"rollouts {logged.path}, row {logged.numbers[row]}, {role}"
                got = f"id {ids[at]} at place {at - spans[row, 0]}"
                raise UsageError(boundary, got=got, expected=f"ids below the model's {vocabulary}", hint=hint)
    lengths = np.diff(logged.prompt_spans)[:, 0] + np.diff(logged.spans)[:, 0]
    positions = getattr(config, "max_position_embeddings", None)
    if positions and lengths.max() > positions + 1 and not pads:  # the last token is not looked at
        row = int(lengths.argmax())
        boundary = f"rollouts {logged.path}, row {logged.numbers[row]}"
        got = f"{lengths[row]:,} tokens of prompt and completion"
        raise UsageError(
            boundary, got=got, expected=f"at most the model's {positions:,} positions", hint=hint
        )


def _inside(logged: Logged) -> np.ndarray:
    """bool [T]: tokens that are no pads."""
    edges = np.zeros(len(logged.token_ids) + 1, np.int8)
    # An empty span begins where the next one does, and ``edges[starts] += 1`` would count the two as one.
    np.add.at(edges, logged.spans[:, 0], 1)
    np.add.at(edges, logged.spans[:, 1], -1)
    return np.cumsum(edges[:-1], dtype=np.int8) > 0  # spans do not overlap: no sum is above 1


def _placeholder(values: np.ndarray) -> np.ndarray:
    return (values == 0.0) | np.isnan(values)


def _polarity(logged: Logged, name: str, mask: np.ndarray, inside: np.ndarray) -> str:
    """``inverted`` when the numbers say that 1 marks what was not sampled; else empty."""
    ones = logged.logprobs[mask & inside]
    zeros = logged.logprobs[~mask & inside]
    # Nothing sampled: of a mask that may be read either way, the numbers say whether it means that.
    if not ones.size:
        return (
            "inverted"
            if name in EITHER_WAY and zeros.size and _placeholder(zeros).mean() < NEARLY_ALL
            else ""
        )
    if not zeros.size or _placeholder(ones).mean() < NEARLY_ALL:
        return ""
    return "inverted" if _placeholder(zeros).mean() < HALF else ""


def _counted(logged: Logged, tokens: np.ndarray) -> str:
    values = logged.logprobs[tokens]
    return f"{np.count_nonzero(_placeholder(values)):,} numbers of 0.0 or none in {values.size:,}"


def _strip_completions(logged: Logged, ids: set[int]) -> None:
    """Take away what stands at the end of completions: one id that pads, beside one and the same number."""
    last = logged.spans[:, 1] - 1
    ends = np.isin(logged.token_ids[last], list(ids))
    if not ends.any():
        return
    values, counts = np.unique(logged.logprobs[last][ends], return_counts=True)  # NaNs are one
    value = values[counts.argmax()]
    pad = _commonest(logged.token_ids[last][ends])
    same = np.isnan(logged.logprobs) if np.isnan(value) else logged.logprobs == value
    pads = same & (logged.token_ids == pad)
    runs = np.array([_run(pads[start:stop][::-1]) for start, stop in logged.spans])
    if runs.max(initial=0) < 2:  # a stop token, of which the model was sure
        return
    logged.spans[:, 1] -= runs
    shown = "no number" if np.isnan(value) else f"{value:g}"
    logged.notes.append(
        f"{runs.sum():,} pads (id {pad}, {shown}) "
        f"taken from the ends of {np.count_nonzero(runs):,} completions"
    )


def _commonest(ids: np.ndarray) -> int:
    values, counts = np.unique(ids, return_counts=True)
    return int(values[counts.argmax()])


def _run(pads: np.ndarray) -> int:
    """How many are True before the first that is not."""
    return len(pads) if pads.all() else int(pads.argmin())


def _strip_prompts(logged: Logged, trainer: Trainer, ids: set[int], bos: int | None) -> None:
    """Take away what stands at the beginning of prompts, where the trainer agrees better without."""
    lengths = np.diff(logged.prompt_spans)[:, 0]
    first = logged.prompt_ids[logged.prompt_spans[:, 0]]
    heads = np.isin(first, list(ids))
    if not heads.any():
        return
    pad = _commonest(first[heads])
    runs = np.array([_run(logged.prompt_ids[start:stop] == pad) for start, stop in logged.prompt_spans])
    some = np.flatnonzero(
        (runs > 0)
        & (logged.settings == logged.settings[int(heads.argmax())])
        & (np.diff(logged.spans)[:, 0] > 0)
    )
    some = some[np.argsort(-runs[some], kind="stable")][:FEW_PROMPTS]
    misses = _misses(logged, trainer, some, runs) if some.size else {None: 0.0}
    left = _left(misses, 0 if (lengths == lengths[0]).all() and pad != bos else None)
    if left is None:
        return
    taken = np.maximum(runs - left, 0)
    if (taken >= lengths).any():
        row = int(logged.numbers[int((taken >= lengths).argmax())])
        boundary = f"rollouts {logged.path}, row {row}, prompt"
        raise UsageError(
            boundary, got=f"{pad} and nothing else", expected="a prompt", hint=f"{pad} pads the other prompts"
        )
    logged.prompt_spans[:, 0] += taken
    note = f"{taken.sum():,} pads (id {pad}) taken from the beginnings of {np.count_nonzero(taken):,} prompts"
    logged.notes.append(note + (", one left as BOS" if left and pad == bos else ""))


def _left(misses: dict[int | None, float], in_doubt: int | None) -> int | None:
    """How many of the pads the engine saw, None: all."""
    least = min(misses, key=lambda left: misses[left], default=in_doubt)
    return (
        least
        if misses and SEMANTICS_MARGIN * misses[least] < misses.get(in_doubt, float("inf"))
        else in_doubt
    )


def _misses(logged: Logged, trainer: Trainer, rows: np.ndarray, runs: np.ndarray) -> dict[int | None, float]:
    """The median |gap| under each count of pads left in the prompts; infinite where nothing would be left of
    them."""
    misses: dict[int | None, float] = {}
    for left in (0, 1, None):
        groups, engine = [], []
        for row in rows:
            prompt = logged.prompt(row)[0 if left is None else max(int(runs[row]) - left, 0) :]
            start = logged.spans[row][0]
            stop = min(logged.spans[row][1], start + FEW_TOKENS)
            if len(prompt) and prompt.max() < trainer.vocabulary:
                groups.append(Group(prompt, [logged.token_ids[start:stop]]))
                engine.append(logged.logprobs[start:stop])
        if groups:
            scores = trainer.score(groups, logged.samplings[logged.settings[rows[0]]].temperature or 1.0)
            gap = np.abs(np.concatenate(scores) - np.concatenate(engine))
            misses[left] = float(np.nanmedian(gap)) if np.isfinite(gap).any() else float("inf")
    return misses
