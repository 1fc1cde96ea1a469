"""A secret goes to the server that it is for, and nowhere else.

No file, no message, no process that does not need it.
"""

import base64
import json
import subprocess
import sys

import pytest

from lockstep.config.recipe import EngineConfig
from lockstep.engines.environments.locate import Environment
from lockstep.engines.openai_http.options import options_of
from lockstep.engines.registry import choose
from lockstep.engines.worker import vllm_environment
from lockstep.errors import EngineError, UsageError, bare_urls
from lockstep.records.environment import SECRET, WRITTEN, resolved_env, without_secrets
from lockstep.records.settings import resolved_plain
from tests.canaries import CANARIES, NAMES, environment, found_in
from tests.hostile_http import engine_on, raw_server

LOCKSTEP = [sys.executable, "-m", "lockstep.cli.main"]
RECIPE = """
[model]
path = "{model}"
[engine]
name = "{engine}"
max_model_len = 128
{options}
[task]
name = "reasoning_gym:basic_arithmetic"
options = {{ min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1 }}
[sampling]
max_tokens = 4
[training]
steps = 1
prompts_per_step = 2
group_size = 2
[parity]
probe_prompts = 4
probe_tokens = 8
draw_tokens = 128
draws_see = 1.0
"""


def lockstep(*args, **more):
    command = [*LOCKSTEP, *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment(OMP_NUM_THREADS="1", **more)
    )


@pytest.fixture
def recipe_file(tmp_path, tiny_checkpoint):
    def write(engine, options=""):
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.format(model=tiny_checkpoint, engine=engine, options=options))
        return path

    return write


def test_only_names_that_are_listed_are_written_down():
    environ = CANARIES | {
        "VLLM_USE_V1": "1",
        "OMP_NUM_THREADS": "2",
        "LOCKSTEP_HEAD_DTYPE": "float32",
        "VLLM_HOME_OF_MINE": "x",
    }
    written = {"env.VLLM_USE_V1": "1", "env.OMP_NUM_THREADS": "2", "env.LOCKSTEP_HEAD_DTYPE": "float32"}
    assert resolved_env(environ, vllm_environment.WRITTEN) == written
    assert resolved_env(environ).keys() == written.keys() - {"env.VLLM_USE_V1"}
    assert not {name for name in WRITTEN | vllm_environment.WRITTEN if SECRET.search(name)}


def test_an_engines_process_is_given_no_secret(monkeypatch):
    kept = {
        "PATH": "/bin",
        "TOKENIZERS_PARALLELISM": "0",
        "VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE": "9",
        "VLLM_PLUGINS": "",
    }
    assert without_secrets(CANARIES | kept) == kept
    for name, secret in CANARIES.items():
        monkeypatch.setenv(name, secret)
    plain = {
        "name": "vllm",
        "version": "0.32.0",
        "generation": "V1",
        "flavour": "cpu",
        "digest": "",
        "smoke": "",
        "built": "",
    }
    env = Environment(**plain, size_bytes=0, path="/nowhere").launch_env()
    assert not set(env) & set(NAMES)
    assert "PATH" in env


def test_an_engines_settings_are_written_down_without_what_may_be_secret():
    told = {
        "model_config.dtype": "torch.float32",
        "model_config.hf_token": "hf_secret",
        "model_config.hf_overrides": {"head_dtype": "float32"},
        "load_config.model_loader_extra_config": {"aws_secret_access_key": "s"},
        "observability_config.otlp_traces_endpoint": "http://me:secret@traces:4317/v1?token=secret",
        "parallel_config.hosts": ["http://u:p@a", "b"],
        "scheduler_config.tables": [{"password": "s"}],
        "cache_config.kinds": {"b", "a"},
        "cache_config.size": 4,
    }
    assert resolved_plain(told.items()) == {
        "model_config.dtype": "torch.float32",
        "model_config.hf_overrides": "{'head_dtype': 'float32'}",
        "load_config.model_loader_extra_config": "dict of 1",
        "observability_config.otlp_traces_endpoint": "http://traces:4317/v1",
        "parallel_config.hosts": "['http://a', 'b']",
        "scheduler_config.tables": "list of 1",
        "cache_config.kinds": "['a', 'b']",
        "cache_config.size": 4,
    }


def test_no_error_shows_the_password_or_the_query_of_a_url():
    url = "http://user:pass%20word@host:8000/v1?api_key=secret"
    error = EngineError(f"engine at {url}", got=f"'{url}'", expected=url, hint=f"curl {url} | cat")
    assert str(error).count("http://host:8000/v1") == 4
    assert "secret" not in str(error)
    assert "word" not in error.boundary + error.got + error.expected + error.hint
    assert bare_urls("is it up? mail a@b.c; https://docs.x/y#z") == "is it up? mail a@b.c; https://docs.x/y#z"


@pytest.mark.parametrize("name", ["HOME", "PATH", "AWS_SECRET_ACCESS_KEY", "MY_API_KEY_FILE"])
def test_a_recipe_cannot_have_any_variable_sent(name, monkeypatch):
    monkeypatch.setenv(name, "canary")
    with raw_server() as server:
        with pytest.raises(UsageError, match=f"api_key_env: got '{name}'.*_API_KEY or _TOKEN") as caught:
            engine_on(server.url, api_key_env=name)
        assert f"--api-key-env {name}" in caught.value.hint
        assert not server.seen
    raw = {"base_url": "http://h", "api_key_env": name}
    assert options_of(raw, name).api_key_env == name
    with pytest.raises(UsageError, match="flag --api-key-env: got 'OTHER'"):
        options_of(raw, "OTHER")
    with pytest.raises(UsageError, match="flag --api-key-env"):
        choose(EngineConfig(name="transformers"), name)


@pytest.mark.parametrize("name", ["LOCKSTEP_API_KEY", "HF_TOKEN"])
def test_a_key_is_sent_as_a_key(name, monkeypatch):
    monkeypatch.setenv(name, "user:some-password")
    with raw_server() as server:
        engine_on(server.url, api_key_env=name).close()
        engine_on(server.url, api_key_env=name, auth="basic").close()
        sent = [headers["Authorization"] for path, headers, _ in server.seen if path == "/v1/models"]
    assert sent == ["Bearer user:some-password", "Basic dXNlcjpzb21lLXBhc3N3b3Jk"]


@pytest.mark.parametrize("key", ["with\nnewline", "ключ", " padded"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_API_KEY", key)
    with pytest.raises(UsageError, match="LOCKSTEP_API_KEY") as caught:
        engine_on("http://127.0.0.1:9")
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("trust_remote_code", True), ("trust_remote_code", "yes"), ("hf_token", "hf_secret")],
)
def test_no_recipe_runs_a_checkpoints_code_or_holds_a_token(option, value):
    for name in ("vllm", "auto"):
        with pytest.raises(UsageError, match=rf"engine\.options\.{option}") as caught:
            choose(EngineConfig(name=name, options={option: value}))
        assert "hf_secret" not in str(caught.value)


def test_a_training_run_holds_no_secret(recipe_file, tmp_path):
    done = lockstep("train", recipe_file("transformers"), "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "run").rglob("*")}
    assert {"manifest.json", "certificate.json", "verdicts.jsonl", "metrics.jsonl"} <= names
    assert found_in(tmp_path / "run", done.stdout, done.stderr) == {}


def test_a_check_of_a_server_holds_no_secret(recipe_file, tmp_path):
    def completed(handler):
        asked = json.loads(handler.server.seen[-1][2])
        n = asked["max_tokens"]
        numbers = {"tokens": ["token_id:7"] * n, "token_logprobs": [-1.5] * n}
        entries = [None, *({str(token): {"logprob": -1.5}} for token in asked["prompt"][1:])]
        choice = {
            "index": 0,
            "token_ids": [7] * n,
            "logprobs": numbers,
            "finish_reason": "length",
            "prompt_logprobs": entries,
        }
        handler.answer(
            json.dumps({"choices": [choice], "usage": {"prompt_tokens": len(asked["prompt"])}}).encode()
        )

    with raw_server() as server:
        server.bodies["/v1/models"] = b'{"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 128}]}'
        server.handlers["/v1/completions"] = completed
        recipe = recipe_file("openai", f'options = {{ base_url = "{server.url}" }}')
        judged = lockstep("check", recipe, "--out", tmp_path / "out")
        audited = lockstep("engines", "audit", "--url", server.url, "--json")
        sent = {headers.get("Authorization") for _, headers, _ in server.seen}
    assert sent == {f"Bearer {CANARIES['LOCKSTEP_API_KEY']}"}
    assert (judged.returncode, audited.returncode) == (1, 3), judged.stderr + audited.stderr
    assert found_in(tmp_path, judged.stdout, judged.stderr, audited.stdout, audited.stderr) == {}


def test_a_key_that_the_server_says_back_is_not_shown(monkeypatch):
    monkeypatch.setenv("LOCKSTEP_API_KEY", CANARIES["LOCKSTEP_API_KEY"])
    with raw_server() as server:
        said = lambda handler: handler.answer(  # noqa: E731
            f"invalid: {handler.headers['Authorization']}".encode(), 401
        )
        server.handlers["/v1/models"] = said
        with pytest.raises(UsageError, match=r"401: invalid: Bearer \(the key\)(?s:.*)api_key_env") as caught:
            engine_on(server.url)
        assert found_in(str(caught.value)) == {}
        del server.handlers["/v1/models"]
        server.bodies["/v1/models"] = f'{{"data": [{{"id": "{CANARIES["LOCKSTEP_API_KEY"]}"}}]}}'.encode()
        engine = engine_on(server.url)
        assert found_in(repr(engine.ready)) == {}
        engine.close()


def test_a_password_that_the_server_says_back_as_it_was_sent_is_not_shown(monkeypatch):
    secret = f"user:{CANARIES['LOCKSTEP_API_KEY']}"
    monkeypatch.setenv("LOCKSTEP_API_KEY", secret)
    with raw_server() as server:
        server.handlers["/v1/models"] = lambda handler: handler.answer(
            f"{handler.headers['Authorization']} is not {secret}".encode(), 401
        )
        with pytest.raises(UsageError, match=r"401: Basic \(the key\) is not \(the key\)") as caught:
            engine_on(server.url, auth="basic")
    assert base64.b64encode(secret.encode()).decode() not in str(caught.value)


def test_a_url_with_a_password_is_refused_at_once_and_not_shown(tiny_checkpoint):
    secret = CANARIES["GITHUB_TOKEN"]
    for url in (f"http://user:{secret}@127.0.0.1:9", f"http://127.0.0.1:9/?key={secret}"):
        done = lockstep("check", "--engine-url", url, "--model", tiny_checkpoint)
        assert done.returncode == 2
        assert "base_url" in done.stderr
        assert found_in(done.stdout, done.stderr) == {}
