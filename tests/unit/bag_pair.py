"""A pair without a model, by a few small tables.

What comes next depends on the last token and on the mean of all before it.

Both sides hold the tables themselves, so that the ladder's own code runs on it in milliseconds, and a test
says what is wrong on the engine's side by changing one of :class:`BagEngine`'s hooks.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from lockstep.config.recipe import parse_recipe
from lockstep.engines.base import Engine
from lockstep.parity.pair import Pair
from lockstep.policy.model import Policy
from lockstep.policy.parameters import assign, parameters_of
from lockstep.records.capabilities import CAPABILITIES, Capability
from lockstep.records.messages import Ready
from lockstep.records.tokens import Completion, pack_ids, pack_logprobs
from lockstep.records.versions import LoadReceipt, VersionSpan, WeightUpdate
from lockstep.training.trainer import Trainer

VOCABULARY, WIDTH = 48, 8
BOS, EOS = 1, 2


class Layer(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mix.weight.data = torch.randn(WIDTH, WIDTH, generator=generator) * 0.5


class Bag(nn.Module):
    """Two layers, each of which adds the mean of what lies before; a head of its own."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.layers = nn.ModuleList([Layer(generator) for _ in range(2)])
        self.head = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.config = SimpleNamespace(to_dict=dict)
        self.dtype = torch.float32

    def hidden(self, ids, seen):
        h = self.embed[ids]
        mean = seen.float() / seen.sum(-1, keepdim=True)  # [L, L]
        for layer in self.layers:
            h = torch.tanh(h + layer.mix(mean @ h))
        return h

    @torch.no_grad()
    def logits(self, ids):
        """float32 [L, V] of a whole sequence."""
        ids = torch.as_tensor(np.asarray(ids, np.int64))
        return self.hidden(ids, torch.ones(len(ids), len(ids), dtype=torch.bool).tril()) @ self.head.T


class Decoding:
    """One sequence token by token, over running sums in the place of a cache."""

    def __init__(self, model):
        self.embed, self.head = (tensor.detach().numpy() for tensor in (model.embed, model.head))
        self.mixes = [layer.mix.weight.detach().numpy() for layer in model.layers]
        self.n = 0
        self.sums = np.zeros((len(self.mixes), WIDTH))

    def logits_after(self, token):
        """float64 [V]."""
        self.n += 1
        h = self.embed[token]
        for mix, total in zip(self.mixes, self.sums, strict=True):
            total += h
            h = np.tanh(h + mix @ (total / self.n))
        return self.head @ h


@dataclass(eq=False)
class BagPolicy(Policy):
    """The project's own policy, with packed rows and shared prompts, over a :class:`Bag`."""

    def hidden(self, row):
        parts = []
        for block in row.blocks:
            n = block.stop - block.start
            seen = torch.ones(n, n, dtype=torch.bool).tril() if block.mask is None else block.mask
            parts.append(self.model.hidden(row.token_ids[block.start : block.stop], seen))
        return torch.cat(parts)[row.predictors]


class Shelf:
    """Published weights, by version."""

    directory = Path()

    def __init__(self, model, versions):
        self.model = model
        self.versions = versions

    def publish(self, version):
        self.versions[version] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return WeightUpdate(version=version)

    def settle(self):
        pass


def as_it_is(value, *_):
    return value


class BagEngine(Engine):
    """Hooks, each of which is given the right thing and returns what the engine makes of it."""

    def __init__(self, model, shelf, distribution="sampler", without=()):
        self.model = copy.deepcopy(model)
        self.shelf = shelf
        self.version = 0
        known = {name: Capability(name not in without, "as the test says") for name in CAPABILITIES}
        self.ready = Ready(
            "bag", "1", "v1", distribution, {"worker.parameter_dtype": "torch.float32"}, known, 0.0
        )
        self.asked = {}
        self.vocabulary = VOCABULARY
        self.params = as_it_is
        self.prompt = as_it_is
        self.numbers = as_it_is  # numbers float32 [T], prompt, ids
        self.scores = as_it_is  # scores float32 [L − 1], number of sequences scored together
        self.weights = as_it_is  # parameters by name, those it has

    def _sample(self, prompts, params):
        made = []
        for row, (prompt, asked) in enumerate(zip(prompts, params, strict=True)):
            made += [self._drawn(row, sample, prompt, asked) for sample in range(asked.n)]
        return made

    def _drawn(self, row, sample, prompt, asked):
        given = self.prompt(prompt)
        used = self.params(asked)
        rng = np.random.default_rng([asked.seed or 0, sample])
        ids = []
        numbers = []
        reason = "length"
        decoding = Decoding(self.model)
        for token in given:
            z = decoding.logits_after(token)
        while len(ids) < asked.max_tokens and reason == "length":
            z = z / (used.temperature or 1.0)
            if used.top_k:
                z = np.where(z < np.sort(z)[-used.top_k], -np.inf, z)
            logprobs = z - np.log(np.exp(z).sum())
            ids.append(int(np.searchsorted(np.exp(logprobs).cumsum(), rng.random())))
            numbers.append(logprobs[ids[-1]])
            reason = "stop" if ids[-1] in asked.stop_token_ids else "length"
            z = decoding.logits_after(ids[-1])
        said = self.numbers(np.array(numbers, np.float32), prompt, np.array(ids))
        spans = (VersionSpan(0, len(ids), self.version),)
        return Completion(
            row, sample, pack_ids(ids), pack_logprobs(said.tolist()), reason, spans, prompt_tokens=len(given)
        )

    def _score(self, sequences, temperature):
        return [self.scores(self._of(ids, temperature), len(sequences)) for ids in sequences]

    def _of(self, ids, temperature):
        z = (self.model.logits(ids[:-1]) / temperature).log_softmax(-1)
        return z.gather(1, torch.as_tensor(ids[1:].astype(np.int64))[:, None])[:, 0].numpy()

    def load(self, update, mode="wait"):
        places = parameters_of(self.model)
        sent = dict(self.shelf[update.version])
        assign(places, self.weights(sent, {name: p.detach().clone() for name, p in places.items()}))
        self.version = update.version
        return LoadReceipt(update.version, len(sent), 0.0, (), True)

    def abort(self):
        return 0

    def close(self):
        pass


class Tokenizer:
    """One token for each character."""

    bos_token_id = BOS
    eos_token_id = EOS
    all_special_ids: ClassVar = [0, BOS, EOS]

    def __len__(self):
        return VOCABULARY

    def encode(self, text, add_special_tokens=False):
        return [3 + ord(c) % 40 for c in text]

    def decode(self, ids):
        return "".join(chr(48 + int(i)) for i in ids)

    def batch_decode(self, rows):
        return [self.decode(ids) for ids in rows]


class Renderer:
    tokenizer = Tokenizer()
    stop_token_ids = (EOS,)

    def prompt(self, messages):
        return np.array([BOS, *self.tokenizer.encode(messages[-1]["content"])], np.int32)

    def text(self, token_ids):
        return self.tokenizer.decode(token_ids)


TASK = SimpleNamespace(
    item=lambda number: {"question": f"{number} + {number * 7 % 10}", "answer": "0"},
    messages=lambda item: [{"role": "user", "content": item["question"]}],
)


def recipe_of(**sections):
    base = {
        "model": {"path": "bag"},
        "engine": {"name": "transformers", "max_model_len": 64},
        "task": {"name": "a:b"},
        "sampling": {"max_tokens": 12},
        "training": {"steps": 1},
        "parity": {"probe_prompts": 8, "probe_tokens": 12, "draw_tokens": 0},
    }
    return parse_recipe(
        {name: base.get(name, {}) | sections.get(name, {}) for name in base.keys() | sections.keys()}, "tests"
    )


def bag_pair(without=(), distribution="sampler", **sections):
    """A clean pair."""
    recipe = recipe_of(**sections)
    model = Bag()
    versions = {}
    policy = BagPolicy(model, model.head, None, torch.float32, None, True, "packed", "here")
    trainer = Trainer(policy, recipe, lambda its: Shelf(its, versions))
    return Pair(BagEngine(model, versions, distribution, without), trainer, Renderer(), TASK, recipe)
