"""Rollout and attention distance against loops over every image, head, query and key."""

import math

import numpy as np
import pytest

from vit_jax.analysis import attention

GRID = (2, 3)


def random_weights(tokens, batch=2, layers=3, heads=4):
    """Attention weights [batch, layers, heads, tokens, tokens]: rows of positive sum 1."""
    values = np.random.default_rng(0).gamma(0.3, size=(batch, layers, heads, tokens, tokens))
    return (values / values.sum(-1, keepdims=True)).astype(np.float32)


def multiply(a, b):
    size = len(a)
    return [[sum(a[i][k] * b[k][j] for k in range(size)) for j in range(size)] for i in range(size)]


@pytest.mark.parametrize("tokens", [7, 6])
def test_rollout_is_that_of_loops(tokens):
    weights = random_weights(tokens)
    result = np.asarray(attention.rollout(weights))
    for image in range(2):
        expected = [[float(i == j) for j in range(tokens)] for i in range(tokens)]
        for layer in range(3):
            mixed = []
            for i in range(tokens):
                row = [
                    sum(float(weights[image, layer, head, i, j]) for head in range(4)) / 4
                    + (i == j)
                    for j in range(tokens)
                ]
                mixed.append([x / sum(row) for x in row])
            expected = multiply(mixed, expected)
        np.testing.assert_allclose(result[image], expected, rtol=1e-5)
    np.testing.assert_allclose(result.sum(-1), 1.0, rtol=1e-5)


def test_rollout_applies_the_first_layer_first():
    # Layer 1 moves token 0 to token 1, layer 2 token 1 to token 2. In this order token 2 has a
    # share in token 0 of the input; in the other it would have none.
    weights = np.stack([np.eye(3), np.eye(3)])[None, :, None]
    weights[0, 0, 0, 1] = [1, 0, 0]
    weights[0, 1, 0, 2] = [0, 1, 0]
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]]
    np.testing.assert_allclose(attention.rollout(weights)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("tokens", [7, 6])
@pytest.mark.parametrize("patch_size", [4, 32])
def test_attention_distance_is_that_of_loops(tokens, patch_size):
    weights = random_weights(tokens)
    result = attention.attention_distance(weights, GRID, patch_size)
    rows, columns = GRID
    before = tokens - rows * columns
    centers = [
        ((row + 0.5) * patch_size, (column + 0.5) * patch_size)
        for row in range(rows)
        for column in range(columns)
    ]
    for image, layer, head in np.ndindex(2, 3, 4):
        total = 0.0
        for i, query in enumerate(centers):
            for j, key in enumerate(centers):
                weight = weights[image, layer, head, before + i, before + j]
                total += weight * math.dist(query, key)
        expected = total / len(centers)
        assert result[image, layer, head] == pytest.approx(expected, rel=1e-5)


def test_a_head_that_looks_at_itself_has_distance_0_and_one_that_looks_aside_one_patch():
    itself = np.eye(7)
    aside = np.zeros((7, 7))
    for query, key in [(1, 2), (2, 3), (3, 2), (4, 5), (5, 6), (6, 5)]:
        aside[query, key] = 1
    distances = attention.attention_distance(np.stack([itself, aside]), GRID, 16)
    np.testing.assert_allclose(distances, [0, 16])


@pytest.mark.parametrize("tokens", [7, 6])
def test_the_uniform_distance_is_that_of_uniform_attention(tokens):
    weights = np.full((tokens, tokens), 1 / tokens)
    expected = attention.attention_distance(weights, GRID, 8)
    assert attention.uniform_distance(GRID, 8, tokens) == pytest.approx(float(expected), rel=1e-5)


def test_the_image_looks_through_the_class_token():
    weights = random_weights(7)
    maps = attention.on_patches(weights, GRID)
    assert maps.shape == (2, 3, 4, *GRID)
    # Row 1, column 2 is the last patch.
    np.testing.assert_array_equal(maps[..., 1, 2], weights[..., 0, 6])
    np.testing.assert_array_equal(maps[..., 0, 0], weights[..., 0, 1])


def test_without_a_class_token_it_looks_through_all_patches():
    weights = random_weights(6)
    maps = attention.on_patches(weights, GRID)
    np.testing.assert_allclose(maps[..., 1, 0], weights[..., 3].sum(-1) / 6, rtol=1e-5)


def test_a_mask_is_the_map_enlarged_with_its_maximum_at_one():
    maps = np.array([[[0.1, 0.2, 0.4], [0.0, 0.2, 0.1]]], np.float32)
    mask = np.asarray(attention.to_mask(maps, (8, 12)))[0]
    assert mask.shape == (8, 12)
    # Half-pixel centers by hand: pixel x lies at (x + 0.5) / 4 - 0.5 patches, held at the edges.
    for y, x in np.ndindex(8, 12):
        v, u = min(max((y + 0.5) / 4 - 0.5, 0), 1), min(max((x + 0.5) / 4 - 0.5, 0), 2)
        left = min(int(u), 1)
        rows = maps[0, :, left] * (left + 1 - u) + maps[0, :, left + 1] * (u - left)
        expected = (rows[0] * (1 - v) + rows[1] * v) / 0.4
        assert mask[y, x] == pytest.approx(expected, abs=1e-6)
    assert mask.max() == 1
