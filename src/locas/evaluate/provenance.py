"""What a result file says about where it comes from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from locas._version import __version__
from locas.backbone import Backbone

_SAMPLE = 65_536  # numbers of each weight that go into `weights_sha256`
_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")  # instructions, as Linux names them; the last one is Arm's
_PACKAGES = ("torch", "transformers", "peft", "numpy")


def environment(backbone: Backbone) -> dict[str, Any]:
    """The keys `commit`, `uncommitted`, `versions`, `device` and `backbone` of a result file."""
    commit, changed = _commit()
    return {
        "commit": commit,
        "uncommitted": changed,
        "versions": {"locas": __version__, "python": platform.python_version(), **_versions()},
        "device": device_name(backbone),
        "backbone": {
            "name": backbone.name,
            "parameters": backbone.n_parameters,
            "dtype": str(next(backbone.model.parameters()).dtype).removeprefix("torch."),
            "weights_sha256": weights_sha256(backbone.model),
            "tokenizer_sha256": backbone.tokenizer_sha256,
        },
    }


def device_name(backbone: Backbone) -> str:
    """What it ran on, e.g. "AMD EPYC (avx512_bf16) CPU, 2 cores, 1 threads"."""
    device = next(backbone.model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_processor()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return device.type


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A CPU's model and its fastest instructions for products of bfloat16, on which speed hangs most; the architecture
    where no model is named."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    facts = dict(re.findall(r"^(model name|flags|Features)\s*:\s*(.+)$", text, re.MULTILINE))
    name = facts.get("model name", platform.machine()).replace(",", " ").removesuffix(" CPU")
    able = {*facts.get("flags", "").split(), *facts.get("Features", "").split()}
    return name + next((f" ({flag})" for flag in _BFLOAT16 if flag in able), "")


def weights_sha256(model: Any) -> str:
    """Hash of all weights' names, shapes, dtypes and first numbers: two backbones that differ in any layer differ."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        if not parameter.is_meta:
            sample = parameter.detach().flatten()[:_SAMPLE].contiguous().cpu()
            digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout that locas runs from, and whether its code was changed since; None: no checkout."""
    here = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "--error-unmatch", "_version.py"):
        return None, None
    return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "."))
