"""Probe prompts: rows that differ from token 0 on, so that a mix-up of rows cannot go unseen.

Two halves: conversations through the chat template (special tokens, the task's own questions, text outside
ASCII), and random ids of many lengths. The random half makes the model unsure, so that low-probability tokens
are drawn and scored.
"""

import numpy as np

from lockstep.parity.pair import Pair

TEXTS = (
    "Wie heißt die Hauptstadt von Österreich?",
    "日本で一番高い山は何ですか。",
    "Объясни, что такое энтропия.",
    "¿Cuánto es ½ + ¼? 🙂",
    "Write a haiku about rounding errors.",
    "def f(x):\n\treturn x ** 2  # continue",
    "ما هو لون السماء؟",
    "1, 1, 2, 3, 5, 8,",
)
LONGEST = 160
ROOM = 8
"""Tokens left free: an engine that adds some to a prompt is to be found out, not refused."""


def probe_prompts(pair: Pair, n: int, seed: int) -> list[np.ndarray]:
    """``n`` prompts as int32 ids, lengths from 3 to the engine's limit; no two begin alike where the
    vocabulary has so many ids."""
    rng = np.random.default_rng(seed)
    limit = min(LONGEST, pair.recipe.engine.max_model_len - pair.recipe.parity.probe_tokens - ROOM)
    vocabulary = pair.trainer.vocabulary
    starts = rng.choice(vocabulary, n, replace=n > vocabulary).astype(np.int32)
    lengths = np.geomspace(3, max(limit, 4), n).astype(int)
    prompts = []
    for row in range(n):
        if row % 2:
            ids = rng.integers(0, vocabulary, lengths[row]).astype(np.int32)
        else:
            ids = pair.renderer.prompt(_conversation(pair, row // 2))[-limit:]
        prompts.append(np.r_[starts[row], ids].astype(np.int32))
    return prompts


def _conversation(pair: Pair, number: int) -> list[dict[str, str]]:
    if number % 2:
        return [{"role": "user", "content": TEXTS[(number // 2) % len(TEXTS)]}]
    return pair.task.messages(pair.task.item(number))[-1:]
