"""Data by name, for the command line: `digits`, a folder of images, `file.py:loader`."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .optional import require
from .running import map_tensors
from .sources import Source, SourceError, build, load_function

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Data:
    """Iterables of `(inputs, targets)` batches; `num_classes` is None for a loader of the user's own."""

    train: Iterable
    val: Iterable
    num_classes: int | None = None


def load_data(spec: str, source: Source, *, batch_size: int = 64, seed: int = 0, workers: int | None = None) -> Data:
    """Training and validation batches of what `spec` names, in the size that `source`'s model takes.

    `digits` is scikit-learn's 1797 scans of digits, 8x8 pixels, resized, in ten classes.  A folder has
    `train/` and `val/` of class folders, or class folders alone, of which every tenth image is held out.
    `file.py:loader` is a function that returns `(train, val)`, iterables of `(inputs, targets)` that can be run
    through again: lists or `DataLoader`s.
    `seed` orders the training batches; the split never depends on it.  `workers` are processes that read
    images, by default one per core, at most 8.

    Raises:
        SourceError: there is no such data, it does not fit the model, or a file cannot be read.
    """
    if ".py:" in spec:
        return _own(spec, build(spec, load_function(spec)))
    if spec == "digits":
        train, val, num_classes = _digits(source)
        workers = 0
    elif Path(spec).is_dir():
        train, val, num_classes = _image_folder(Path(spec), source)
        workers = min(8, os.cpu_count() or 1) if workers is None else workers
    else:
        raise SourceError(f"data {spec!r} is neither digits, nor a folder of images, nor file.py:loader")
    batches = partial(DataLoader, batch_size=batch_size, num_workers=workers)
    order = torch.Generator().manual_seed(seed)
    ragged = len(train) > batch_size  # a last batch of one would stop BatchNorm, so the ragged one goes
    return Data(batches(train, shuffle=True, drop_last=ragged, generator=order), batches(val), num_classes)


def _own(spec: str, made: Any) -> Data:
    """What a function of the user's has returned, if it is a pair of loaders."""
    if not (isinstance(made, (tuple, list)) and len(made) == 2):
        raise SourceError(f"{spec} returns {type(made).__name__}; it must return (train_loader, val_loader)")
    for part, loader in zip(("training", "validation"), made):
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            raise SourceError(f"{spec}: its {part} loader is a {type(loader).__name__}; return a list or a DataLoader")
        if isinstance(loader, Iterator):
            raise SourceError(
                f"{spec}: its {part} loader is a {type(loader).__name__}, which can be run through only once; return a list or "
                "a DataLoader"
            )
    return Data(*made)


class OnDevice:
    """The same batches on another device, moved as they are asked for."""

    def __init__(self, batches: Iterable, device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator:
        return (to_device(batch, self.device) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def to_device(values: Any, device: torch.device) -> Any:
    """Tensors, and tuples, lists and dicts of them, on `device`."""
    return map_tensors(lambda tensor: tensor.to(device), values)


class _Images(Dataset):
    """Pairs of an image (C, H, W) in float32, normalised as the source's model expects, and its class."""

    def __init__(self, items: Sequence[tuple[Any, int]], read: Callable[[Any], Tensor], source: Source) -> None:
        self.items, self.read = items, read
        channels = source.image_size()[0]
        fits = len(source.mean) == channels
        self.mean = torch.tensor(source.mean if fits else [0.5] * channels).view(-1, 1, 1)
        self.std = torch.tensor(source.std if fits else [0.25] * channels).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item, target = self.items[index]
        return (self.read(item) - self.mean) / self.std, target


def _digits(source: Source) -> tuple[_Images, _Images, int]:
    from sklearn.datasets import load_digits  # slow to import

    channels, *size = source.image_size()
    scans = load_digits()
    pixels = torch.from_numpy(scans.images).float() / 16

    def read(scan: Tensor) -> Tensor:
        grey = nn.functional.interpolate(scan[None, None], size, mode="bilinear", align_corners=False)[0]
        return grey.expand(channels, -1, -1)

    items = list(zip(pixels, scans.target.tolist()))
    held_out = [i % 5 == 4 for i in range(len(items))]
    train, val = ([item for item, out in zip(items, held_out) if out is part] for part in (False, True))
    return _Images(train, read, source), _Images(val, read, source), 10


def _image_folder(root: Path, source: Source) -> tuple[_Images, _Images, int]:
    require("PIL", "images", f"reading the images of {root}")
    split = (root / "train").is_dir() and (root / "val").is_dir()
    train_root = root / "train" if split else root
    names = sorted(folder.name for folder in _class_folders(train_root))
    classes = {name: k for k, name in enumerate(names)}
    train = _image_files(train_root, classes)
    if split:
        val = _image_files(root / "val", classes)
    else:
        val, train = train[9::10], [item for k, item in enumerate(train) if k % 10 != 9]
    if len(classes) < 2 or not train or not val:
        raise SourceError(
            f"{root} has {len(classes)} classes with {len(train)} training and {len(val)} validation images; "
            "expected train/ and val/ with a folder of images for each class, or class folders alone"
        )
    if source.image_size()[0] not in (1, 3):
        raise SourceError(f"{root}: the model takes {source.image_size()[0]} channels, images have 1 or 3")
    reader = partial(_read_image, size=source.image_size())
    return _Images(train, partial(reader, augment=True), source), _Images(val, reader, source), len(classes)


def _class_folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _image_files(root: Path, classes: dict[str, int]) -> list[tuple[Path, int]]:
    strange = sorted({folder.name for folder in _class_folders(root)} - set(classes))
    if strange:
        raise SourceError(f"{root} has classes that the training images have not: {', '.join(strange[:5])}")
    return [
        (file, target)
        for name, target in classes.items()
        for file in sorted((root / name).glob("**/*"))
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]


def _read_image(path: Path, size: tuple[int, int, int], augment: bool = False) -> Tensor:
    """The file as (C, H, W) in [0, 1]: a random box and side for training, the central 7/8 for validation."""
    from PIL import Image, UnidentifiedImageError

    channels, height, width = size
    try:
        image = Image.open(path).convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise SourceError(f"{path} is not an image that Pillow can read: {error}") from error
    # The largest box of the model's proportions, made smaller by `share` of its sides.
    scale = min(image.width / width, image.height / height)
    share = float(torch.empty(()).uniform_(0.6, 1.0)) if augment else 0.875
    box_width, box_height = width * scale * share, height * scale * share
    x, y = torch.rand(2).tolist() if augment else (0.5, 0.5)
    left, top = x * (image.width - box_width), y * (image.height - box_height)
    box = (left, top, left + box_width, top + box_height)
    image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    pixels = torch.from_numpy(np.array(image)).float().view(height, width, -1).permute(2, 0, 1) / 255  # C H W
    return pixels.flip(-1) if augment and torch.rand(()) < 0.5 else pixels
