import json

import numpy as np
import pytest

from experiments import masked_patch_prediction as experiment
from vit_jax.config import check_config, to_dict
from vit_jax.data import datasets


@pytest.fixture
def args(tmp_path):
    return experiment.parse_arguments(["--workdir", str(tmp_path)])


def test_both_classifiers_are_trained_alike(args):
    scratch = experiment.classification_config(args)
    finetune = experiment.classification_config(args, init_from="runs/masked")
    for config in (experiment.masked_config(args), scratch, finetune):
        check_config(config)
    assert finetune.init_from == "runs/masked"
    finetune.init_from = ""
    assert to_dict(finetune) == to_dict(scratch)


def test_entropy_is_that_of_the_shares():
    assert experiment.entropy(np.array([5, 0, 5])) == pytest.approx(np.log(2))
    # 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2
    assert experiment.entropy(np.array([20, 10, 10])) == pytest.approx(1.5 * np.log(2))


def test_the_trivial_loss_is_that_of_the_best_constant_prediction(args, data_dir):
    config = experiment.masked_config(args)
    config.dataset.update({"name": "digits", "data_dir": data_dir, "image_size": 8})
    config.model.patch_size = 8
    _, test = datasets.open_dataset("digits", data_dir=data_dir)
    # Patches as large as the image: the mean of 355 gray images, in 8 levels.
    means = []
    for batch in experiment.test_images(config):
        means += [image.mean() for image in batch]
    assert len(means) == test.num_examples == 355
    levels = [sum(mean >= edge for edge in np.arange(-0.75, 1, 0.25)) for mean in means]
    shares = np.array([levels.count(level) for level in set(levels)]) / 355
    expected = -np.sum(shares * np.log(shares))
    assert experiment.trivial_loss(config) == pytest.approx(expected, rel=1e-6)


def test_the_runs_follow_each_other_and_the_table_has_them(args):
    done = []

    def train(config, workdir):
        done.append((workdir.name, config.objective, config.init_from))
        return {"loss": 2.5, "accuracy": {"scratch": 0.25, "finetune": 0.5}.get(workdir.name, 0.1)}

    results = experiment.run(args, train)
    assert done == [
        ("masked", "masked_patches", ""),
        ("finetune", "classification", str(args.workdir / "masked")),
        ("scratch", "classification", ""),
    ]
    rows = experiment.table(results, trivial=4.0).splitlines()
    assert [row.split()[-1] for row in rows] == ["4.0000", "2.5000", "10.00%", "25.00%", "50.00%"]


def test_the_curves_are_drawn(tmp_path):
    for name in ("masked", "finetune", "scratch"):
        (tmp_path / name).mkdir()
        lines = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.0, "eval_accuracy": 0.2}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    experiment.draw(tmp_path, 4.0, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
