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


ANSWERED = ({"role": "user", "content": "."}, {"role": "assistant", "content": "."})
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
        template = self.tokenizer.chat_template
        if template is None:
            raise ModelError(
                "chat template",
                got="a tokenizer without one",
                expected="chat_template.jinja beside the tokenizer",
                hint="use an instruction-tuned checkpoint, or add its template",
            )
        if not self.tools:
            return self._ids(messages)
        if "tools" in str(template):
            return self._ids(messages, tools=self.tools)
        return self._ids(_with_tools(messages, self.tools))

    def answer(self, messages: Sequence[dict[str, str]], text: str) -> np.ndarray:
        """Token ids int32 [N] of an answer that nobody sampled, its stop token included.

        Raises:
            ModelError: as :meth:`prompt`.
            RetokenisedError: for a template that writes the conversation otherwise once it is answered.
        """
        prompt = self.prompt(messages)
        whole = self._ids([*messages, {"role": "assistant", "content": text}], add_generation_prompt=False)
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

        They are found beside another conversation, so that no answer is ever written anew.

        Args:
            messages: what is said there, such as a tool's result.

        Raises:
            ModelError: as :meth:`prompt`.
            RetokenisedError: for a template that writes an answer otherwise once something follows it.
        """
        shut = self._ids(ANSWERED, add_generation_prompt=False)
        whole = self._ids([*ANSWERED, *messages])
        # The model draws the stop token itself; what the template puts behind it is no part of the answer.
        stops = np.flatnonzero(np.isin(shut, self.stop_token_ids))
        opened = self._ids(ANSWERED[:1])
        end = int(stops[-1]) + 1 if stops.size and stops[-1] >= len(opened) else len(shut)
        if not np.array_equal(whole[:end], shut[:end]):
            raise RetokenisedError(
                f"chat template of {self.path}",
                got=f"{self.tokenizer.decode(whole[:end])!r} before {messages[0]['role']}'s message",
                expected=f"{self.tokenizer.decode(shut[:end])!r}, as it was when the model answered",
                hint="use a template that leaves earlier turns as they were",
            )
        return whole[end:]

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


def _with_tools(messages: Sequence[dict[str, str]], tools: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The conversation with its tools in the system prompt, a line each."""
    lines = []
    for tool in tools:
        function = tool["function"]
        named = function["parameters"].get("properties", {})
        arguments = ", ".join(f"{name}: {schema.get('type', 'any')}" for name, schema in named.items())
        lines.append(f"{function['name']}({arguments}): {' '.join(function['description'].split())}")
    told = "\n".join(["Tools that you can call:", *lines])
    first, rest = messages[0], messages[1:]
    if first["role"] == "system":
        return [{"role": "system", "content": f"{first['content']}\n{told}"}, *rest]
    return [{"role": "system", "content": told}, *messages]
