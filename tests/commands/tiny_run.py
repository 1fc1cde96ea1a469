"""A run without a download: a recipe that trains a random model for one step on the transformers engine.

The model's size can be chosen.
"""

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
RECIPE = """\
model.path = "{model}"
engine = {{ name = "transformers", max_model_len = 128 }}
task.name = "reasoning_gym:basic_arithmetic"
task.options = {{ min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1 }}
sampling = {{ max_tokens = 5 }}
training = {{ steps = 1, prompts_per_step = 2, group_size = 2 }}
parity = {{ probe_prompts = 4, probe_tokens = 8, draw_tokens = 128, draws_see = 1.0 }}
"""


def write_recipe(path, width):
    """A recipe under ``path`` on a Llama of one layer of so wide an MLP, 2.3 MB for each 1000 in fp32."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=192,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        initializer_range=0.1,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path / "model")
    words = ["<s>", "</s>", "<unk>", *"0123456789+-=?.", *(f"w{n}" for n in range(79))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path / "model")
    recipe = path / "recipe.toml"
    recipe.write_text(RECIPE.format(model=path / "model"))
    return recipe
