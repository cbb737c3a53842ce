import math

import numpy as np
import pytest
from sklearn.decomposition import PCA

from vit_jax.analysis import embeddings
from vit_jax.errors import UserError

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(1, 1, (4, 4, 3, 40)).astype(np.float32)


def test_principal_filters_are_those_of_scikit_learn():
    components, shares = embeddings.principal_filters(KERNEL)
    assert components.shape == (28, 4, 4, 3)
    # Each of the 40 filters is an example with 48 values.
    pca = PCA(28, svd_solver="full").fit([KERNEL[..., i].ravel() for i in range(40)])
    for found, expected in zip(components.reshape(28, -1), pca.components_, strict=True):
        sign = np.sign(found @ expected)
        np.testing.assert_allclose(found, sign * expected, atol=1e-5)
        assert found[np.abs(found).argmax()] > 0
    np.testing.assert_allclose(shares, pca.explained_variance_ratio_, rtol=1e-5)


def test_there_are_no_more_components_than_values_or_filters():
    assert len(embeddings.principal_filters(KERNEL[..., :5])[0]) == 5
    assert len(embeddings.principal_filters(KERNEL[:1, :1])[0]) == 3


def test_filters_as_pixels_keep_zero_at_gray():
    filters = np.stack([KERNEL[..., 0], -3 * KERNEL[..., 0], np.zeros((4, 4, 3))])
    pixels = embeddings.to_rgb(filters)
    assert pixels.min() >= 0 and pixels.max() <= 1
    np.testing.assert_allclose(pixels[0] + pixels[1], 1, atol=1e-6)
    np.testing.assert_allclose(np.abs(pixels[:2] - 0.5).max(axis=(1, 2, 3)), 0.5, atol=1e-6)
    assert np.all(pixels[2] == 0.5)


@pytest.mark.parametrize("scale", [3, 1e-5])
def test_a_hybrid_or_resnet_shows_the_convolution_that_sees_the_image(scale):
    root = RNG.normal(2, scale, (7, 7, 3, 16)).astype(np.float32) - np.float32(2)
    centered = np.float64(root) - np.float64(root).mean((0, 1, 2))
    deviation = np.sqrt(np.square(centered).mean((0, 1, 2)))
    params = {"embedding": {"kernel": np.zeros((1, 1, 64, 8))}, "conv_root": {"kernel": root}}
    filters = embeddings.rgb_filters(params)
    np.testing.assert_allclose(filters, centered / (deviation + 1e-5), atol=1e-4)
    # The other networks' epsilon: that of BiT, and of AxialResNet.
    expected = centered / np.sqrt(deviation**2 + 1e-10)
    of_bit = {"resnet": {"root_block": {"standardized_conv2d": {"kernel": root}}}}
    of_axial = {"conv_root": {"kernel": root}, "head": {"kernel": np.zeros((64, 8))}}
    for params in (of_bit, of_axial):
        np.testing.assert_allclose(embeddings.rgb_filters(params), expected, atol=1e-4)


def test_a_vit_shows_its_patch_embedding():
    np.testing.assert_array_equal(embeddings.rgb_filters({"embedding": {"kernel": KERNEL}}), KERNEL)


@pytest.mark.parametrize("has_class_token", [True, False])
def test_position_similarity_is_that_of_loops(has_class_token):
    rows, columns = 2, 3
    positions = RNG.normal(0, 1, (rows * columns + has_class_token, 5)).astype(np.float32)
    similarity = embeddings.position_similarity(positions, (rows, columns))
    assert similarity.shape == (rows, columns, rows, columns)
    for row, column, y, x in np.ndindex(rows, columns, rows, columns):
        a = positions[has_class_token + row * columns + column]
        b = positions[has_class_token + y * columns + x]
        dot = sum(float(p) * float(q) for p, q in zip(a, b, strict=True))
        lengths = math.sqrt(sum(float(p) ** 2 for p in a) * sum(float(q) ** 2 for q in b))
        assert similarity[row, column, y, x] == pytest.approx(dot / lengths, abs=1e-6)
    for row, column in np.ndindex(rows, columns):
        assert similarity[row, column, row, column] == pytest.approx(1)


def test_a_model_without_filters_is_refused():
    with pytest.raises(UserError, match="has no filters that see the image"):
        embeddings.rgb_filters({"head": {"kernel": np.zeros((3, 3))}})
