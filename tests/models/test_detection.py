"""The head of a detector: against torchvision's FCOS, and what is made of its outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.dense import dense_features
from vit_jax.models.detection import (
    HEAD,
    PRIOR,
    Cells,
    DetectionHead,
    HeadShape,
    candidates,
    cell_centers,
    detector,
    grid_of_cells,
    multiply_adds,
    scores_and_corners,
    shape_of,
)

TINY = {
    "architecture": "vit",
    "patch_size": 4,
    "hidden_size": 16,
    "num_layers": 1,
    "mlp_dim": 32,
    "num_heads": 2,
    "num_classes": 5,
}
SHAPES = [HeadShape(8, 2, 1), HeadShape(8, 1, 2), HeadShape(12, 3, 4), HeadShape(8, 0, 2)]


def random_params(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def torch_head(params, x, shape):
    """The head in PyTorch, of torchvision's towers: outputs in its order of axes."""
    torch = pytest.importorskip("torch")
    fcos = pytest.importorskip("torchvision.models.detection.fcos")
    convnext = pytest.importorskip("torchvision.models.convnext")
    norm_layer = functools.partial(convnext.LayerNorm2d, eps=1e-6)

    def tensor(array):
        return torch.from_numpy(np.ascontiguousarray(array))

    def fill(layer, name, of_conv=True):
        values = params[name]
        if of_conv:
            layer.weight.data = tensor(values["kernel"].transpose(3, 2, 0, 1))
        else:
            layer.weight.data = tensor(values["scale"])
        layer.bias.data = tensor(values["bias"])

    def norm(name):
        layer = norm_layer(shape.width)
        fill(layer, name, of_conv=False)
        return layer

    def tower(head, name):
        for index in range(shape.layers):
            fill(head.conv[3 * index], f"{name}_{index}")
            fill(head.conv[3 * index + 1], f"{name}_norm_{index}", of_conv=False)
        return head.conv

    x = tensor(x).permute(0, 3, 1, 2)
    if shape.upsample == 1:
        neck = torch.nn.Conv2d(x.shape[1], shape.width, 1)
        neck.weight.data = tensor(params["neck"]["kernel"].T[:, :, None, None])
        neck.bias.data = tensor(params["neck"]["bias"])
        x = norm("neck_norm")(neck(x))
    index = 0
    while f"up_{index}" in params:
        up = torch.nn.ConvTranspose2d(x.shape[1], shape.width, 2, stride=2)
        kernel = params[f"up_{index}"]["kernel"].reshape(-1, 2, 2, shape.width)
        bias = params[f"up_{index}"]["bias"].reshape(2, 2, shape.width)
        up.weight.data, up.bias.data = tensor(kernel.transpose(0, 3, 1, 2)), tensor(0 * bias[0, 0])
        # Ours has a bias for each of the four places.
        tiled = np.tile(bias.transpose(2, 0, 1), (1, x.shape[2], x.shape[3]))
        x = torch.nn.functional.gelu(norm(f"up_norm_{index}")(up(x) + tensor(tiled)))
        index += 1
    options = {"num_convs": shape.layers, "norm_layer": norm_layer}
    classes = params["classes"]["bias"].size
    of_classes = fcos.FCOSClassificationHead(shape.width, 1, classes, **options)
    of_boxes = fcos.FCOSRegressionHead(shape.width, 1, **options)
    fill(of_classes.cls_logits, "classes")
    fill(of_boxes.bbox_reg, "boxes")
    fill(of_boxes.bbox_ctrness, "centerness")
    with torch.no_grad():
        features = tower(of_boxes, "box")(x)
        logits = of_classes.cls_logits(tower(of_classes, "class")(x))
        outputs = logits, of_boxes.bbox_reg(features).exp(), of_boxes.bbox_ctrness(features)
    return [output.permute(0, 2, 3, 1).numpy() for output in outputs]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_head_is_torchvisions(shape):
    x = np.random.default_rng(1).normal(size=(2, 3, 5, 16)).astype(np.float32)
    head = DetectionHead(4, shape)
    params = random_params(head, x)
    logits, distances, centerness = torch_head(params, x, shape)
    with jax.default_matmul_precision("highest"):
        found = head.apply({"params": params}, x)
    rows, columns = 3 * shape.upsample, 5 * shape.upsample
    assert found.logits.shape == (2, rows, columns, 4)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.centerness, centerness[..., 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"classifier": "gap"},
        {"num_registers": 2},
        {"architecture": "hybrid", "patch_size": 2, "resnet_layers": ()},
    ],
)
def test_the_head_is_on_the_patches(extra):
    trunk, shape = create_model({**TINY, **extra}), HeadShape(8, 1, 2)
    model = detector(trunk, shape)
    images = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    params = jax.device_get(model.init(jax.random.key(0), images)["params"])
    of_trunk = {name: x for name, x in params.items() if name != HEAD}
    _, tokens, _ = dense_features(trunk.without_head(), of_trunk, images)
    rows, columns = trunk.config.grid(32, 48)
    patches = np.asarray(tokens)[:, -rows * columns :].reshape(2, rows, columns, 16)
    expected = DetectionHead(5, shape).apply({"params": params[HEAD]}, patches)
    found = model.apply({"params": params}, images)
    assert found.logits.shape == (2, *grid_of_cells(trunk.config, "32x48", 2), 5)
    assert found.distances.shape == (*found.logits.shape[:3], 4)
    for one, same in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, same, rtol=1e-3, atol=1e-5)


def test_nothing_is_probable_before_training():
    model = detector(create_model(TINY), HeadShape(16, 2, 1))
    images = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)
    found = model.init_with_output(jax.random.key(0), images)[0]
    np.testing.assert_allclose(jax.nn.sigmoid(found.logits), PRIOR, rtol=0.5)
    np.testing.assert_allclose(found.distances, 1, rtol=0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_tell_the_shape_of_their_head(shape):
    params = random_params(DetectionHead(7, shape), np.zeros((1, 2, 2, 16), np.float32))
    assert shape_of(flatten_dict(params, sep="/")) == (shape, 7)
    with pytest.raises(UserError, match="detection_head is no head of a detector"):
        shape_of({"boxes/kernel": np.zeros(3)})


@pytest.mark.parametrize("upsample", [1, 2])
def test_its_multiply_adds_are_those_that_xla_counts(upsample):
    wide = {"patch_size": 8, "hidden_size": 64, "mlp_dim": 256, "num_classes": 20}
    model = detector(create_model({**TINY, **wide}), HeadShape(64, 2, upsample))
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    cost = jax.jit(model.apply).lower(variables, images).cost_analysis()
    counted = 2 * 2 * multiply_adds(model, "64x96", 3)
    assert counted == pytest.approx(cost["flops"], rel=0.08)


@pytest.mark.parametrize("upsample", [1, 2])
def test_the_multiply_adds_of_a_narrow_head_are_those_that_xla_counts(upsample):
    """Most of them are those that make the features of a wide trunk narrow."""
    shape, wide = HeadShape(16, 0, upsample), {"hidden_size": 256, "num_classes": 1}
    model = detector(create_model({**TINY, **wide}), shape)
    head, features = DetectionHead(1, shape), jax.ShapeDtypeStruct((2, 8, 12, 256), jnp.float32)
    variables = jax.eval_shape(head.init, jax.random.key(0), features)
    cost = jax.jit(head.apply).lower(variables, features).cost_analysis()
    trunk = model.without_head().config.multiply_adds("32x48", 3)
    counted = 2 * 2 * (multiply_adds(model, "32x48", 3) - trunk)
    assert counted == pytest.approx(cost["flops"], rel=0.08)


def test_cells_have_their_middles_between_their_sides():
    centers = cell_centers((2, 4), (8, 32))
    assert centers.shape == (2, 4, 2)
    np.testing.assert_array_equal(centers[0, :, 0], [4, 12, 20, 28])
    np.testing.assert_array_equal(centers[:, 0, 1], [2, 6])


def drawn_cells(rng, rows=3, columns=4, classes=2):
    return Cells(
        jnp.asarray(rng.normal(size=(2, rows, columns, classes)), jnp.float32),
        jnp.asarray(rng.uniform(0.1, 3, (2, rows, columns, 4)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, rows, columns)), jnp.float32),
    )


def test_candidates_are_the_best_pairs_of_a_cell_and_a_class():
    cells = drawn_cells(np.random.default_rng(0))
    sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))  # noqa: E731
    pairs = []
    for row in range(3):
        for column in range(4):
            for label in range(2):
                probability = sigmoid(cells.logits[1, row, column, label])
                score = (probability * sigmoid(cells.centerness[1, row, column])) ** 0.5
                left, top, right, bottom = np.asarray(cells.distances)[1, row, column] * 8
                x, y = 8 * column + 4, 8 * row + 4
                box = [max(x - left, 0), max(y - top, 0), min(x + right, 32), min(y + bottom, 24)]
                pairs.append((score, label, *box))
    pairs.sort(key=lambda pair: -pair[0])
    for most in (5, 24, 1000):
        found = candidates(cells, (24, 32), most)
        expected = np.array(pairs[:most])
        assert found.scores.shape == (2, min(most, 24))
        np.testing.assert_allclose(found.scores[1], expected[:, 0], rtol=1e-5)
        np.testing.assert_array_equal(found.classes[1], expected[:, 1])
        np.testing.assert_allclose(found.corners[1], expected[:, 2:], rtol=1e-5, atol=1e-5)
    scores, corners = scores_and_corners(cells, (24, 32))
    assert scores.shape == (2, 3, 4, 2) and corners.shape == (2, 3, 4, 4)
    assert float(scores.max()) == float(candidates(cells, (24, 32), 1).scores.max())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"classifier": "map"},
            "model.classifier is 'map', but objective detection has no pool",
        ),
        ({"num_classes": 0}, "model.num_classes is 0: a detector has 1 or more"),
    ],
)
def test_a_model_that_cannot_detect_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        detector(create_model({**TINY, **config}), HeadShape())


def test_a_resnet_has_no_patches_to_detect_on():
    resnet = {"architecture": "resnet", "resnet_layers": (1,), "width_factor": 1}
    with pytest.raises(UserError, match="objective detection is for ViTs and hybrids: a ResNet"):
        detector(create_model({**resnet, "num_classes": 3}), HeadShape())
