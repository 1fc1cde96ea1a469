"""The same engines otherwise.

vLLM's default mode, a bf16 body under an fp32 head, tied and untied, the plugin shut off.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tests.contract.conftest import choice_of, groups_of, logprobs_of, spec_of
from tests.contract.test_contract import draw, prompts_of

import lockstep
from lockstep.engines.environments import tiny_model
from lockstep.engines.registry import start
from lockstep.errors import UsageError
from lockstep.parity.explain.semantics.hypotheses import fits
from lockstep.records.tokens import SamplingParams

VLLMS = ["vllm==0.8.5", "vllm==0.18.1", "vllm==0.32.0"]
OLDER = VLLMS[:2]
"""Without a head_dtype of their own: the plugin's."""


@pytest.fixture(scope="module", params=VLLMS)
def mixed(request, trainer, tmp_path_factory):
    """A bf16 body with an fp32 head, in the version's default log-probability mode."""
    choice = choice_of(request.param)
    options = {} if choice.environment.generation == "V0" else {"logprobs_mode": None}
    log = tmp_path_factory.mktemp("mixed") / "engine.log"
    engine = start(choice, spec_of(trainer[1], log, dtype="bfloat16", options=options))
    yield engine, trainer[0]
    engine.close()


def test_the_default_mode_is_identified(mixed):
    engine, policy = mixed
    side = type("Side", (), {"engine": engine})
    prompts = prompts_of(8, seed=20)
    sampling = SamplingParams(max_tokens=24, temperature=0.6)
    found = draw(side, prompts, max_tokens=24, temperature=0.6)
    best = fits(policy, groups_of(prompts, found), logprobs_of(found), sampling)[0]
    raw = engine.ready.generation == "V1"
    assert engine.ready.distribution == ("model" if raw else "sampler")
    assert best.semantics.temperature == (1.0 if raw else 0.6) == engine.semantics(sampling).temperature


def test_the_head_computes_in_fp32_under_a_bf16_body(mixed):
    engine, _ = mixed
    resolved = engine.ready.resolved
    assert (resolved["worker.parameter_dtype"], resolved["worker.head_dtype"]) == (
        "torch.bfloat16",
        "torch.float32",
    )
    assert resolved["worker.plugin_active"] is True
    assert resolved["worker.head_tied"] is True


def tiny(choice, tmp_path, *flags):
    subprocess.run(
        [choice.environment.python, tiny_model.__file__, tmp_path / "tiny", *flags],
        check=True,
        capture_output=True,
    )
    return {"model_path": tmp_path / "tiny", "max_model_len": 64, "dtype": "bfloat16"}


@pytest.mark.parametrize("name", VLLMS)
def test_an_untied_head_in_fp32_is_the_trainers(name, trainer, tmp_path):
    from lockstep.policy.model import load_policy

    choice = choice_of(name)
    changes = tiny(choice, tmp_path, "untied", "still")
    engine = start(choice, spec_of(trainer[1], tmp_path / "engine.log", **changes))
    sequences = [np.random.default_rng(row).integers(0, 512, 40).astype(np.int32) for row in range(8)]
    try:
        scored = np.concatenate(engine.score(sequences))
        assert engine.ready.resolved["worker.head_tied"] is False
    finally:
        engine.close()
    means = {}
    for head in ("float32", "bfloat16"):
        policy = load_policy(changes["model_path"], "bfloat16", head)
        own = np.concatenate(policy.score(groups_of_sequences(sequences), 1.0))
        means[head] = float(np.abs(own - scored).mean())
    # V0's norm rounds a bf16 hidden state by three times what the head does; what is left of it still shows.
    assert means["float32"] < (1.0 if choice.environment.generation == "V0" else 0.1) * means["bfloat16"], (
        means
    )


def groups_of_sequences(sequences):
    from lockstep.records.samples import Group

    return [Group(ids[:1], [ids[1:]]) for ids in sequences]


@pytest.mark.parametrize("name", OLDER)
def test_an_inactive_plugin_is_an_error(name, trainer, tmp_path, monkeypatch):
    choice = choice_of(name)
    monkeypatch.setenv("VLLM_PLUGINS", "none-of-them")
    with pytest.raises(UsageError, match=r"computes in torch\.bfloat16"):
        start(choice, spec_of(trainer[1], tmp_path / "engine.log", **tiny(choice, tmp_path)))


RENDEZVOUS = """
import base64, json, os
from lockstep.engines.worker import vllm_nccl
from lockstep.records.versions import NcclBroadcast
from vllm.distributed.device_communicators.pynccl_wrapper import ncclUniqueId
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine as Receiver

offer = NcclBroadcast(bytes(range(128)), 2, ("w",), ("float32",), ((3, 4),))
info = Receiver.init_info_cls(**vllm_nccl.init_info(offer))
update = Receiver.update_info_cls(**vllm_nccl.update_info(offer))
if getattr(info, "nccl_unique_id_b64", None):
    got = base64.b64decode(info.nccl_unique_id_b64)
else:
    group = StatelessProcessGroup.create(
        host=info.master_address, port=info.master_port, rank=info.rank_offset, world_size=2
    )
    got = bytes(group.broadcast_obj(ncclUniqueId(), src=0))
print(
    json.dumps([got == offer.unique_id, info.rank_offset, info.world_size, update.names, update.shapes]),
    flush=True,
)
os._exit(0)  # a store whose socket is closed before it, as at an interpreter's end, aborts
"""


@pytest.mark.parametrize("name", VLLMS[1:])
def test_the_nccl_route_fits_the_versions_own_signatures(name, tmp_path):
    """Without a GPU: vLLM's own classes take what is sent.

    Its own rendezvous gives a worker the trainer's unique id.
    """
    environment = choice_of(name).environment
    (tmp_path / "lockstep").symlink_to(Path(lockstep.__file__).parent)
    env = environment.launch_env() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [environment.python, "-c", RENDEZVOUS], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [True, 1, 2, ["w"], [[3, 4]]]
