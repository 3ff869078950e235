"""``kdcache env``: what a bug report needs to know about the machine and the installed versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from kdcache import __version__
from kdcache.cli.options import Json
from kdcache.cli.output import out
from kdcache.progress import format_bytes
from kdcache.runs import home

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "numpy",
    "pyarrow",
    "zarr",
    "safetensors",
    "onnxruntime-gpu",
    "datasets",
)


def env(json: Json = False) -> None:  # noqa: ARG001  (its callback switches the output)
    """Show versions, devices, cores, memory and the directory of downloaded files.

    Example: kdcache env --json
    """
    document = environment()
    out.document(document)
    out.dict(document | {"memory": format_bytes(document["memory"])})


def environment() -> dict[str, Any]:
    """Versions, devices and sizes (bytes); an optional package that is missing says so."""
    return {
        "kdcache": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "devices": _devices(),
        "onnxruntime": _providers(),
        "home": str(home()),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    import torch

    devices = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return [
        *devices,
        *(["mps"] if torch.backends.mps.is_available() else []),
        f"cpu ({torch.get_num_threads()} threads)",
    ]


def _providers() -> list[str]:
    """The usable providers of onnxruntime; it lists all it was built with, so torch is asked for a GPU."""
    try:
        import onnxruntime
    except ImportError:
        return ["not installed"]
    import torch

    there = onnxruntime.get_available_providers()
    return [str(name) for name in there if name == "CPUExecutionProvider" or torch.cuda.is_available()]
