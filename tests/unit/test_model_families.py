"""Any Hugging Face causal LM.

Packed where its attention allows it, sequence by sequence where not, and right in both cases.
"""

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lockstep.policy.model import load_policy
from lockstep.records.samples import Group

COMMON = {
    "vocab_size": 89,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}
ATOL = 5e-5  # fp32 over 2 layers, another order of summation

FAMILIES = {
    "llama-untied": (LlamaConfig(**COMMON, tie_word_embeddings=False), True),
    "qwen2": (Qwen2Config(**COMMON, tie_word_embeddings=True), True),
    "qwen3": (Qwen3Config(**COMMON), True),
    # Shorter than the blocks that share a prompt.
    "mistral-window": (MistralConfig(**COMMON, sliding_window=6), True),
    "gemma2-softcaps": (Gemma2Config(**COMMON, query_pre_attn_scalar=8), False),
    "gpt2": (
        GPT2Config(vocab_size=89, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
        True,
    ),
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_are_those_of_the_model_itself(family, tmp_path):
    config, packed = FAMILIES[family]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = load_policy(tmp_path, "float32", "float32")
    assert policy.share_prompts is packed, policy.reason
    rng = np.random.default_rng(0)
    groups = [
        Group(
            rng.integers(0, 89, 7 + g).astype(np.int32),
            [rng.integers(0, 89, 4 + c).astype(np.int32) for c in range(3)],
        )
        for g in range(2)
    ]
    found = policy.score(groups, 0.9)
    own = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    n = 0
    for group in groups:
        for completion in group.completions:
            ids = torch.from_numpy(np.r_[group.prompt, completion].astype(np.int64))[None]
            with torch.no_grad():
                logits = own(input_ids=ids[:, :-1]).logits[0] / 0.9
            expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[len(group.prompt) - 1 :, 0]
            torch.testing.assert_close(torch.from_numpy(found[n]), expected, rtol=0, atol=ATOL)
            n += 1
