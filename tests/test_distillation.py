"""Distillation, against Eqs. 2 and 3 of DeiT in PyTorch and NumPy, and through a run."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

from vit_jax import steps, teacher, train
from vit_jax.checkpoints.pretrained import Pretrained, abstract_params, load_pretrained
from vit_jax.config import check_config, take_from_weights
from vit_jax.data.protocols import evaluation
from vit_jax.distillation import Distillation
from vit_jax.errors import UserError
from vit_jax.models import create_model, prediction_defaults
from vit_jax.preparation import prepare, train_batches
from vit_jax.program import create_objective
from vit_jax.sharding import make_mesh
from vit_jax.state import create_optimizer, create_state

from .runs import assert_same_run, read_arrays, read_losses, train_until

NOISE = np.random.default_rng(0)
STUDENT, TEACHER = (NOISE.normal(size=(6, 5)).astype(np.float32) * 3 for _ in range(2))
OF_LABELS = NOISE.uniform(0, 4, 6).astype(np.float32)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def numpy_losses(kind, alpha, temperature):
    """Eqs. 2 and 3, alpha being lambda and 1/2."""
    if kind == "hard":
        taught = -log_softmax(STUDENT)[np.arange(6), TEACHER.argmax(-1)]
    else:
        student, known = log_softmax(STUDENT / temperature), log_softmax(TEACHER / temperature)
        taught = temperature**2 * (np.exp(known) * (known - student)).sum(-1)
    return (1 - alpha) * OF_LABELS + alpha * taught


CASES = [("hard", 0.5, 1.0), ("soft", 0.1, 3.0), ("soft", 1.0, 1.0), ("soft", 0.7, 20.0)]


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_deit(case):
    found = Distillation(*case).loss(*map(jnp.asarray, (OF_LABELS, STUDENT, TEACHER)))
    np.testing.assert_allclose(found, numpy_losses(*case), rtol=1e-5)


@pytest.mark.versions
@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_pytorch(case):
    torch = pytest.importorskip("torch")
    kind, alpha, temperature = case
    student, known = torch.tensor(STUDENT), torch.tensor(TEACHER)
    cross_entropy, kl_div = torch.nn.functional.cross_entropy, torch.nn.functional.kl_div
    if kind == "hard":
        taught = cross_entropy(student, known.argmax(dim=1))
    else:
        # As in deit/losses.py, but for the number of classes that it divides by.
        logs = [torch.nn.functional.log_softmax(x / temperature, dim=1) for x in (student, known)]
        taught = kl_div(*logs, reduction="batchmean", log_target=True) * temperature**2
    expected = (1 - alpha) * OF_LABELS.mean() + alpha * taught.item()
    found = Distillation(*case).loss(*map(jnp.asarray, (OF_LABELS, STUDENT, TEACHER)))
    assert float(found.mean()) == pytest.approx(expected, rel=1e-5)


class TwoHeads:
    """Stands for a model with a distillation token, whose heads are its two parameters."""

    config = SimpleNamespace(distillation_token=True)

    def apply(self, variables, images, *, train, rngs, method=None):
        del train, rngs
        logits = [images @ variables["params"][name] for name in ("head", "head_dist")]
        return tuple(logits) if method == "heads" else (logits[0] + logits[1]) / 2


@pytest.mark.parametrize("parts", [1, 2])
def test_the_distillation_head_learns_from_the_teacher_and_the_other_from_labels(parts):
    images, labels = NOISE.normal(size=(4, 3)).astype(np.float32), np.array([0, 1, 1, 0])
    params = {name: np.float32(NOISE.normal(size=(3, 2)))
              for name in ("head", "head_dist", "teacher")}  # fmt: skip
    known = params.pop("teacher")
    objective = steps.classification(
        TwoHeads(), "softmax", distillation=Distillation("hard", 0.3, 1)
    )
    sgd = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "decay": "all",
           "mu_dtype": "float32", "clip_norm": 0.0}  # fmt: skip
    optimizer = create_optimizer(sgd, lambda count: 1.0)
    state = create_state(params, optimizer, seed=0, average=False)
    batch = {"image": images, "label": labels}
    step = functools.partial(
        steps.train_step, objective=objective, optimizer=optimizer, accumulate_steps=parts,
        teacher=lambda images: images @ known,
    )  # fmt: skip
    after, metrics = jax.jit(step)(state, batch)

    def step(weights, share, targets):
        """One of softmax regression in NumPy."""
        error = np.exp(log_softmax(images @ weights)) - np.eye(2)[targets]
        return weights - share * images.T @ error / 4

    predicted = np.argmax(images @ np.asarray(known), -1)
    expected = {"head": (0.7, labels), "head_dist": (0.3, predicted)}
    for name, arguments in expected.items():
        np.testing.assert_allclose(
            after.params[name], step(np.asarray(params[name]), *arguments), rtol=1e-5, atol=1e-6
        )
    right = np.argmax(images @ np.asarray(params["head"]), -1) == labels
    assert float(metrics["accuracy"]) == right.mean()
    # Evaluated is what both say, of the labels alone.
    found = jax.jit(functools.partial(objective, train=False))(params, batch)
    mean = images @ (np.asarray(params["head"]) + np.asarray(params["head_dist"])) / 2
    np.testing.assert_allclose(found["loss"], -log_softmax(mean)[np.arange(4), labels], rtol=1e-4)


def made(class_names, num_classes=3, **options):
    model = {"architecture": "vit", "patch_size": 4, "hidden_size": 8, "num_layers": 1,
             "mlp_dim": 8, "num_heads": 2, "num_classes": num_classes}  # fmt: skip
    draw = np.random.default_rng(1).standard_normal
    params = jax.tree.map(lambda x: np.float32(draw(x.shape)), abstract_params(model, 8))
    preprocessing = dataclasses.replace(
        evaluation("bit", 8), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    model = prediction_defaults("vit") | model
    loss = options.pop("loss", "softmax")
    return Pretrained(params, model, preprocessing, class_names, loss, "large.npz")


def test_a_teacher_sees_its_own_normalization_and_tells_the_classes_by_their_names(monkeypatch):
    pretrained = made(("iris", "rose", "daisy"))
    monkeypatch.setattr(teacher, "load_pretrained", lambda *_, **__: pretrained)
    found = teacher.load_teacher(
        "large.npz", class_names=["daisy", "iris"], image_size=8, dtype="float32", kind="soft",
        mesh=make_mesh(),
    )  # fmt: skip
    pixels = np.random.default_rng(2).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    images = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    module = create_model(pretrained.model)
    logits = np.asarray(jax.jit(module.apply)({"params": pretrained.params}, np.float32(images)))
    np.testing.assert_allclose(
        jax.jit(found.logits)(found.params, pixels), logits[:, [2, 0]],
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("class_names", "options", "message"),
    [
        (("iris", "rose", "tulip"), {}, "large.npz does not know 1 of the 2 classes of the data "
         "set (daisy): choose a teacher"),
        (None, {}, "large.npz has 3 classes without names, the data set 2: choose a teacher of"),
        (("iris", "rose", "daisy"), {"loss": "sigmoid"}, "trained for the loss sigmoid, so it has "
         "no probabilities of classes that sum to 1: set --config.distillation.kind=hard"),
        ((), {"num_classes": 0}, "large.npz has no head, so it knows no classes"),
    ],
)  # fmt: skip
def test_a_teacher_of_other_classes_is_refused(monkeypatch, class_names, options, message):
    monkeypatch.setattr(teacher, "load_pretrained", lambda *_, **__: made(class_names, **options))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        teacher.load_teacher(
            "large.npz", class_names=["daisy", "iris"], image_size=8, dtype="float32",
            kind="soft", mesh=make_mesh(),
        )  # fmt: skip
    assert str(caught.value).startswith("distillation.teacher: ")


def test_classes_without_names_are_taken_by_their_numbers():
    np.testing.assert_array_equal(teacher.teacher_columns(made(None), ["a", "b", "c"]), [0, 1, 2])


@pytest.mark.parametrize(
    ("class_names", "data_names", "columns"),
    [
        (("Iris", "Rose", "daisy"), ["daisy", "iris"], [2, 0]),
        (("n01440764", "n01443537", "n01484850"), ["goldfish", "tench"], [1, 0]),
        (("crane", "iris", "crane"), ["crane", "iris", "crane"], [0, 1, 2]),
    ],
)
def test_classes_are_the_same_where_they_are_for_predictions(class_names, data_names, columns):
    found = teacher.teacher_columns(made(class_names), data_names)
    np.testing.assert_array_equal(found, columns)


@pytest.mark.parametrize(
    ("class_names", "data_names"),
    [(("0", "1", "2"), ["0", "1"]), (("crane", "iris", "crane"), ["crane", "iris"])],
)
def test_names_that_do_not_tell_a_class_are_refused(class_names, data_names):
    message = "large.npz has 3 classes, the data set 2, and names that are numbers or several"
    with pytest.raises(UserError, match=message):
        teacher.teacher_columns(made(class_names), data_names)


def test_a_teacher_that_is_not_there_is_told_before_anything_is_opened(tiny_config, tmp_path):
    config = tiny_config(**{"dataset.name": "none_such", "distillation.teacher": "/nowhere.npz"})
    with pytest.raises(UserError, match="^distillation.teacher: /nowhere.npz does not exist: give"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_student_with_more_classes_than_the_data_is_refused(tiny_config, tmp_path, finished):
    overrides = {"distillation.teacher": str(finished), "model.num_classes": 12}
    with pytest.raises(UserError, match="model.num_classes is 12 but digits has 10 classes, and a"):
        prepare(tiny_config(**overrides), tmp_path, None)


@pytest.mark.parametrize("of_weights", [{}, {"distillation_token": True}])
def test_a_head_that_learns_from_labels_alone_needs_a_share_of_the_loss(tiny_config, of_weights):
    config = tiny_config(**{"distillation.teacher": "B_16", "distillation.alpha": 1.0})
    config.model.representation_size = 0
    check_config(config)
    config.model.distillation_token = not of_weights or config_dict.placeholder(bool)
    with pytest.raises(UserError, match="config.distillation.alpha is 1, but with a distillation_"):
        if not of_weights:
            check_config(config)
        create_objective(take_from_weights(config, of_weights), num_classes=10)


def test_a_run_learns_from_a_teacher_that_is_in_no_checkpoint(tiny_config, tmp_path, finished):
    config = tiny_config(**{"duration": "3 steps", "distillation.kind": "soft"})
    path = tmp_path / "teacher"
    path.symlink_to(finished)
    config.distillation.teacher = str(path)
    train.train(config, tmp_path / "run")
    prepared = prepare(config, tmp_path, None)
    batch = next(train_batches(prepared, 0))
    pretrained = load_pretrained(finished)
    images = np.float32(batch["image"] / 127.5 - 1)
    logits = jax.jit(create_model(pretrained.model).apply)({"params": pretrained.params}, images)
    known = log_softmax(np.asarray(logits, np.float64) / 3)
    # The student begins with a head of zeros: it holds all ten classes for equally probable.
    divergence = 9 * (np.exp(known) * (known + np.log(10))).sum(-1).mean()
    assert divergence > 1e-6
    expected = 0.5 * np.log(10) + 0.5 * divergence
    assert read_losses(tmp_path / "run")[0] == pytest.approx(expected, rel=1e-5)
    saved = read_arrays(tmp_path / "run", 3)
    assert saved.keys() == read_arrays(finished, 6).keys()
    # Under the same path lies another teacher when the run is to go on.
    path.unlink()
    path.symlink_to(tmp_path / "run")
    (tmp_path / "run/metrics.json").unlink()
    with pytest.raises(UserError, match="run that learned from other weights than those that are"):
        train.train(config, tmp_path / "run")


@pytest.mark.slow
def test_a_run_with_a_teacher_resumes_bit_for_bit(tiny_config, tmp_path, finished):
    config = tiny_config(augment="mixup(0.2)", accumulate_steps=2)
    config.distillation.teacher = str(finished)
    train.train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_until(config, tmp_path / "stopped", step=5)
    train.train(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 6)
