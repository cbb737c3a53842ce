"""Weights of ResNets in the layout of Big Transfer's checkpoints, through all that reads them."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints.conversion import convert
from vit_jax.checkpoints.pretrained import fold_normalization, load_pretrained, resize
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.checkpoints.transfer import transfer
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.recipes import get_config
from vit_jax.train import train

ROOT = "resnet/root_block/standardized_conv2d/kernel"
LAYERS = [2, 1]


def make_arrays(num_classes=3, **options):
    """Big Transfer's names, every value random."""
    model = create_model(
        {"architecture": "resnet", "resnet_layers": LAYERS, "num_classes": num_classes, **options}
    )
    images = np.zeros((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(num_classes)
    draw = {name: rng.standard_normal(x.shape) for name, x in flatten_dict(shapes, sep="/").items()}
    return {name: x.astype(np.float32) for name, x in draw.items()}


def save(path, arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("width_factor", [1, 3])
def test_an_npz_of_bit_tells_its_architecture(tmp_path, width_factor):
    arrays = make_arrays(width_factor=width_factor)
    # What training left beside the weights is passed over.
    others = {"opt/m": np.zeros(2, np.float32)}
    pretrained = load_pretrained(save(tmp_path / "BiT.npz", arrays | others))
    assert pretrained.model == {
        "architecture": "resnet",
        "resnet_layers": LAYERS,
        "width_factor": width_factor,
        "group_norm_epsilon": 1e-5,
        "num_classes": 3,
    }
    # The weights do not tell the image size: it is that of pre-training, and can be given.
    assert pretrained.preprocessing == evaluation("inception", 224)
    loaded = flatten_dict(pretrained.params, sep="/")
    assert loaded.keys() == arrays.keys()
    for name, x in arrays.items():
        np.testing.assert_array_equal(loaded[name], x)


def test_the_image_size_can_be_given_and_changes_no_parameter(tmp_path):
    path = save(tmp_path / "a.npz", make_arrays())
    pretrained = load_pretrained(path, image_size=480)
    assert pretrained.preprocessing == evaluation("inception", 480)
    jax.tree.map(np.testing.assert_array_equal, pretrained.params, load_pretrained(path).params)
    jax.tree.map(np.testing.assert_array_equal, resize(pretrained, 97).params, pretrained.params)


def test_a_thousand_classes_are_those_of_imagenet(tmp_path):
    names = load_pretrained(save(tmp_path / "a.npz", make_arrays(1000))).class_names
    assert (names[0], names[985]) == ("n01440764", "n11939491")


def test_weights_without_a_head_give_features(tmp_path):
    pretrained = load_pretrained(save(tmp_path / "a.npz", make_arrays(0)))
    assert pretrained.model["num_classes"] == 0


def test_converting_writes_the_official_format_and_reads_it_again(tmp_path):
    source = load_pretrained(save(tmp_path / "a.npz", make_arrays()), image_size=40)
    assert convert(source, str(tmp_path / "b.npz"), "official") == (0.0, 0.0)
    with np.load(tmp_path / "b.npz") as file:
        assert set(file.files) == set(make_arrays())


@pytest.mark.parametrize("layout", ["timm", "huggingface"])
def test_other_formats_are_refused(tmp_path, layout):
    source = load_pretrained(save(tmp_path / "a.npz", make_arrays()))
    message = f"the {layout} format is not written for ResNets: use --format official"
    with pytest.raises(UserError, match=message):
        save_pretrained(source, tmp_path / "b", layout)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({ROOT: None}, "has no ViT's parameter names"),
        ({ROOT: np.zeros(3, np.float32)}, "which no ResNet has"),
        ({ROOT: np.zeros((7, 7, 3, 65), np.float32)}, "which no ResNet has"),
        ({"resnet/group_norm/gamma": None}, "resnet/group_norm/gamma is missing"),
        ({"resnet/block2/unit01/c/group_norm/gamma": None}, "do not fit the model"),
        ({"resnet/block1/unit01/a/group_norm/beta": np.zeros(3, np.float32)}, "has shape .3,."),
    ],
)
def test_damaged_weights_are_one_line(tmp_path, change, message):
    arrays = {name: x for name, x in (make_arrays() | change).items() if x is not None}
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(save(tmp_path / "a.npz", arrays))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("override", [{"gelu": "erf"}, {"num_heads": 3}])
def test_what_a_resnet_has_not_cannot_be_overridden(tmp_path, override):
    with pytest.raises(UserError, match="a model of the architecture resnet has no "):
        load_pretrained(save(tmp_path / "a.npz", make_arrays()), **override)


def test_fine_tuning_starts_with_a_new_head(tmp_path):
    old, fresh = (
        load_pretrained(save(tmp_path / f"{n}.npz", make_arrays(n))).params for n in (3, 5)
    )
    params, report = transfer(fresh, old)
    actions = {row.name: row.action for row in report}
    head = {"resnet/head/conv2d/kernel", "resnet/head/conv2d/bias"}
    assert {name for name in actions if actions[name] != "loaded"} == head
    assert {row.action for row in report if row.name in head} == {"new", "dropped"}
    flat, old, fresh = (flatten_dict(tree, sep="/") for tree in (params, old, fresh))
    for name, x in flat.items():
        np.testing.assert_array_equal(x, fresh[name] if name in head else old[name])


def test_other_channel_statistics_are_refused(tmp_path):
    path = save(tmp_path / "a.npz", make_arrays())
    preprocessing = '{"image_size": 224, "mean": [0, 0, 0], "std": [1, 1, 1]}'
    (tmp_path / "a.npz.json").write_text(f'{{"preprocessing": {preprocessing}}}')
    with pytest.raises(UserError, match="others from images in .-1, 1."):
        fold_normalization(load_pretrained(path))


def test_a_resnet_is_trained_and_fine_tuned_from_its_run(data_dir, tmp_path):
    def run(spec, workdir, **changes):
        config = get_config("R50x1", spec)
        config.update_from_flattened_dict(
            {
                "batch_size": 8,
                "duration": "2 steps",
                "schedule.warmup": "1 step",
                "dataset.data_dir": data_dir,
                "dataset.image_size": 8,
                "dataset.protocol": "pad",
                "model.resnet_layers": (1,),
                "model.dtype": "float32",
                **changes,
            }
        )
        return train(config, tmp_path / workdir)

    run("pretrain,digits", "a")
    pretrained = load_pretrained(tmp_path / "a")
    assert pretrained.model["architecture"] == "resnet"
    assert pretrained.preprocessing.image_size == 8
    result = run("finetune,digits", "b", init_from=str(tmp_path / "a"))
    assert result["step"] == 2
