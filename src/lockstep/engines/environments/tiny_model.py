"""Writes a two-layer Llama with random weights.

Run as a file by an engine's interpreter: ``… DIRECTORY [untied] [still]``.

``still``: the layers add nothing, so that only the last product is left to round.

Its config.json has the keys of transformers 4 and 5 both, for every engine version reads it.
"""

import json
import sys
from pathlib import Path

WIDTH, HEADS, KV_HEADS, HEAD, INNER, LAYERS, VOCABULARY = 128, 2, 1, 64, 256, 2, 512

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
    "torch_dtype": "float32",
}


def shapes(tied):
    """Checkpoint name → shape of every tensor."""
    of_each = {} if tied else {"lm_head.weight": (VOCABULARY, WIDTH)}
    of_each |= {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        of_each |= {
            prefix + "input_layernorm.weight": (WIDTH,),
            prefix + "post_attention_layernorm.weight": (WIDTH,),
            prefix + "self_attn.q_proj.weight": (HEADS * HEAD, WIDTH),
            prefix + "self_attn.k_proj.weight": (KV_HEADS * HEAD, WIDTH),
            prefix + "self_attn.v_proj.weight": (KV_HEADS * HEAD, WIDTH),
            prefix + "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD),
            prefix + "mlp.gate_proj.weight": (INNER, WIDTH),
            prefix + "mlp.up_proj.weight": (INNER, WIDTH),
            prefix + "mlp.down_proj.weight": (WIDTH, INNER),
        }
    return of_each


def main():
    """Write config.json and model.safetensors."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    out = Path(sys.argv[1])
    tied = "untied" not in sys.argv[2:]
    out.mkdir(parents=True)
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.1
        for name, shape in shapes(tied).items()
    }
    if "still" in sys.argv[2:]:
        tensors = {
            name: t * 0.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else t
            for name, t in tensors.items()
        }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))


if __name__ == "__main__":
    main()
