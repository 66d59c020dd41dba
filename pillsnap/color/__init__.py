"""Models of colours: their classes and functions under one name, each imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pillsnap.color.bench import bench_color
    from pillsnap.color.data.cubes import CubeDataset
    from pillsnap.color.data.pairs import ImagePairDataset
    from pillsnap.color.data.studio import StudioLightDataset
    from pillsnap.color.export import bake, export_adaptive
    from pillsnap.color.networks.adaptive import AdaptiveLut
    from pillsnap.color.networks.files import get_model_info, load_model, save_model
    from pillsnap.color.networks.nilut import Nilut
    from pillsnap.color.networks.nilut import Nilut as NILUT
    from pillsnap.color.style import run_style_learning
    from pillsnap.color.train import train_color

__all__ = [
    "NILUT",
    "AdaptiveLut",
    "CubeDataset",
    "ImagePairDataset",
    "Nilut",
    "StudioLightDataset",
    "bake",
    "bench_color",
    "export_adaptive",
    "get_model_info",
    "load_model",
    "run_style_learning",
    "save_model",
    "train_color",
]

_CHAPTERS = {
    "bench": ("bench_color",),
    "data.cubes": ("CubeDataset",),
    "data.pairs": ("ImagePairDataset",),
    "data.studio": ("StudioLightDataset",),
    "export": ("bake", "export_adaptive"),
    "networks.adaptive": ("AdaptiveLut",),
    "networks.files": ("get_model_info", "load_model", "save_model"),
    "networks.nilut": ("Nilut",),
    "style": ("run_style_learning",),
    "train": ("train_color",),
}
_HOMES = {name: (chapter, name) for chapter, names in _CHAPTERS.items() for name in names}
_HOMES["NILUT"] = ("networks.nilut", "Nilut")  # as the deployment guide writes it


if not TYPE_CHECKING:  # a type checker would take it for a promise that every name exists

    def __getattr__(name: str) -> object:
        """Import what is asked for: torch is not loaded before."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        chapter, own = _HOMES[name]
        globals()[name] = getattr(import_module(f"{__name__}.{chapter}"), own)
        return globals()[name]


def __dir__() -> list[str]:
    """Names of the module, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
