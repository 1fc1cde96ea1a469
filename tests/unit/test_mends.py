"""Lowering a symbol version in an ELF file, on real libraries made here."""

import ctypes
import json
import subprocess

import pytest

from lockstep.engines.environments.mends import lower_version
from lockstep.engines.vllm.older_form import older_config, older_form


def build(directory, name, source, *flags):
    (directory / f"{name}.c").write_text(source)
    subprocess.run(
        ["g++", "-x", "c", "-shared", "-fPIC", "-o", f"{name}.so", f"{name}.c", *flags],
        cwd=directory,
        check=True,
    )
    return directory / f"{name}.so"


def test_a_library_that_asks_for_a_newer_version_loads_after_it_is_lowered(tmp_path):
    (tmp_path / "both.map").write_text(
        "API_1.0 { global: old; local: *; };\nAPI_2.0 { global: fresh; } API_1.0;\n"
    )
    (tmp_path / "one.map").write_text("API_1.0 { global: old; fresh; local: *; };\n")
    both = "int old(void) { return 1; } int fresh(void) { return 2; }"
    build(tmp_path, "libapi", both, "-Wl,--version-script=both.map", "-Wl,-soname,libapi.so")
    calls = "int old(void); int fresh(void); int sum(void) { return 10 * old() + fresh(); }"
    user = build(tmp_path, "libuser", calls, "-L.", "-l:libapi.so", "-Wl,-rpath,$ORIGIN")
    # An older system.
    build(tmp_path, "libapi", both, "-Wl,--version-script=one.map", "-Wl,-soname,libapi.so")
    with pytest.raises(OSError, match=r"API_2\.0"):
        ctypes.CDLL(user)
    user.write_bytes(lower_version(user.read_bytes(), "API_2.0", "API_1.0"))
    assert ctypes.CDLL(user).sum() == 12


def test_what_is_no_elf_file_and_names_of_two_lengths_are_refused():
    with pytest.raises(ValueError, match="ELF"):
        lower_version(b"MZ" + bytes(100), "A_2", "A_1")
    with pytest.raises(ValueError, match="lengths"):
        lower_version(b"\x7fELF\x02\x01" + bytes(100), "A_10", "A_1")


def test_the_older_form_has_what_transformers_4_reads(tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    new = {
        "model_type": "llama",
        "dtype": "float32",
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    }
    (model / "config.json").write_text(json.dumps(new))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    (model / "model.safetensors").write_bytes(b"weights")
    older_form(model, out)
    assert json.loads((out / "config.json").read_text()) == new | {
        "rope_theta": 100000.0,
        "torch_dtype": "float32",
    }
    assert (
        json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    assert (out / "model.safetensors").resolve() == (model / "model.safetensors").resolve(), (
        "linked, not copied"
    )
    scaled = older_config({"rope_parameters": {"rope_theta": 5.0, "rope_type": "llama3", "factor": 8.0}})
    assert scaled["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
