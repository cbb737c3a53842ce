"""Small data sets in memory, and what few-shot evaluation takes of them to learn from."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from vit_jax.data.source import Source
from vit_jax.data.support import take_support


class InMemory:
    """Examples from a list, which notes what is read."""

    def __init__(self, examples):
        self.examples = examples
        self.read = []

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        self.read.append(index)
        return self.examples[index]

    def ids(self):
        return [example["id"] for example in self.examples]


def png(pixels):
    """A PNG of uint8 [height, width] or [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def png_of(rows, bits, kind, width, *, interlace=0):
    """A PNG of packed rows, by the specification alone; PIL writes gray ones of 8 bits only."""

    def chunk(name, content):
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    header = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, interlace)
    palette = chunk(b"PLTE", bytes(range(48))) if kind == 3 else b""
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = chunk(b"IHDR", header) + palette + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def packed_png(values, bits, kind):
    """A PNG of values of so many bits, gray (kind 0) or places in a palette (3)."""
    unpacked = (values[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(unpacked.reshape(len(values), -1).astype(np.uint8), axis=1)
    return png_of([bytes(row) for row in rows], bits, kind, values.shape[1])


def tiny_source(counts, size=16, seed=0):
    """A source of noisy images whose classes differ a little; `counts` images of each."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(7).integers(110, 140, (len(counts), size, size, 3))
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    pixels = np.clip(means[labels] + rng.normal(0, 90, (len(labels), size, size, 3)), 0, 255)
    pixels = pixels.astype(np.uint8)
    # Twice as wide: what is squashed to a square is `pixels` again.
    encoded = [png(np.repeat(image, 2, axis=1)) for image in pixels]

    examples = [
        {"image": image, "label": int(label), "id": str(index)}
        for index, (image, label) in enumerate(zip(encoded, labels, strict=True))
    ]
    names = tuple(f"class {index}" for index in range(len(counts)))
    source = Source("tiny", "train", names, sum(map(len, encoded)), InMemory(examples))
    return source, pixels, labels


def chosen(source, shots, seed):
    examples = list(take_support(source, shots, seed))
    ids = [int(example["id"]) for example in examples]
    return ids, np.array([example["label"] for example in examples])
