"""The closed form against other solvers, and the whole procedure."""

import subprocess
import sys

import flax.linen as nn
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.evaluation import fewshot
from vit_jax.evaluation.fewshot import parse_shots
from vit_jax.sharding import make_mesh

from ..sources import chosen, tiny_source

# More examples than features, as many as features with the constant one, fewer.
SHAPES = [(50, 7), (8, 7), (7, 7), (5, 60)]


def problem(examples, width, classes=4):
    rng = np.random.default_rng(examples)
    features = rng.normal(rng.normal(size=width), rng.uniform(0.1, 3, width), (examples, width))
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, examples - classes)])
    return features.astype(np.float32), labels


def standardize(features):
    """Support features as the paper's reference feeds them to the solver, in float64."""
    x = features.astype(np.float64)
    x = (x - x.mean(0)) / (x.std(0) + 1e-5)
    return np.concatenate([x, np.full((len(x), 1), 100.0)], axis=1)


def targets(labels, classes=4):
    return 2.0 * np.eye(classes)[labels] - 1.0


@pytest.mark.parametrize(("examples", "width"), SHAPES)
@pytest.mark.parametrize("l2", [2.0**10, 0.5])
def test_the_solution_is_that_of_scikit_learns_ridge(examples, width, l2):
    features, labels = problem(examples, width)
    head = fewshot.fit(features, labels, 4, l2)
    ridge = Ridge(alpha=l2, fit_intercept=False, solver="svd")
    ridge.fit(standardize(features), targets(labels))
    np.testing.assert_allclose(head.kernel, ridge.coef_[:, :-1].T, rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(head.bias, 100 * ridge.coef_[:, -1], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("examples", "width"), SHAPES)
def test_the_solution_satisfies_the_normal_equations(examples, width):
    features, labels = problem(examples, width)
    head = fewshot.fit(features, labels, 4)
    x = standardize(features)
    expected = np.linalg.solve(
        x.T @ x + 1024 * np.eye(width + 1), x.T @ targets(labels)
    )  # lambda = 2^10
    np.testing.assert_allclose(head.kernel, expected[:-1], rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(head.bias, 100 * expected[-1], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("examples", "width"), SHAPES)
def test_rows_can_be_gone_through_in_parts(examples, width, monkeypatch):
    features, labels = problem(examples, width)
    whole = fewshot.fit(features, labels, 4)
    monkeypatch.setattr(fewshot, "_ROWS", 3)
    for one, other in zip(whole, fewshot.fit(features, labels, 4), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12)


def test_a_constant_feature_gets_no_weight():
    features, labels = problem(50, 7)
    features[:, 3] = 0.1
    head = fewshot.fit(features, labels, 4)
    assert head.std[3] == pytest.approx(1e-5)
    np.testing.assert_allclose(head.kernel[3], 0, atol=1e-9)
    assert np.isfinite(head.kernel).all()


def test_one_class_alone_is_always_right():
    head = fewshot.fit(np.ones((3, 2), np.float32), np.zeros(3, int), 1)
    # Targets are all 1: w = 3 * 100 / (3 * 100^2 + 2^10) of the constant feature 100.
    assert head.bias == pytest.approx(100 * 300 / 31024)


class Pixels(nn.Module):
    """The pixels as the representation; a head that few-shot must leave out."""

    num_classes: int = 9

    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        return nn.Dense(self.num_classes)(x) if self.num_classes else x

    def without_head(self):
        return self.clone(num_classes=0)


def accuracies(train, test, shots=(1, 3), batch_size=7, **options):
    run = fewshot.create_fewshot(
        Pixels(),
        train,
        test,
        shots=shots,
        # The crop of the model is not the one that few-shot looks at.
        preprocessing=Preprocessing(14, center_crop=0.5),
        batch_size=batch_size,
        mesh=make_mesh(),
        **options,
    )
    return run({})


def view(pixels):
    """The central 14 of 16 pixels of the squashed image in [-1, 1]: 224 of 256."""
    return (pixels[:, 1:-1, 1:-1].reshape(len(pixels), -1) / 127.5 - 1).astype(np.float32)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_accuracies_are_those_of_ridge_on_the_same_images(batch_size):
    train, train_pixels, _ = tiny_source([20] * 5)
    test, test_pixels, test_labels = tiny_source([6] * 5, seed=1)
    found = accuracies(train, test, batch_size=batch_size)
    for shots in (1, 3):
        expected = []
        for seed in (0, 1, 2):
            ids, labels = chosen(train, shots, seed)
            support = view(train_pixels[ids]).astype(np.float64)
            mean, std = support.mean(0), support.std(0) + 1e-5
            x = np.c_[(support - mean) / std, np.full(len(support), 100.0)]
            ridge = Ridge(alpha=1024.0, fit_intercept=False, solver="svd")
            ridge.fit(x, targets(labels, 5))
            x = np.c_[(view(test_pixels) - mean) / std, np.full(len(test_pixels), 100.0)]
            expected.append(np.mean(ridge.predict(x).argmax(1) == test_labels))
        assert found[shots] == pytest.approx(expected, abs=1e-12)
    assert 0.25 < np.mean(found[3]) < 0.95  # Neither chance nor trivial.


def test_a_small_class_is_reported_once_for_all_seeds():
    lines = []
    train, _, _ = tiny_source([2, 9, 9])
    test, _, _ = tiny_source([3, 3, 3], seed=1)
    accuracies(train, test, shots=(1, 5), report=lines.append)
    (line,) = lines
    assert "1 of 3 classes have fewer than 5 images to learn from (the least has 2)" in line


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("folder:/data/flowers12", "flowers12"),
        ("folder:/data/flowers12/", "flowers12"),
        ("cifar10:3.0.2", "cifar10"),
        ("imagenet2012_subset/1pct:5.*.*", "imagenet2012_subset/1pct"),
    ],
)
def test_short_names(dataset, name):
    assert fewshot.short_name(dataset) == name


@pytest.mark.slow
def test_imagenet_scale_takes_little_memory():
    """10 shots of 1,000 classes with the 1,280 features of ViT-H."""
    program = """
import resource
import numpy as np
from vit_jax.evaluation import fewshot

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

rng = np.random.default_rng(0)
labels = np.tile(np.arange(1000), 10)
features = rng.standard_normal((10_000, 1280), dtype=np.float32)
features[:, :1000] += 3 * np.eye(1000, dtype=np.float32)[labels]
before = peak()
head = fewshot.fit(features, labels, 1000)
x = (features - head.mean) / head.std
print(peak() - before, np.mean((x @ head.kernel + head.bias).argmax(1) == labels))
"""
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    megabytes, accuracy = map(float, output.split())
    assert accuracy > 0.99
    # The features are 51 MB in float32, X in float64 would be 103, Y 80.
    assert megabytes < 400


@pytest.mark.parametrize(
    ("text", "shots"), [("10", (10,)), ("1,5,10,25", (1, 5, 10, 25)), (" 5, 1", (1, 5))]
)
def test_shots(text, shots):
    assert parse_shots(text) == shots


@pytest.mark.parametrize("text", ["", "0", "1,,5", "-1", "5,5", "1.5", "all", "1 5"])
def test_shots_of_another_form_are_refused(text):
    with pytest.raises(UserError, match="are not positive numbers, each once: for example 1,5"):
        parse_shots(text)
