"""Weights in files: safetensors or `torch.save` data, read without running any code that the file may hold."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import UserError, require
from ._files import damaged_entry, written_aside

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "weights")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_AVERAGED = "n_averaged"
_SHOWN = 5


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `state_dict` in a file: tensors, and what modules keep as their extra state.

    Taken out of what training programs wrap around it (`{"state_dict": ...}`, `{"model": ...}` and the like).

    Args:
        path: A `.safetensors` file, or one of `torch.save`, which is read with `weights_only=True`.

    Raises:
        UserError: no such file, a damaged one, a pickled module, or one with no tensors in it.
    """
    path = Path(path)
    require(path.is_file(), f"there is no file {path}: name a checkpoint that exists.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    while isinstance(content, Mapping):
        # Beside the weights that a program wraps it may keep other tensors, such as its best accuracy.
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None and any(isinstance(value, Tensor) for value in content.values()):
            return {name: value for name, value in content.items() if isinstance(value, Tensor) or _is_extra(name)}
        content = inner
    raise UserError(f"{path} holds no weights by name: save model.state_dict() and use that file.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        lacking = _broken_off(path)
        why = f", it lacks {_some(lacking)}" if lacking else f" ({error})"
        raise UserError(f"{path} is not a whole safetensors file{why}: fetch or save it again.") from error


def _broken_off(path: Path) -> list[str]:
    """The tensors that a safetensors file's header names and the file ends before; none where the header is damaged."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            held = path.stat().st_size - 8 - size
            entries = json.loads(file.read(size)) if held >= 0 else {}
        return [name for name, entry in entries.items() if entry.get("data_offsets", (0, 0))[1] > held]
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError):  # JSON of anything
        return []


def _read_torch(path: Path) -> Any:
    damaged = damaged_entry(path)
    require(damaged is None, f"{path} is damaged, the checksum of {damaged} differs: fetch or save it again.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged bytes make the unpickler raise whatever they happen to spell.
        about_pickle = "weights_only" in str(error).lower() and "unsupported" in str(error).lower()
        if about_pickle and _starts_as_saved(path):
            raise UserError(
                f"{path} is a pickle of more than weights, which could run any code when read: in a program that "
                "you trust it in, load it and save model.state_dict(), and use that file."
            ) from error
        raise UserError(
            f"{path} is not a whole checkpoint ({type(error).__name__}): fetch or save it again."
        ) from error


def _starts_as_saved(path: Path) -> bool:
    """Whether `torch.save` may have written it: a zip archive or a binary pickle, and no text fetched instead."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the `state_dict` in a file into `model`, all of it or nothing.

    A prefix that all names share, such as `module.` of `DataParallel` or `_orig_mod.` of `torch.compile`, is removed
    where the model's own names lack it; so is the count of updates, `n_averaged`, that an average has beside its
    weights. `num_batches_tracked`, which old files lack, may be missing.

    Raises:
        UserError: what `read_weights` raises it for, and names or shapes that don't fit.
    """
    own = model.state_dict()
    state = _without_prefix(read_weights(path), own)
    read = _as_read_by(model, state)
    missing = [name for name in own if name not in read and not name.endswith("num_batches_tracked")]
    extra = [name for name in read if name not in own]
    other = [
        f"{name} {tuple(read[name].shape)} for {tuple(value.shape)}"
        for name, value in own.items()
        if name in read and not _is_extra(name) and read[name].shape != value.shape
    ]
    found = [("lacks", missing), ("has besides", extra), ("has in another shape", other)]
    problems = "; ".join(f"{verb} {_some(names)}" for verb, names in found if names)
    require(not problems, f"{path} does not fit the model, it {problems}: build the model that it was saved from.")
    model.load_state_dict(state, strict=False)


def _as_read_by(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """`state` as the model's own hooks leave it, which rename or leave out what other versions have saved."""
    read = dict(state)
    for hook in model._load_state_dict_pre_hooks.values():
        hook(read, "", {}, True, [], [], [])
    return read


def _is_extra(name: str) -> bool:
    """Whether an entry comes from a module's `get_extra_state`, and may be anything."""
    return name.rpartition(".")[2] == "_extra_state"


def _without_prefix(state: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    if _AVERAGED not in own:
        state = {name: value for name, value in state.items() if name != _AVERAGED}
    changed = True
    while changed:
        changed = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in own):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
                changed = True
    return state


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's `state_dict`, whole or not at all: as safetensors if `path` ends so, else by `torch.save`.

    Raises:
        UserError: the folder can't be written, or the `state_dict` has entries that safetensors can't hold.
    """
    state = model.state_dict()
    as_safetensors = Path(path).suffix == ".safetensors"
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    require(
        not (as_safetensors and others),
        f"safetensors files hold tensors only, got {_some(others)} of another type: name a .pt file.",
    )
    with written_aside(path) as temporary:
        if as_safetensors:
            from safetensors.torch import save_file

            # Tensors that share memory are written once each: the format has no aliases.
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in state.items()}, temporary)
        else:
            torch.save(state, temporary)
