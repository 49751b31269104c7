"""The data sets, decoded into tensors once and served in batches; see the README beside the data for what each is."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class NoData(Exception):
    """A file that a benchmark needs is not there."""


def folder() -> Path:
    """Where the data is: $DMSCALE_DATA, or `shared/data` beside the checkout.

    Raises:
        NoData: there is no such folder.
    """
    place = Path(os.environ.get("DMSCALE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not place.is_dir():
        raise NoData(f"no data at {place}; set DMSCALE_DATA to the folder that holds it")
    return place


def file(name: str) -> Path:
    """A file of the data.

    Raises:
        NoData: it is missing; the message says which.
    """
    path = folder() / name
    if not path.exists():
        raise NoData(f"{path} is missing")
    return path


# -- pictures ---------------------------------------------------------------------------------------------------------


def _tiles(name: str, rows: int, columns: int, size: int) -> np.ndarray:
    """The tiles of a picture, row by row, (rows * columns, size, size[, 3])."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    picture = np.array(Image.open(file(name)))
    colours = picture.shape[2:]
    return picture.reshape(rows, size, columns, size, *colours).swapaxes(1, 2).reshape(-1, size, size, *colours)


def cifar10(part: str, shards: tuple[int, ...] = (0, 1, 2, 3, 4)) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) of uint8 and classes (N,) of `part` "train" (chosen shards of 10,000) or "test"."""
    labels = np.load(file("cifar10_labels.npz"))[part]
    names = [f"large/cifar10_train_{i}.webp" for i in shards] if part == "train" else ["cifar10_test.webp"]
    images = np.concatenate([_tiles(n, 100, 100, 32) for n in names])
    if part == "train":
        labels = np.concatenate([labels[10_000 * i : 10_000 * (i + 1)] for i in shards])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()


def fashion_mnist(part: str, shards: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) of uint8 and classes (N,), as `cifar10`."""
    labels = np.load(file("large/fashion_mnist_labels.npz"))[part]
    names = (
        [f"large/fashion_mnist_train_{i}.png" for i in shards] if part == "train" else ["large/fashion_mnist_test.png"]
    )
    images = np.concatenate([_tiles(n, 100, 100, 28) for n in names])
    if part == "train":
        labels = np.concatenate([labels[10_000 * i : 10_000 * (i + 1)] for i in shards])
    return torch.from_numpy(images)[:, None].contiguous(), torch.from_numpy(labels).long()


def nuclei() -> tuple[Tensor, Tensor]:
    """Grey images (334, 1, 256, 256) of uint8 and whether each pixel is nucleus (334, 256, 256), 0 or 1."""
    images = _tiles("nuclei_images.png", 17, 20, 256)[:334]
    labels = np.load(file("nuclei_labels.npz"))["labels"] > 0
    return torch.from_numpy(images)[:, None].contiguous(), torch.from_numpy(labels).long()


@dataclass
class Pictures:
    """Batches of one epoch at every iteration, shuffled and augmented by PyTorch's generator.

    images: (N, C, H, W) of uint8; targets: (N,) or (N, H, W).  mean, std: of a channel, on pixels in [0, 1].
    pad: pixels of padding from which a crop of the same size is cut; 0 for none.  flip: mirror half of them.
    turn: also turn by quarters and mirror, images and targets alike (segmentation).
    """

    images: Tensor
    targets: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch: int
    pad: int = 0
    flip: bool = False
    turn: bool = False

    def __len__(self) -> int:
        return len(self.images) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images))
        for i in range(len(self)):
            chosen = order[i * self.batch : (i + 1) * self.batch].to(self.images.device)
            yield self._augmented(self.images[chosen], self.targets[chosen])

    def _augmented(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.turn:
            turns, mirror = int(torch.randint(4, ())), bool(torch.rand(()) < 0.5)
            x, y = (t.rot90(turns, (-2, -1)) for t in (x, y))
            x, y = (t.flip(-1) if mirror else t for t in (x, y))
        if self.flip:
            mirrored = (torch.rand(len(x)) < 0.5).to(x.device).view(-1, 1, 1, 1)
            x = torch.where(mirrored, x.flip(-1), x)
        x = self._normalised(x)
        return (self._cropped(x) if self.pad else x), y

    def _normalised(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x.float() / 255 - mean) / std

    def _cropped(self, x: Tensor) -> Tensor:
        """A crop at a random place of each padded image; padding is zero after normalisation, as usual for CIFAR."""
        n, _, h, w = x.shape
        padded = F.pad(x, [self.pad] * 4)
        top, left = torch.randint(0, 2 * self.pad + 1, (2, n))
        rows, columns = ((at[:, None] + torch.arange(k)).to(x.device) for at, k in ((top, h), (left, w)))
        each = torch.arange(n, device=x.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()

    def plain(self, batch: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """All in order, not augmented: for evaluation."""
        for i in range(0, len(self.images), batch):
            yield self._normalised(self.images[i : i + batch]), self.targets[i : i + batch]


# -- text -------------------------------------------------------------------------------------------------------------


def shakespeare() -> tuple[Tensor, Tensor]:
    """Bytes of Tiny Shakespeare, the first 90% and the last 10%, two vectors of int64."""
    everything = np.frombuffer(file("text/tinyshakespeare.txt").read_bytes(), dtype=np.uint8)
    tokens = torch.from_numpy(everything.astype(np.int64))
    cut = int(0.9 * len(tokens))
    return tokens[:cut], tokens[cut:]


def wikitext2() -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of WikiText-2: train, validation and test."""
    parts = [np.frombuffer(lzma.decompress(file(f"text/wikitext2_{p}.txt.xz").read_bytes()), dtype=np.uint8)
             for p in ("train", "valid", "test")]  # fmt: skip
    return tuple(torch.from_numpy(p.astype(np.int64)) for p in parts)  # type: ignore[return-value]


def stories(cache: Path) -> tuple[Tensor, Tensor]:
    """Tokens of the stories by the vocabulary of stories260k, all but the last tenth and the last tenth of the stories.

    Each story begins with token 1.  Encoding takes a while, so it is done once and kept in the folder `cache`.
    """
    path = cache / "stories-tokens.pt"
    if not path.exists():
        text = lzma.decompress(file("text/tinystories_sample.txt.xz").read_bytes()).decode()
        encode = story_encoder()
        encoded = [encode(s.strip()) for s in text.split("<|endoftext|>")[:-1]]  # the last one is cut off
        cut = len(encoded) * 9 // 10
        joined = [torch.tensor([t for s in part for t in s]) for part in (encoded[:cut], encoded[cut:])]
        cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        torch.save(joined, temporary)
        os.replace(temporary, path)
    train, test = torch.load(path, weights_only=True)
    return train, test


def story_encoder() -> Callable[[str], list[int]]:
    """The tokeniser of llama2.c: from single characters, merge the neighbours whose joined piece scores highest."""
    vocabulary = json.loads(file("weights/stories260k_vocab.json").read_text())
    pieces: list[str] = vocabulary["pieces"]
    scores: list[float] = vocabulary["scores"]
    index = {p: i for i, p in enumerate(pieces)}
    known: dict[str, list[int]] = {}

    def merge(word: str) -> list[int]:
        tokens = [t for c in word for t in ([index[c]] if c in index else [b + 3 for b in c.encode()])]
        while True:
            joined = [(scores[j], -i, j) for i, (a, b) in enumerate(zip(tokens, tokens[1:]))
                      if (j := index.get(pieces[a] + pieces[b])) is not None]  # fmt: skip
            if not joined:
                return tokens
            _, at, j = max(joined)
            tokens[-at : -at + 2] = [j]

    def encode(text: str) -> list[int]:
        # a piece has a blank at its start only, so words can be merged one by one, each with the blank before it
        words = (" " + text).replace(" ", "\0 ").split("\0")[1:]
        tokens = [1]
        for word in words:
            if word not in known:
                known[word] = merge(word)
            tokens += known[word]
        return tokens

    return encode


@dataclass
class Tokens:
    """Windows of a text at random places, an epoch being as many as fit; targets are the inputs one place on.

    tokens: (N,) of int64.  `plain` gives all windows in order.
    """

    tokens: Tensor
    length: int
    batch: int

    def __len__(self) -> int:
        return max(1, len(self.tokens) // (self.length * self.batch))

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for _ in range(len(self)):
            at = torch.randint(0, len(self.tokens) - self.length, (self.batch,))
            yield self._windows(at)

    def _windows(self, at: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        places = (at[:, None] + torch.arange(self.length + 1)).to(self.tokens.device)
        window = self.tokens[places]
        return {"input_ids": window[:, :-1]}, window[:, 1:]

    def plain(self, batch: int = 64) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Windows that follow one another; the remainder that fills no window is left out."""
        starts = torch.arange(0, len(self.tokens) - self.length, self.length)
        for at in starts.split(batch):
            yield self._windows(at)
