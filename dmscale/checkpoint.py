"""Checkpoints: a killed search goes on where it stopped, bit for bit on a CPU.

A file holds the state of the search, the states of the random generators and, unless left out, the weights and the state
of the optimizer.  It is written beside the old one and put in its place when it is complete on the disk, so that a process
may be killed, or a disk fill up, at any moment: what is there is always a whole checkpoint.  A checksum tells a damaged
one, and nothing is changed by a file that cannot be read or does not fit.

Layout: a line that names the format, the SHA-256 of the rest in hexadecimal, a line end, and a file of `torch.save`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import socket
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from . import attachment
from .errors import CheckpointError

if TYPE_CHECKING:
    from .search import Search

_MAGIC = b"dmscale checkpoint 1\n"
_HEADER = len(_MAGIC) + 64 + 1


# -- files ------------------------------------------------------------------------------------------------------------


class _Hashing:
    """A file to write to that keeps the checksum of what it was given."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write `content` (tensors and plain data) to `path`, atomically.

    Raises:
        CheckpointError: it could not be written, or not be read back; an earlier file of that name is as it was.
    """
    path = Path(path)
    plain = {key: _plain(value, key, path) for key, value in content.items()}
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(path)
        with open(temporary, "wb") as file:
            file.write(_MAGIC + b"0" * 64 + b"\n")
            hashing = _Hashing(file)
            torch.save(plain, hashing)  # type: ignore[arg-type]
            file.seek(len(_MAGIC))
            file.write(hashing.digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save wraps some failures of the file in RuntimeError
        kept = "the earlier checkpoint of that name is untouched" if path.exists() else "no file was left"
        raise CheckpointError(
            f"the checkpoint {path} could not be written ({_cause(error)}); {kept}. Free space or choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


_LEAVES = (Tensor, nn.Parameter, bool, int, float, complex, str, bytes, type(None))
"""What `read` is known to take, beside containers of it."""


def _plain(value: Any, where: str, path: Path) -> Any:
    """`value` as `read` will give it: with Python's numbers for NumPy's.

    Args:
        where: names it in the file.
    Raises:
        CheckpointError: `read` would refuse it, and the whole file with it.
    """
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value)
    if kind in (dict, OrderedDict):
        items = [(_plain(k, f"a key of {where}", path), _plain(v, f"{where}[{k!r}]", path)) for k, v in value.items()]
        made = kind(items)
        if kind is OrderedDict:  # the state of a module keeps versions there
            vars(made).update(vars(value))
        return made
    if kind in (list, tuple):
        return kind(_plain(v, f"{where}[{i}]", path) for i, v in enumerate(value))
    if kind not in _LEAVES and not _readable(value):
        raise CheckpointError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which cannot be read back; {path} was not written. Store "
            "tensors and plain data: torch.from_numpy(array), str(path), vars(settings), the state_dict() of an object."
        )
    return value


def _readable(value: Any) -> bool:
    """Whether `read` takes `value`: tried, since PyTorch knows some classes and the user may have added to them."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever a class raises that does not pickle
        return False
    return True


def _remove_orphans(path: Path) -> None:
    """Delete what processes of this host that are gone had begun to write."""
    prefix = f"{path.name}.{socket.gethostname()}."
    for part in path.parent.glob("*.part"):
        pid = part.name.removeprefix(prefix).removesuffix(".part")
        if part.name.startswith(prefix) and pid.isdigit() and not _is_running(int(pid)):
            part.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return True


def _cause(error: BaseException) -> str:
    """The failure of the operating system behind `error`, where there is one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return f"{type(seen).__name__}: {seen}"
        seen = seen.__cause__ or seen.__context__
    return f"{type(error).__name__}: {error}"


def _sync_folder(folder: Path) -> None:
    """Make the new name durable too; not every system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a file of `write`, on the CPU.

    Raises:
        CheckpointError: the file is missing, is no checkpoint, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER)
            if not header.startswith(_MAGIC):
                raise CheckpointError(f"{path} is no checkpoint of dmscale; expected what search.save() writes")
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            if len(header) < _HEADER or digest.hexdigest().encode() != header[len(_MAGIC) : -1]:
                raise CheckpointError(
                    f"the checkpoint {path} is damaged: its checksum does not fit its {os.path.getsize(path)} bytes. "
                    "Nothing was changed; load an earlier one."
                )
            file.seek(_HEADER)
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read ({type(error).__name__}: {error})") from error


# -- random generators ------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The states of the generators of PyTorch (CPU and every CUDA device), NumPy and Python, as plain data."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "python": [version, list(words), gauss],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators where `random_state` found them; those of CUDA only if there are as many devices."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(list(state["cuda"]))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


@contextlib.contextmanager
def preserving_random_state() -> Iterator[None]:
    """Whatever happens inside, the generators stand where they stood afterwards."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


# -- searches ---------------------------------------------------------------------------------------------------------


def save(
    search: Search,
    path: str | os.PathLike[str],
    optimizer: torch.optim.Optimizer | None = None,
    model: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """What `Search.save` does."""
    if model and attachment.shards(search.model):
        raise CheckpointError(
            "the weights are sharded over several processes (FSDP2), one file cannot hold them: save(..., model=False) for "
            "the structure, and torch.distributed.checkpoint for the weights and the optimizer"
        )
    write(
        path,
        {
            "search": search.state_dict(),
            "random": random_state(),
            "model": search.space.model.state_dict() if model else None,
            "optimizer": optimizer.state_dict() if optimizer is not None else None,
            "optimizer class": type(optimizer).__name__ if optimizer is not None else None,
            "extra": dict(extra or {}),
        },
    )


def load(
    search: Search, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """What `Search.load` does."""
    content = read(path)
    if "search" not in content:
        raise CheckpointError(
            f"{path} is a checkpoint of something else than a search; expected what search.save() writes"
        )
    model = search.space.model
    if content["model"] is not None:
        check_weights(model, content["model"], path)
    if optimizer is not None:
        _check_optimizer(optimizer, content["optimizer"], content.get("optimizer class"), path)
    search.load_state_dict(content["search"])  # refuses another search before it changes anything
    if content["model"] is not None:
        model.load_state_dict(content["model"])
    if optimizer is not None:
        optimizer.load_state_dict(content["optimizer"])
    set_random_state(content["random"])
    return content["extra"]


def check_weights(model: nn.Module, weights: Mapping[str, Any], path: Any) -> None:
    """Whether `weights` fit `model` in names and shapes.

    Raises:
        CheckpointError: they do not; some that differ are named.
    """
    own = model.state_dict()
    differing = sorted(own.keys() ^ weights.keys())
    differing += [
        n for n in own.keys() & weights.keys() if getattr(own[n], "shape", 0) != getattr(weights[n], "shape", 0)
    ]
    if differing:
        raise CheckpointError(
            f"the weights in {path} are of another {type(model).__name__}: {', '.join(map(repr, differing[:5]))} "
            "differ in name or shape. Build the model as when it was saved."
        )


def _check_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any] | None, kind: str | None, path: Any
) -> None:
    if state is None:
        raise CheckpointError(f"{path} holds no state of an optimizer; it was saved without optimizer=")
    if kind != type(optimizer).__name__:
        raise CheckpointError(
            f"the optimizer in {path} is of the class {kind}, this one of {type(optimizer).__name__}, which keeps another "
            "state; build it as when it was saved"
        )
    own = [len(g["params"]) for g in optimizer.param_groups]
    theirs = [len(g["params"]) for g in state["param_groups"]]
    if own != theirs:
        raise CheckpointError(
            f"the optimizer in {path} has groups of {theirs} parameters, this one of {own}; build it as when it was saved, "
            "and attach the search before loading"
        )
