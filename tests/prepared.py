"""Small data sets in the real format of TFDS' builders, written by TFDS itself."""

import numpy as np
import tensorflow_datasets as tfds

# Depths that fall on both sides of every threshold, and lengths that occur in the data sets.
DEPTHS = {"pixel_coords": (7.0, 15.0), "location": (-5.0, 60.0)}
LENGTHS = {"clevr": (3, 10), "kitti": (0, 4), "imagenet2012_real": (0, 3)}


def write(name, data_dir, examples):
    """Prepares the builder `name` from {split: examples} in place of its download."""
    builder = tfds.builder(name, data_dir=data_dir)
    builder._split_generators = lambda dl_manager, **_: {
        split: iter(enumerate(records)) for split, records in examples.items()
    }
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=1)
    builder.download_and_prepare(download_config=config)
    return builder


def random_examples(name, count, noise):
    """Examples with all features of a builder, drawn at random."""
    builder = tfds.builder(name)
    features = builder.info.features
    return [
        {key: _draw(builder.name, key, features[key], noise) for key in features}
        for _ in range(count)
    ]


def _draw(builder, key, feature, noise):
    if isinstance(feature, tfds.features.Image):
        shape = [side or noise.integers(9, 15) for side in feature.shape]
        return noise.integers(0, 2 if builder == "dsprites" else 256, shape, np.uint8)
    if isinstance(feature, tfds.features.ClassLabel):
        return int(noise.integers(feature.num_classes))
    if isinstance(feature, tfds.features.Text):
        return str(noise.integers(1000))
    if isinstance(feature, tfds.features.BBoxFeature):
        return tfds.features.BBox(0.1, 0.2, 0.3, 0.4)
    if isinstance(feature, tfds.features.Sequence):
        low, high = LENGTHS[builder]
        inner = feature.feature
        return [
            {key: _draw(builder, key, inner[key], noise) for key in inner}
            if isinstance(inner, tfds.features.FeaturesDict)
            else _draw(builder, key, inner, noise)
            for _ in range(noise.integers(low, high + 1))
        ]
    return noise.uniform(*DEPTHS.get(key, (0, 1)), feature.shape).astype(np.float32)


def dsprites(count, noise):
    """dSprites: a white square, ellipse or heart, of six sizes, turned by forty angles."""
    rows, columns = np.mgrid[:64, :64] / 63
    for _ in range(count):
        shape, scale, orientation, x, y = (int(noise.integers(n)) for n in (3, 6, 40, 32, 32))
        values = 0.5 + scale / 10, orientation * 2 * np.pi / 39, x / 31, y / 31
        size = 0.17 * values[0]
        across, down = columns - (0.2 + 0.6 * values[2]), rows - (0.2 + 0.6 * values[3])
        cos, sin = np.cos(values[1]), np.sin(values[1])
        u, v = (cos * across + sin * down) / size, (cos * down - sin * across) / size
        inside = (
            np.maximum(abs(u), abs(v)) < 0.8,
            u**2 + (2 * v) ** 2 < 1,
            (u**2 + v**2 - 0.5) ** 3 + u**2 * v**3 < 0,
        )[shape]
        yield {
            "image": inside.astype(np.uint8)[..., None],
            "label_shape": shape,
            "label_scale": scale,
            "label_orientation": orientation,
            "label_x_position": x,
            "label_y_position": y,
            "value_shape": shape + 1.0,
            "value_scale": values[0],
            "value_orientation": values[1],
            "value_x_position": values[2],
            "value_y_position": values[3],
        }


def clevr(count, noise):
    """CLEVR's format: three to ten gray or colored discs and squares on a light ground."""
    colors = np.array(
        [
            [87, 87, 87],
            [42, 75, 215],
            [129, 74, 25],
            [255, 238, 51],
            [173, 35, 35],
            [29, 105, 20],
            [129, 38, 192],
            [41, 208, 208],
        ],
        np.uint8,
    )
    rows, columns = np.mgrid[:48, :64]
    cells = [(8 + 16 * i, 8 + 16 * j) for i in range(3) for j in range(4)]
    for index in range(count):
        image = np.full((48, 64, 3), 200, np.uint8)
        objects = []
        for cell in noise.permutation(len(cells))[: noise.integers(3, 11)]:
            y, x = cells[cell]
            color, shape, size = (int(noise.integers(n)) for n in (8, 3, 2))
            radius = 4 + 2 * size
            across, down = abs(columns - x), abs(rows - y)
            disc = across**2 + down**2 < radius**2
            image[disc if shape else np.maximum(across, down) < radius] = colors[color]
            depth = 14.0 - y / 8
            objects.append(
                {
                    "color": color,
                    "material": 0,
                    "shape": shape,
                    "size": size,
                    "rotation": 0.0,
                    "3d_coords": [0.0, 0.0, 0.0],
                    "pixel_coords": [float(x), float(y), depth],
                }
            )
        yield {
            "image": image,
            "file_name": f"{index}.png",
            "objects": objects,
            "question_answer": [],
        }
