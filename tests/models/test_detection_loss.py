"""What cells learn: against plain loops in NumPy, and torchvision's FCOS."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.data.boxes import NO_OBJECT
from vit_jax.models.detection import Cells
from vit_jax.models.detection_loss import (
    Targets,
    assign,
    cell_losses,
    giou,
    image_weight,
)

GRID, IMAGE, CLASSES = (6, 9), (48, 72), 4


def drawn_labels(rng, images=3, rows=7, objects=5):
    """Boxes of all sizes, some on top of others, and rows that are no object."""
    labels = np.zeros((images, rows, 5), np.float32)
    labels[..., 4] = NO_OBJECT
    for image in range(images - 1):  # The last shows nothing.
        begin = rng.uniform(-4, 50, (objects, 2))
        end = begin + rng.uniform(2, 45, (objects, 2))
        labels[image, :objects] = np.column_stack([begin, end, rng.integers(0, CLASSES, objects)])
    labels[0, 1, :4] = labels[0, 0, :4]  # Two of one area: the first is told.
    return labels


def assign_in_a_loop(labels, grid, image):
    """The rule, cell by cell: the index of the object, -1 for none."""
    (rows, columns), (height, width) = grid, image
    tall, wide = height / rows, width / columns
    matched = np.full((len(labels), rows, columns), -1)
    for index, objects in enumerate(labels):
        for row in range(rows):
            for column in range(columns):
                x, y, smallest = (column + 0.5) * wide, (row + 0.5) * tall, np.inf
                for number, (left, top, right, bottom, label) in enumerate(objects):
                    inside = left < x < right and top < y < bottom
                    near = (
                        abs(x - (left + right) / 2) < 1.5 * wide
                        and abs(y - (top + bottom) / 2) < 1.5 * tall
                    )
                    area = (right - left) * (bottom - top)
                    if label >= 0 and inside and near and area < smallest:
                        matched[index, row, column], smallest = number, area
    return matched


def test_cells_tell_the_smallest_object_around_whose_middle_they_lie():
    labels = drawn_labels(np.random.default_rng(0))
    found = jax.device_get(assign(jnp.asarray(labels), GRID, IMAGE))
    matched = assign_in_a_loop(labels, GRID, IMAGE)
    told = matched >= 0
    assert told.sum() > 15 and len(np.unique(matched[0])) > 2
    for image in range(3):
        classes = np.where(told[image], labels[image, matched[image], 4], -1)
        np.testing.assert_array_equal(found.classes[image], classes)
    for image, row, column in np.argwhere(told):
        left, top, right, bottom, _ = labels[image, matched[image, row, column]].astype(float)
        x, y = (column + 0.5) * 8, (row + 0.5) * 8
        distances = np.array([x - left, y - top, right - x, bottom - y])
        np.testing.assert_allclose(found.distances[image, row, column], distances / 8, rtol=1e-4)
        across, down = sorted(distances[::2]), sorted(distances[1::2])
        expected = np.sqrt(across[0] / across[1] * down[0] / down[1])
        assert found.centerness[image, row, column] == pytest.approx(expected, rel=1e-4)


def test_a_grid_of_cells_that_are_no_squares_is_measured_in_their_sides():
    label = jnp.array([[[0.0, 0, 32, 16, 2]]])
    found = jax.device_get(assign(label, (2, 2), (16, 32)))
    np.testing.assert_array_equal(found.classes, [[[2, 2], [2, 2]]])
    np.testing.assert_allclose(found.distances[0, 0, 1], [1.5, 0.5, 0.5, 1.5])


def test_generalized_iou_is_torchvisions():
    torch = pytest.importorskip("torch")
    losses = pytest.importorskip("torchvision.ops").generalized_box_iou_loss
    rng = np.random.default_rng(0)
    first, second = rng.uniform(0.01, 5, (2, 200, 4)).astype(np.float32)

    def corners(distances):
        return torch.from_numpy(distances * np.array([-1, -1, 1, 1], np.float32))

    expected = 1 - losses(corners(first), corners(second)).numpy()
    np.testing.assert_allclose(giou(first, second), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(giou(first, first), 1, rtol=1e-5)


def drawn_cells(rng, images=3):
    shape = (images, *GRID)
    return Cells(
        rng.normal(size=(*shape, CLASSES)).astype(np.float32),
        rng.uniform(0.1, 4, (*shape, 4)).astype(np.float32),
        rng.normal(size=shape).astype(np.float32),
    )


def test_the_losses_are_those_of_torchvisions_fcos():
    torch = pytest.importorskip("torch")
    fcos = pytest.importorskip("torchvision.models.detection.fcos")
    rng = np.random.default_rng(1)
    labels, cells = drawn_labels(rng), drawn_cells(rng)
    matched = assign_in_a_loop(labels, GRID, IMAGE).reshape(3, -1)
    x, y = np.meshgrid(np.arange(9) * 8 + 4.0, np.arange(6) * 8 + 4.0)
    middles = np.stack([x, y, x, y], axis=-1).reshape(-1, 4)
    anchors = torch.from_numpy((middles + [-4, -4, 4, 4]).astype(np.float32))
    targets = []
    for objects in labels:
        there = torch.from_numpy(objects[objects[:, 4] >= 0])
        targets.append({"boxes": there[:, :4], "labels": there[:, 4].long()})
    outputs = {
        "cls_logits": torch.from_numpy(cells.logits.reshape(3, -1, CLASSES)),
        "bbox_regression": torch.from_numpy(cells.distances.reshape(3, -1, 4)),
        "bbox_ctrness": torch.from_numpy(cells.centerness.reshape(3, -1, 1)),
    }
    head = fcos.FCOSHead(32, 1, CLASSES)
    indices = [torch.from_numpy(each) for each in matched]
    expected = head.compute_loss(targets, outputs, [anchors] * 3, indices)
    found = assign(jnp.asarray(labels), GRID, IMAGE)
    losses, weight = cell_losses(cells, found), image_weight(found)
    names = {"classes": "classification", "boxes": "bbox_regression", "centerness": "bbox_ctrness"}
    for ours, theirs in names.items():
        mean = float((losses[ours] * weight).mean())
        assert mean == pytest.approx(expected[theirs].item(), rel=1e-4)


def test_the_sum_over_all_images_does_not_depend_on_how_they_are_divided():
    rng = np.random.default_rng(2)
    labels, cells = drawn_labels(rng, images=4), drawn_cells(rng, images=4)
    whole = assign(jnp.asarray(labels), GRID, IMAGE)
    expected = sum(cell_losses(cells, whole).values()) * image_weight(whole)
    for image in range(4):
        one = slice(image, image + 1)
        part = assign(jnp.asarray(labels[one]), GRID, IMAGE)
        losses = sum(cell_losses(Cells(*(x[one] for x in cells)), part).values())
        np.testing.assert_allclose(losses * image_weight(whole), expected[one], rtol=1e-5)


def test_rows_that_are_no_object_change_nothing():
    rng = np.random.default_rng(3)
    labels, cells = drawn_labels(rng), drawn_cells(rng)
    more = np.zeros((3, 40, 5), np.float32)
    more[..., 4] = NO_OBJECT
    more[:, 30:37] = labels
    first, second = (
        jax.device_get(cell_losses(cells, assign(jnp.asarray(x), GRID, IMAGE)))
        for x in (labels, more)
    )
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    assert first["boxes"][2] == first["centerness"][2] == 0 < first["classes"][2]


def test_gradients_are_finite_and_of_boxes_only_where_there_are_objects():
    rng = np.random.default_rng(4)
    labels, cells = drawn_labels(rng), drawn_cells(rng)
    targets = assign(jnp.asarray(labels), GRID, IMAGE)
    far = cells._replace(distances=cells.distances * 1000)
    for given in (cells, far):
        gradient = jax.grad(lambda x: sum(cell_losses(x, targets).values()).sum())(given)
        told = np.asarray(targets.classes) >= 0
        assert all(np.isfinite(x).all() for x in gradient)
        assert not np.asarray(gradient.distances)[~told].any()
        assert not np.asarray(gradient.centerness)[~told].any()
        assert np.asarray(gradient.logits).all()


def test_images_without_objects_are_weighed_as_with_one():
    nothing = Targets(jnp.full((4, 2, 2), -1), jnp.zeros((4, 2, 2, 4)), jnp.zeros((4, 2, 2)))
    assert image_weight(nothing) == 4
