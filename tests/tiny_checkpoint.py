"""The tiny model of the tests, with and without a tokenizer."""

import json
import shutil
from pathlib import Path

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"


def write_model(path: Path) -> Path:
    """A 2-layer Llama with tied embeddings and 97 tokens, as safetensors; no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"]
    return path


def write_checkpoint(model: Path, path: Path) -> Path:
    """The model at ``model`` with a tokenizer and a chat template beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *"0123456789+-=?.", *(f"w{n}" for n in range(79))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    shutil.copytree(model, path)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path
