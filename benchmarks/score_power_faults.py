"""The faults of ``score_power.py``, each planted in the trainer at three sizes, and the small model that was
made for it. Nothing runs here."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace as with_settings
from torch import Tensor

from lockstep.parity.explain.numerics import by_token as ways
from lockstep.parity.explain.numerics.direction import (
    ATTENTION,
    FIRST_TOKENS,
    LONG_PROMPTS,
    SCALED,
    Direction,
)
from lockstep.parity.explain.semantics.hypotheses import scored_under
from lockstep.parity.pair import Pair
from lockstep.policy.parameters import Snapshot
from lockstep.policy.pulls import HEAD
from lockstep.policy.variant_settings import (
    AttentionScaled,
    LogitsCapped,
    NormEpsilon,
    PositionsDivided,
    RotaryBase,
    SlidingWindow,
)
from lockstep.policy.variants import Along, Earlier, Scaled, Variant
from lockstep.records.samples import Samples
from lockstep.records.semantics import LogprobSemantics
from lockstep.training.trainer import Trainer

LEFT_OLD = "old"
OLD_BY = 0.01
"""How far a tensor's last value lies from its present one, by its root mean square."""

Scores = Callable[[Pair, Samples, np.ndarray, float], np.ndarray]
"""(pair, all sequences, the trainer's own scores, size) → its scores with the fault, float32 [T]."""


@dataclass(frozen=True)
class Planted:
    """One fault."""

    name: str
    sizes: tuple[float, float, float]
    scores: Scores
    right: Callable[[Direction], bool]
    """Is it named so?"""


def made_qwen2(path: Path) -> Path:
    """A Qwen2 of four layers with random weights, and a tokenizer of single characters."""
    if path.exists():
        return path
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        initializer_range=0.25,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    part = path.with_suffix(".part")
    Qwen2ForCausalLM(config).to(torch.bfloat16).float().save_pretrained(part)
    letters = ["<s>", "</s>", "<unk>", *(chr(n) for n in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(part)
    part.rename(path)
    return path


def older(name: str, parameter: Tensor) -> Tensor | None:
    """Old − new of a layer's tensor, the same each time it is asked for."""
    if ".layers." not in name:
        return None
    seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(parameter.shape, generator=seed)
    return (OLD_BY * noise * parameter.float().square().mean().sqrt()).to(parameter.dtype)


def faults_of(trainer: Trainer | None) -> list[Planted]:
    """All of them; without a trainer, to know their names alone."""
    return [
        *_of_tensors(),
        *_of_updates(),
        *_of_quantisers(),
        *_of_settings(trainer),
        *_of_tokens(),
        *_of_rows(),
    ]


def _holding(variant: Callable[[Pair, float], Variant]) -> Scores:
    def scores(pair: Pair, sample: Samples, _: np.ndarray, size: float) -> np.ndarray:
        with pair.trainer.holding(variant(pair, size)):
            return sample.scored(pair.trainer)

    return scores


def _named(family: str, **fields: object) -> Callable[[Direction], bool]:
    def right(way: Direction) -> bool:
        return way.family == family and all(getattr(way, name) == value for name, value in fields.items())

    return right


def _of_tensors() -> list[Planted]:
    layer = "model.layers.{}.{}.weight"
    places = [
        *(
            layer.format(n, f"mlp.{which}_proj")
            for n, which in ((0, "down"), (2, "down"), (1, "up"), (3, "gate"))
        ),
        *(
            layer.format(n, f"self_attn.{which}_proj")
            for n, which in ((1, "o"), (2, "v"), (3, "q"), (0, "k"))
        ),
        layer.format(2, "input_layernorm"),
        layer.format(1, "post_attention_layernorm"),
        "model.norm.weight",
        "model.embed_tokens.weight",
    ]
    found = [
        Planted(
            f"{name.removeprefix('model.').removesuffix('.weight')} scaled by",
            (0.02, 0.05, 0.1),
            _holding(lambda _, size, name=name: Scaled((name,), 1.0 + size)),
            _named(SCALED, tensors=(name,), only=""),
        )
        for name in places
    ]
    mlp = tuple(layer.format(1, f"mlp.{which}_proj") for which in ("gate", "up"))
    fused = _holding(lambda _, size: Scaled(mlp, 1.0 + size))
    found.append(
        Planted(
            "gate_up of layer 1 scaled by",
            (0.02, 0.05, 0.1),
            fused,
            _named(SCALED, place="layers.1.mlp.gate_up"),
        )
    )
    return found


def _of_updates() -> list[Planted]:
    def old(which: str) -> Scores:
        def variant(pair: Pair, size: float) -> Variant:
            names = [name for name in pair.trainer.parameter_names() if which in name and ".layers." in name]
            now = pair.trainer.snapshot().values
            back = {n: now[n] + size * older(n, now[n]).to(now[n]) for n in names}  # type: ignore[union-attr]
            return Earlier(Snapshot(back), tuple(names))

        return _holding(variant)

    one = "model.layers.2.mlp.up_proj.weight"
    return [
        Planted(
            "layer 1 old, updates", (0.5, 1.0, 2.0), old(".layers.1."), _named(LEFT_OLD, place="layer 1")
        ),
        Planted(
            "layer 3 old, updates", (0.5, 1.0, 2.0), old(".layers.3."), _named(LEFT_OLD, place="layer 3")
        ),
        Planted(
            "up_proj of layer 2 old, updates", (1.0, 2.0, 4.0), old(one), _named(LEFT_OLD, tensors=(one,))
        ),
    ]


def _of_quantisers() -> list[Planted]:
    def rounded(form: str) -> Scores:
        def variant(pair: Pair, size: float) -> Variant:
            names = [
                n for n in pair.trainer.parameter_names() if ".layers." in n and n.endswith("proj.weight")
            ]
            return Along(form, tuple(names), size)

        return _holding(variant)

    # A share of a rounding: 1 is the quantiser itself.
    return [
        Planted(
            f"every layer {form}, share", (0.02, 0.1, 1.0), rounded(form), _named(form, place="every layer")
        )
        for form in ("fp8_e4m3", "fp8_e4m3_tensor", "int8", "int4")
    ]


def _of_settings(trainer: Trainer | None) -> list[Planted]:
    base, epsilon = (trainer.rotary_base, trainer.norm_epsilon) if trainer else (1.0, 1.0)
    window = LONGEST_SEQUENCE // 2
    return [
        Planted(
            "rotary base off by",
            (0.001, 0.01, 0.1),
            _holding(lambda _, size: RotaryBase(base * (1.0 + size))),
            lambda way: way.family in (ways.ROTARY_BASE, ways.POSITIONS),
        ),
        Planted(
            "positions divided by 1 +",
            (0.0003, 0.001, 0.01),
            _holding(lambda _, size: PositionsDivided(1.0 + size)),
            lambda way: way.family in (ways.ROTARY_BASE, ways.POSITIONS),
        ),
        Planted(
            "norm epsilon times",
            (1e2, 1e3, 1e4),
            _holding(lambda _, size: NormEpsilon(epsilon * size)),
            _named(ways.EPSILON),
        ),
        Planted(
            "attention scores times 1 +",
            (0.01, 0.03, 0.1),
            _holding(lambda _, size: AttentionScaled(1.0 + size)),
            lambda way: way.family == SCALED and way.place.startswith(ATTENTION),
        ),
        Planted(
            "logits capped at",
            (60.0, 30.0, 15.0),
            _holding(lambda _, size: LogitsCapped(size)),
            _named(ways.CAP),
        ),
        Planted(
            "a window of",
            (window * 1.0, window * 0.75, window * 0.5),
            _holding(lambda _, size: SlidingWindow(int(size))),
            lambda way: "window" in way.family,
        ),
    ]


LONGEST_SEQUENCE = 64


def _of_tokens() -> list[Planted]:
    def added(slopes: Callable[[Samples], np.ndarray]) -> Scores:
        return lambda _, sample, clean, size: (clean - size * slopes(sample)).astype(np.float32)

    def tempered(pair: Pair, sample: Samples, clean: np.ndarray, size: float) -> np.ndarray:
        return np.concatenate(pair.trainer.score(sample.groups, sample.temperature * (1.0 + size)))

    def in_part(scores: Scores, where: Callable[[Samples], np.ndarray]) -> Scores:
        return lambda pair, sample, clean, size: np.where(
            where(sample), scores(pair, sample, clean, size), clean
        )

    def penalised(setting: str) -> Scores:
        def scores(pair: Pair, sample: Samples, _: np.ndarray, size: float) -> np.ndarray:
            off = 1.0 if setting == "repetition_penalty" else 0.0
            values: dict[str, Any] = {setting: off + size}
            as_if = LogprobSemantics(distribution="sampler", temperature=1.0, truncated=False, penalised=True)
            (found,) = scored_under(
                pair.trainer, sample.groups, with_settings(sample.sampling, **values), [as_if]
            )
            return found

        return scores

    kinds = {"repetition_penalty": ways.REPETITION, "presence_penalty": ways.PRESENCE}
    kinds["frequency_penalty"] = ways.FREQUENCY
    return [
        Planted("temperature off by", (0.005, 0.01, 0.02), tempered, _tempered),
        Planted(
            "temperature of first tokens off by",
            (0.05, 0.1, 0.2),
            in_part(tempered, lambda sample: sample.positions == 0),
            _named(ways.TEMPERATURE, only=FIRST_TOKENS),
        ),
        Planted(
            "a constant of",
            (0.002, 0.005, 0.01),
            added(lambda s: np.ones(s.owners.size)),
            _named(ways.CONSTANT, only=""),
        ),
        Planted("first tokens off by", (0.01, 0.03, 0.1), added(lambda s: s.positions == 0), _first),
        Planted(
            "rows of long prompts off by",
            (0.005, 0.01, 0.02),
            added(lambda s: _long(s)[s.owners]),
            lambda way: way.family == ways.LONG or (way.family == ways.CONSTANT and way.only == LONG_PROMPTS),
        ),
        Planted(
            "drift to",
            (0.005, 0.01, 0.02),
            added(lambda s: s.positions / s.positions.max() - 0.5),
            _named(ways.DRIFT),
        ),
        *(
            Planted(f"{family} off by", (0.01, 0.03, 0.1), penalised(setting), _named(family))
            for setting, family in kinds.items()
        ),
    ]


def _of_rows() -> list[Planted]:
    def cut(pair: Pair, sample: Samples, clean: np.ndarray, size: float) -> np.ndarray:
        """Every so-manieth row without its prompt's first token."""
        every = round(1.0 / size)
        rows = np.arange(len(sample)) % every == 0
        fewer = sample.take(np.flatnonzero(rows))
        shorter = replace(fewer, samples=[replace(one, prompt_ids=one.prompt_ids[1:]) for one in fewer])
        scores = clean.copy()
        scores[rows[sample.owners]] = shorter.scored(pair.trainer)
        return scores

    return [Planted("rows without their first token", (1 / 16, 1 / 8, 1 / 4), cut, _named(ways.CUT))]


def _long(sample: Samples) -> np.ndarray:
    lengths = np.array([len(ids) for ids in sample.prompts])
    return (lengths > np.median(lengths)).astype(np.float64)


def _tempered(way: Direction) -> bool:
    """A temperature is what scales the head, or the last norm, too."""
    ends = ((HEAD,), ("model.norm.weight",))
    return way.only == "" and (
        way.family == ways.TEMPERATURE or (way.family == SCALED and way.tensors in ends)
    )


def _first(way: Direction) -> bool:
    return way.family == ways.FIRST or (way.family == ways.CONSTANT and way.only == FIRST_TOKENS)
