"""Checks that several commands share."""

from __future__ import annotations

from pathlib import Path

from ropewalk.errors import UserError


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise UserError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise UserError(f"{name}={value} is not known; use one of: {', '.join(map(str, allowed))}")


def existing_directory(name: str, path: str, mend: str) -> Path:
    """The directory at ``path``, or UserError with the mend."""
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{name}={path} is not a directory; {mend}")
    return directory


def require_device(name: str, device: str) -> None:
    """Raise UserError where CUDA is asked for and there is none. Imports torch."""
    import torch

    if device in ("cuda", "auto") and not torch.cuda.is_available():
        raise UserError(
            f"{name}={device}, but torch {torch.__version__} sees no CUDA device; set {name}=cpu or run on a GPU node"
        )
