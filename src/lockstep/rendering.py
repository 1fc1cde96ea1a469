"""From messages to token ids, once. Engines take token ids only, so no server re-tokenises a prompt."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.errors import ModelError


@contextlib.contextmanager
def _told(what: str, path: Path, hint: str) -> Iterator[None]:
    """Whatever a checkpoint's own files bring about becomes one error that names them."""
    try:
        yield
    except Exception as error:
        got = f"{type(error).__name__}: {str(error)[:300]}"
        raise ModelError(f"{what} of {path}", got=got, expected="one that works", hint=hint) from error


class Renderer:
    """A tokenizer and its chat template.

    Args:
        path: the checkpoint's directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
        what = f"chat template, on messages of {', '.join(message['role'] for message in messages)},"
        hint = "some take no system message (task.system_prompt); text is Unicode without lone surrogates"
        with _told(what, self.path, hint):
            encoded: Any = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_dict=True
            )
        return np.asarray(encoded["input_ids"], dtype=np.int32)

    def text(self, token_ids: np.ndarray) -> str:
        """What a completion says, special tokens left out."""
        return self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)
