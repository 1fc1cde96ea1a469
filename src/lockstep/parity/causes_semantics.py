"""The causes of layer 1, semantics: what each means, how it is found, how to mend it. For ``causes.py``."""

SEMANTICS: dict[str, tuple[str, str, str]] = {
    "missing_logprobs": (
        (
            "Tokens came without a finite log-probability: absent, NaN, infinite, "
            "or the −9999 of a server that clamps."
        ),
        "They are counted. Nothing is filled in.",
        (
            "Ask the engine for log-probabilities of the drawn token; "
            "find what makes the model's logits non-finite."
        ),
    ),
    "shifted_logprobs": (
        "The log-probabilities are right, and stand beside the token before or after their own.",
        "The engine's own re-score agrees with them one place further, and not in place.",
        (
            "Align them where they are read: "
            "the first generated token's is predicted by the last token of the prompt."
        ),
    ),
    "logprobs_transformed": (
        (
            "The numbers are a function of the right ones: another base, probabilities, running sums, "
            "a floor, coarse rounding."
        ),
        (
            "The function is applied to the engine's own re-score, and then the two agree; "
            "its factor, floor or grid is fitted."
        ),
        "Read the log-probability of each token itself, in nats and in float32, and do nothing to it.",
    ),
    "logits_reported": (
        (
            "The engine reports logits in the place of log-probabilities: "
            "they are not normalised, and some are positive."
        ),
        (
            "Some numbers are above 0, which no log-probability is, "
            "and the trainer's logits of the same tokens explain them."
        ),
        "Have the engine report processed log-probabilities.",
    ),
    "rows_swapped": (
        (
            "Completions, or their log-probabilities, are returned to another request "
            "than the one they were drawn for."
        ),
        (
            "They agree with the scores of another row, and not with those of their own. "
            "No two probes are alike."
        ),
        "Match replies by request id and not by position.",
    ),
    "tokens_edited": (
        (
            "The token ids returned are not those that were drawn: "
            "re-tokenised, stripped or merged on the way."
        ),
        ("From one place on in most completions the engine's re-score no longer agrees; before it, it does."),
        "Carry token ids end to end (vLLM: return_token_ids); never re-tokenise text.",
    ),
    "tokens_not_sampled": (
        (
            "Tokens that the model did not sample, a tool's output or padding, "
            "stand in the completions as if it had."
        ),
        (
            "Runs of one exact number, 0.0 most often, beside tokens that the trainer finds improbable; "
            "the other tokens agree."
        ),
        "Log a mask (response_mask) and leave those tokens out of the loss; they stay in the context.",
    ),
    "placeholder_numbers": (
        (
            "Single tokens carry a placeholder, 0.0 most often, and not their log-probability: "
            "the last, the first, some."
        ),
        ("What is off carries one exact number; the evidence says where it stands. The other tokens agree."),
        (
            "Log the number that the engine gave the token; "
            "of a token that it did not draw (an appended stop), a mask of 0."
        ),
    ),
    "mask_contradicted": (
        (
            "A mask says the reverse of the numbers: what carries none is marked as sampled, "
            "and what was sampled is left out."
        ),
        "Its 1s stand beside numbers that are exactly 0.0 or missing, its 0s beside those that are not.",
        "1 is for tokens that the model sampled: turn the mask round before the loss takes it.",
    ),
    "vocabulary_shifted": (
        (
            "The ids are those of another vocabulary: "
            "from one id on all are moved by a token that was added or left out."
        ),
        (
            "The trainer agrees once ids from there on are read as so many less or more; "
            "both numbers are fitted."
        ),
        ("Give the engine, the trainer and what logs one tokenizer; compare its added tokens and its size."),
    ),
    "foreign_logprobs": (
        "In some completions the tokens are the model's own draws, and the numbers are of other tokens.",
        (
            "The rows' numbers do not go with the scores of their tokens, "
            "which are as likely as draws are; other rows agree."
        ),
        (
            "Join numbers to tokens by request id and choice, not by position, "
            "wherever they pass a proxy, a retry or a log."
        ),
    ),
    "stop_token_dropped": (
        "A completion that ended at a stop token comes without it: ending is then never trained.",
        "Completions with finish reason stop do not end in one of the stop tokens asked for.",
        (
            "Keep the stop token (vLLM: include_stop_str_in_output or token ids); "
            "compare lengths with the engine's count."
        ),
    ),
    "bos_doubled": (
        (
            "The prompt begins with two BOS tokens: "
            "the template adds one and the tokenizer or the server another."
        ),
        (
            "The rendered prompts are looked at; "
            "and the trainer agrees with the engine once a BOS is put before its prompts."
        ),
        "Tokenise the rendered template with add_special_tokens=False; send token ids.",
    ),
    "prompt_edited": (
        "The engine scores after another prompt than the one that was sent.",
        (
            "The trainer agrees with the engine once its own prompts are edited alike; "
            "the evidence names the edit."
        ),
        (
            "Send token ids, and switch off what edits prompts "
            "(truncation, templates, system prompts of the server)."
        ),
    ),
    "raw_logprobs": (
        (
            "The engine reports log-probabilities of the raw logits (T = 1) for tokens that it drew "
            "at another temperature."
        ),
        "Raw explains its numbers and tempered does not, on tokens where the two differ.",
        "Have the engine report processed log-probabilities.",
    ),
    "temperature_altered": (
        "The engine used another temperature than it was asked for: clamped, or overridden by a default.",
        "The temperature is fitted; the one found explains the numbers, the one asked for does not.",
        "Look for a clamp, or a default that wins over the request (generation_config.json).",
    ),
    "truncation_unmodelled": (
        (
            "Tokens are drawn with top-k, top-p or min-p, the trainer scores the whole distribution: "
            "biased by log(kept mass)."
        ),
        "The recipe truncates; the kept mass is computed from the trainer's own logits.",
        "Sample without top-k, top-p and min-p.",
    ),
    "hidden_truncation": (
        "The engine truncates although it was not asked to.",
        (
            "Its numbers are higher than the whole distribution allows, "
            "by a mass that one top-k, top-p or min-p explains."
        ),
        "Find the server's own sampling defaults (vLLM: --generation-config vllm).",
    ),
    "penalties_unmodelled": (
        "Tokens are drawn under penalties or a logit bias that the trainer does not apply.",
        "The recipe asks for them.",
        "sampling.repetition_penalty = 1.0, no presence or frequency penalty, no logit_bias.",
    ),
    "hidden_penalties": (
        "The engine penalises repetition although it was not asked to.",
        "Repetition, presence and frequency penalties are fitted; the one found explains the numbers.",
        "Find the server's own sampling defaults (vLLM: --generation-config vllm).",
    ),
    "hidden_logit_bias": (
        ("The engine adds a bias to the logits of some tokens, or bans them, although it was not asked to."),
        "Biases of a few tokens are fitted one after the other; they explain the numbers of all tokens.",
        "Find the server's own defaults: logit_bias, bad words, tokens that are suppressed.",
    ),
    "vocabulary_masked": (
        (
            "Tokens are drawn under a mask, a grammar, a pattern or a list of allowed tokens, "
            "although none was asked for."
        ),
        (
            "Every number is above the whole distribution's by the mass "
            "of what the drawn tokens' characters make up."
        ),
        (
            "Find the server's own defaults: guided decoding, structured outputs, allowed tokens. "
            "Rewards need no grammar."
        ),
    ),
    "generation_config_applied": (
        "The checkpoint's generation_config.json edits every request.",
        "The settings in that file explain the engine's numbers, and those asked for do not.",
        'generation_config = "vllm" in the engine (vLLM: --generation-config vllm).',
    ),
    "draws_differ": (
        "The numbers agree, and the tokens are not drawn from the distribution they are of.",
        (
            "Over all tokens, the log-probability of what was drawn is too far "
            "from minus the entropy for chance."
        ),
        (
            "Report the distribution that is sampled from: "
            "no truncation, penalty or temperature behind the numbers."
        ),
    ),
    "unexplained_semantics": (
        (
            "No hypothesis explains the engine's log-probabilities, "
            "although its re-score at T = 1 is the trainer's."
        ),
        "Every candidate is fitted, and the prompts edited in every known way; the best is too far off.",
        (
            "Compare the engine's sampler with the list of candidates "
            "in parity/explain/semantics/hypotheses.py."
        ),
    ),
}
