"""From messages to token ids, once. Engines take token ids only, so no server re-tokenises a prompt."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.errors import ModelError, RetokenisedError


@contextlib.contextmanager
def _told(what: str, path: Path, hint: str) -> Iterator[None]:
    """Whatever a checkpoint's own files bring about becomes one error that names them."""
    try:
        yield
    except Exception as error:
        got = f"{type(error).__name__}: {str(error)[:300]}"
        raise ModelError(f"{what} of {path}", got=got, expected="one that works", hint=hint) from error


ASKED = {"role": "user", "content": "."}
ANSWER = "7531"
ANSWERED = (ASKED, {"role": "assistant", "content": ANSWER})
"""A conversation that stands in the place of any other, to see what a template puts behind an answer."""


class Renderer:
    """A tokenizer and its chat template.

    Args:
        path: the checkpoint's directory.
        tools: JSON schemas of those that the model may call: told by the template where it has a place for
            them, else in the system prompt.
    """

    def __init__(self, path: Path, tools: Sequence[dict[str, Any]] = ()) -> None:
        self.path = path
        self.tools = list(tools)
        from transformers import AutoTokenizer, GenerationConfig

        with _told("tokenizer", path, f"ls {path}; is its download whole?"):
            tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.tokenizer = tokenizer
            stops = {tokenizer.eos_token_id}
            if (path / "generation_config.json").is_file():
                eos = GenerationConfig.from_pretrained(path).eos_token_id
                stops |= set(eos) if isinstance(eos, list) else {eos}
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(stop for stop in stops if stop is not None))
        """What ends an answer: the tokenizer's end of sequence and the checkpoint's generation config's."""
        if not self.stop_token_ids:
            raise ModelError(
                f"tokenizer {path}",
                got="no end-of-sequence token",
                expected="one",
                hint="set eos_token in tokenizer_config.json",
            )

    def prompt(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """Token ids int32 [P] of a conversation that the model is to continue.

        Raises:
            ModelError: for a tokenizer without a chat template, or one that refuses the conversation.
        """
        if self.tokenizer.chat_template is None:
            raise ModelError(
                "chat template",
                got="a tokenizer without one",
                expected="chat_template.jinja beside the tokenizer",
                hint="use an instruction-tuned checkpoint, or add its template",
            )
        return self._with_tools(messages)

    def _with_tools(self, messages: Sequence[dict[str, str]], **options: Any) -> np.ndarray:
        if not self.tools:
            return self._ids(messages, **options)
        # A template that has no place for them would leave them out, and say nothing.
        if "tools" in str(self.tokenizer.chat_template):
            return self._ids(messages, tools=self.tools, **options)
        return self._ids(_told_of(messages, self.tools), **options)

    def answer(self, messages: Sequence[dict[str, str]], text: str) -> np.ndarray:
        """Token ids int32 [N] of an answer that nobody sampled, its stop token included.

        Raises:
            ModelError: as :meth:`prompt`.
            RetokenisedError: for a template that writes the conversation otherwise once it is answered.
        """
        prompt = self.prompt(messages)
        answered = [*messages, {"role": "assistant", "content": text}]
        whole = self._with_tools(answered, add_generation_prompt=False)
        if not np.array_equal(whole[: len(prompt)], prompt):
            raise RetokenisedError(
                f"chat template of {self.path}",
                got=f"{self.tokenizer.decode(whole[: len(prompt)])[-80:]!r} before an answer",
                expected=f"{self.tokenizer.decode(prompt)[-80:]!r}, as it is when the model is to answer",
                hint="use a template that begins an answer as add_generation_prompt does",
            )
        rest = whole[len(prompt) :]
        stops = np.flatnonzero(np.isin(rest, self.stop_token_ids))
        # Of a template without an end of turn the answer ends as generation does.
        return rest[: stops[-1] + 1] if stops.size else np.r_[rest, self.stop_token_ids[:1]].astype(np.int32)

    def between(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """Token ids int32 [N] that stand between an answer, its stop token included, and the next one.

        They are found beside another conversation: no answer is ever written anew, whatever a template makes
        of earlier ones (some leave out their reasoning).

        Args:
            messages: what is said there, such as a tool's result.

        Raises:
            ModelError: as :meth:`prompt`.
            RetokenisedError: for a template that drops or moves an answer once something follows it.
        """
        asked = self._ids([ASKED], add_generation_prompt=False)
        shut = self._ids(ANSWERED, add_generation_prompt=False)
        whole = self._ids([*ANSWERED, *messages])
        end = self._end_of_answer(asked, shut, whole)
        there = self.tokenizer.decode(whole[len(asked) : end])
        if not np.array_equal(whole[: len(asked)], asked) or ANSWER not in there.replace(" ", ""):
            raise RetokenisedError(
                f"chat template of {self.path}",
                got=f"{self.tokenizer.decode(whole[:end])!r} before {messages[0]['role']}'s message",
                expected=f"{self.tokenizer.decode(shut)!r}: the answer, where it was when the model gave it",
                hint="use a template that leaves the turns before where they are",
            )
        return whole[end:]

    def _end_of_answer(self, asked: np.ndarray, shut: np.ndarray, whole: np.ndarray) -> int:
        """Where the answer ends in a conversation that goes on behind it.

        The model draws its stop token itself; what the template puts behind that is no part of the answer. A
        template without one ends where it ended when nothing followed.
        """
        before, in_all = (int(np.isin(ids, self.stop_token_ids).sum()) for ids in (asked, shut))
        stops = np.flatnonzero(np.isin(whole, self.stop_token_ids))
        return int(stops[before]) + 1 if in_all > before and before < stops.size else len(shut)

    def _ids(self, messages: Sequence[dict[str, str]], **options: Any) -> np.ndarray:
        what = f"chat template, on messages of {', '.join(message['role'] for message in messages)},"
        hint = "some take no system message (task.system_prompt); text is Unicode without lone surrogates"
        options = {"add_generation_prompt": True} | options
        with _told(what, self.path, hint):
            encoded: Any = self.tokenizer.apply_chat_template(list(messages), return_dict=True, **options)
        return np.asarray(encoded["input_ids"], dtype=np.int32)

    def text(self, token_ids: np.ndarray) -> str:
        """What a completion says, special tokens left out."""
        return self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)


def _told_of(messages: Sequence[dict[str, str]], tools: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The conversation with its tools in the system prompt, a line each."""
    lines = []
    for tool in tools:
        function = tool["function"]
        named = function["parameters"].get("properties", {})
        arguments = ", ".join(f"{name}: {schema.get('type', 'any')}" for name, schema in named.items())
        lines.append(f"{function['name']}({arguments}): {' '.join(function['description'].split())}")
    told = "\n".join(["Tools that you can call:", *lines])
    first = messages[0]
    rest = messages[1:]
    if first["role"] == "system":
        return [{"role": "system", "content": f"{first['content']}\n{told}"}, *rest]
    return [{"role": "system", "content": told}, *messages]
