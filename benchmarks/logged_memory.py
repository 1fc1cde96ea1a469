"""Memory and time of judging a log of 10 million tokens.

Run as ``python benchmarks/logged_memory.py [--rows N] [--format F]``.

Writes a log in the tiny vocabulary as JSONL and as Parquet, and reads and judges each in a process of its own
with a model of 97 tokens. Its numbers are the model's own at T = 1, so that the check takes the way of a
clean log: hypotheses on the first rows, then every row scored. 512 rows differ and the others repeat them; a
row's scores are computed once and then looked up, for the check's memory is measured here and not the model's
speed. Peak memory is that of the process, torch and transformers included.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lockstep.policy.model import Policy

ROW_TOKENS, PROMPT_TOKENS, DIFFERENT = 200, 20, 512
"""Of each completion and prompt; rows that differ."""
LIMIT_GIB = 2.0


def checkpoint(path: Path) -> Path:
    """The tiny model with a tokenizer of 97 words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        vocab_size=97, tie_word_embeddings=True, initializer_range=0.3, max_position_embeddings=512, **shape
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = {word: n for n, word in enumerate(["<s>", "</s>", "<unk>", *(f"w{n}" for n in range(94))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return path


def drawn(model: Path) -> list[dict]:
    """Rows as the model draws them at T = 1."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = torch.randint(3, 97, (DIFFERENT, PROMPT_TOKENS))
    asked = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": None,
        "pad_token_id": 1,
    }
    with torch.no_grad():
        ids = policy.generate(prompts, min_new_tokens=ROW_TOKENS, max_new_tokens=ROW_TOKENS, **asked)
        logprobs = policy(ids).logits[:, PROMPT_TOKENS - 1 : -1].log_softmax(-1)
    drawn = ids[:, PROMPT_TOKENS:]
    told = logprobs.gather(-1, drawn[..., None])[..., 0]
    return [
        {"prompt_ids": p.tolist(), "completion_ids": c.tolist(), "logprobs": x.tolist()}
        for p, c, x in zip(prompts, drawn, told, strict=True)
    ]


def write(rows: list[dict], n_rows: int, path: Path) -> None:
    """The rows over and over."""
    if path.suffix == ".jsonl":
        lines = [json.dumps(row).encode() + b"\n" for row in rows]
        with path.open("wb") as file:
            file.writelines(lines[at % len(lines)] for at in range(n_rows))
        return
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist(rows)
    with parquet.ParquetWriter(path, table.schema) as writer:
        for at in range(0, n_rows, len(rows)):
            writer.write_table(table.slice(0, min(len(rows), n_rows - at)))


def peak_gib() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def scored_once(policy: "Policy") -> None:
    """Let the policy look up the scores of rows that it has scored before."""
    known: dict[bytes, np.ndarray] = {}
    compute = policy.score

    def score(groups: list, temperature: float, max_tokens: int = 4096) -> list[np.ndarray]:
        keys = [
            b"|".join([group.prompt.tobytes(), *(ids.tobytes() for ids in group.completions)])
            for group in groups
        ]
        new = {key: group for key, group in zip(keys, groups, strict=True) if key not in known}
        if new:
            known.update(zip(new, compute(list(new.values()), temperature, max_tokens), strict=True))
        return [known[key] for key in keys]

    policy.score = score  # pyrefly: ignore


def measure(path: Path, model: Path, most_rows: int | None, results: "multiprocessing.SimpleQueue") -> None:
    """Read and judge, in a process that did nothing else."""
    from lockstep.config.recipe import parse_overrides
    from lockstep.logged.file import read_logged
    from lockstep.logged.judge import judge
    from lockstep.policy.model import load_policy
    from lockstep.rendering import Renderer

    neutral = {
        "model": {"path": ""},
        "task": {"name": "logged"},
        "sampling": {"max_tokens": 1},
        "training": {"steps": 1},
    }
    recipe = parse_overrides(neutral, [f"model.path={model}"], "benchmark")
    policy = load_policy(model, "float32", "float32")
    renderer = Renderer(model)
    scored_once(policy)
    before = peak_gib()
    began = time.perf_counter()
    logged = read_logged(path, recipe.sampling)
    held = sum(part.nbytes for part in vars(logged).values() if isinstance(part, np.ndarray))
    read = peak_gib()
    read_s = time.perf_counter() - began
    began = time.perf_counter()
    verdicts = judge(logged, policy, renderer, recipe, lambda text: None, most_rows)
    judged_s = time.perf_counter() - began
    figures = {
        "before_gib": before,
        "read_gib": read,
        "read_s": read_s,
        "judged_gib": peak_gib(),
        "judged_s": judged_s,
    }
    bytes_a_token = held / len(logged.token_ids)
    summaries = [f"{v.layer} {v.status}: {v.summary}" for v in verdicts if v.status != "NOT_RUN"]
    results.put((figures, bytes_a_token, len(logged.token_ids), summaries))


def main() -> int:
    """Exit code 1 where it takes more than the limit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--rows", type=int, help="measure the gap on so many rows, as check-log --rows does")
    parser.add_argument("--format", choices=("jsonl", "parquet"), action="append", help="only this one")
    asked = parser.parse_args()
    worst = 0.0
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        model = checkpoint(Path(scratch) / "model")
        rows = drawn(model)
        n_rows = -(-asked.tokens // ROW_TOKENS)
        for form in asked.format or ("jsonl", "parquet"):
            path = Path(scratch) / f"rollouts.{form}"
            results = spawn.SimpleQueue()
            write(rows, n_rows, path)
            process = spawn.Process(target=measure, args=(path, model, asked.rows, results))
            process.start()
            figures, bytes_a_token, n, summaries = results.get()
            process.join()
            told = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
            print(
                f"{form}: {n:,} tokens, file of {path.stat().st_size / 2**20:.0f} MiB, "
                f"{bytes_a_token:.0f} bytes a token"
            )
            print("\n".join([f"  {told}", *(f"  {summary}" for summary in summaries)]))
            worst = max(worst, figures["judged_gib"])
            path.unlink()
    assert np.isfinite(worst)
    print(f"peak {worst:.2f} GiB, limit {LIMIT_GIB:g} GiB")
    return int(worst > LIMIT_GIB)


if __name__ == "__main__":
    raise SystemExit(main())
