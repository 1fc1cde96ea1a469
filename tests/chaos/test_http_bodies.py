"""The long form of the hostile bodies in tests/unit/test_http_replies.py."""

import json

import pytest

from tests.hostile_http import VOCABULARY, engine_on, raw_server
from tests.unit.test_http_replies import fuzz_decode, fuzz_loopback

pytestmark = pytest.mark.chaos
SEEDS = range(100, 104)


@pytest.fixture
def pair(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    with raw_server() as server:
        engine = engine_on(server.url, tmp_path)
        yield engine, server
        engine.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_hostile_bodies(pair, seed):
    found = fuzz_decode(pair[0], 5000, seed)
    assert min(found.values()) > 400


@pytest.mark.parametrize("seed", SEEDS)
def test_hostile_bodies_over_a_socket(pair, seed):
    found = fuzz_loopback(*pair, 1000, seed)
    assert min(found.values()) > 50
