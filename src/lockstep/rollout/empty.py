"""A completion without a token, of which nothing can be learned."""

from lockstep.errors import EngineError
from lockstep.records.tokens import Completion


def refuse_empty(completion: Completion, of: str = "") -> None:
    """Raises EngineError for a completion without a token.

    Args:
        of: which it is, in the user's words, where its own numbers do not say.
    """
    if not completion.token_ids:
        which = of or f"sample {completion.sample_index} of prompt {completion.prompt_index}"
        raise EngineError(
            f"engine, {which}",
            got=f"no token ({completion.finish_reason})",
            expected="at least one, to train on",
            hint="is the prompt longer than engine.max_model_len?",
        )
