import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax.serialization import to_bytes
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints.layouts import POSITIONS
from vit_jax.checkpoints.model_info import ModelInfo, info_path
from vit_jax.checkpoints.pretrained import (
    Pretrained,
    fit_params,
    fold_normalization,
    load_pretrained,
)
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.checkpoints.training import CheckpointStore
from vit_jax.config import to_dict
from vit_jax.data.protocols import Preprocessing, evaluation
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.state import TrainState

SIZES = {"patch_size": 8, "hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 2}
BLOCK = "Transformer/encoderblock_"


def make_params(image_size=16, **options):
    """The official tree of a tiny ViT, every value random."""
    model = create_model({"architecture": "vit", "num_classes": 3, **SIZES, **options})
    images = jnp.zeros((1, image_size, image_size, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)


@pytest.fixture
def params():
    return make_params()


def save_npz(path, params):
    np.savez(path, **flatten_dict(params, sep="/"))
    return path


def save_run(workdir, params, ema_params=None, steps=(1,), metadata=None):
    store = CheckpointStore(workdir, keep=3)
    for step in steps:
        scaled = jax.tree.map(lambda x, step=step: jnp.asarray(x) * step, params)
        state = TrainState(jnp.int32(step), scaled, (), ema_params, jax.random.key(0))
        store.save(step, state, metadata or {"class_names": ["a", "b", "c"]})
        if step == 1:
            store.save_best(step, state, {})
    store.close()


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_an_official_npz_tells_its_architecture(tmp_path, params):
    pretrained = load_pretrained(save_npz(tmp_path / "ViT.npz", params))
    assert_equal_trees(pretrained.params, params)
    assert pretrained.source == str(tmp_path / "ViT.npz")
    assert pretrained.class_names is None and pretrained.loss == "softmax"
    assert pretrained.preprocessing == evaluation("inception", 16)
    expected = {"architecture": "vit", "num_classes": 3, "classifier": "token", **SIZES}
    expected |= {"representation_size": 0, "gelu": "tanh", "layer_norm_epsilon": 1e-6}
    expected |= {"position_embedding": "learned", "position_placement": "stem"}
    expected |= {"layer_scale": 0.0, "num_registers": 0, "mlp": "gelu", "distillation_token": False}
    assert pretrained.model == expected


@pytest.mark.parametrize(
    ("options", "inferred"),
    [
        ({"classifier": "gap"}, {"classifier": "gap"}),
        ({"num_classes": 0}, {"num_classes": 0}),
        ({"representation_size": 12}, {"representation_size": 12}),
    ],
)
def test_what_a_tree_has_and_has_not_tells_the_rest(tmp_path, options, inferred):
    params = make_params(**options)
    pretrained = load_pretrained(save_npz(tmp_path / "a.npz", params))
    assert_equal_trees(pretrained.params, params)
    assert inferred.items() <= pretrained.model.items()


def test_a_pre_training_head_goes_with_the_central_crop_of_pre_training(tmp_path):
    path = save_npz(tmp_path / "a.npz", make_params(representation_size=16))
    assert load_pretrained(path).preprocessing == evaluation("big_vision", 16)


def renamed(flat, **changes):
    def rename(name):
        for old, new in changes.items():
            name = name.replace(old, new)
        return name

    return {rename(name): x for name, x in flat.items()}


def newer_linen(flat):
    return renamed(
        flat,
        LayerNorm_2="LayerNorm_1",
        MultiHeadDotProductAttention_1="MultiHeadDotProductAttention_0",
        MlpBlock_3="MlpBlock_0",
    )


def stacked(flat):
    names = {name.split("/", 2)[2] for name in flat if name.startswith(BLOCK)}
    ends = {name: x for name, x in flat.items() if not name.startswith(BLOCK)}
    layers = {n: np.stack([flat[f"{BLOCK}{i}/{n}"] for i in range(2)]) for n in names}
    return ends | {f"Transformer/encoderblock/{name}": x for name, x in layers.items()}


def big_vision(flat):
    flat = newer_linen(flat)
    positions = flat.pop(POSITIONS)
    return flat | {"pos_embedding": positions}


VARIANTS = {
    "original": lambda flat: flat,
    "newer Linen names": newer_linen,
    "under params/": lambda flat: {f"params/{name}": x for name, x in flat.items()},
    "under opt/target/, beside the optimizer's state": lambda flat: {
        **{f"opt/target/{name}": x for name, x in flat.items()},
        **{f"opt/state/param_states/{name}/grad_ema": x for name, x in flat.items()},
    },
    "top-level pos_embedding": big_vision,
    "stacked layers": lambda flat: stacked(newer_linen(flat)),
    "all at once": lambda flat: {
        f"params/{name}": x for name, x in stacked(big_vision(flat)).items()
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_official_names_is_the_same_tree(tmp_path, params, variant):
    np.savez(tmp_path / "a.npz", **VARIANTS[variant](flatten_dict(params, sep="/")))
    assert_equal_trees(load_pretrained(tmp_path / "a.npz").params, params)


@pytest.mark.parametrize("variant", VARIANTS)
def test_group_norms_of_one_row_are_those_of_hybrids(tmp_path, variant):
    params = make_params(
        image_size=32, architecture="hybrid", resnet_layers=(1,), patch_size=1, hidden_size=8
    )
    flat = VARIANTS[variant](flatten_dict(params, sep="/"))
    norms = [name for name in flat if "/gn" in f"/{name}"]
    assert len(norms) == 2 * 5 * (2 if "opt" in variant else 1)  # gn_root, gn1 to 3, gn_proj
    flat |= {name: flat[name].reshape(1, 1, 1, -1) for name in norms}
    np.savez(tmp_path / "a.npz", **flat)
    pretrained = load_pretrained(tmp_path / "a.npz")
    assert_equal_trees(pretrained.params, params)
    assert pretrained.model["resnet_layers"] == [1] and pretrained.preprocessing.image_size == 32


@pytest.mark.parametrize("image_size", [16, 24])
def test_big_visions_class_token_without_a_position_gets_one_of_zero(tmp_path, image_size):
    flat = big_vision(flatten_dict(make_params(image_size), sep="/"))
    flat["pos_embedding"] = flat["pos_embedding"][:, 1:]
    np.savez(tmp_path / "a.npz", **flat)
    positions = load_pretrained(tmp_path / "a.npz").params
    positions = positions["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_array_equal(positions[:, 1:], flat["pos_embedding"])
    np.testing.assert_array_equal(positions[:, 0], 0)


@pytest.mark.parametrize("where", [".", "checkpoints", "checkpoints/2"])
def test_the_newest_step_of_a_run_is_read_from_any_of_its_directories(tmp_path, params, where):
    save_run(tmp_path, params, steps=(1, 2))
    pretrained = load_pretrained(tmp_path / where)
    assert_equal_trees(pretrained.params, jax.tree.map(lambda x: x * 2, params))
    assert pretrained.source == str(tmp_path / "checkpoints/2")
    assert pretrained.class_names == ("a", "b", "c")


@pytest.mark.parametrize("where", ["best", "checkpoints/1"])
def test_the_best_and_any_named_step_are_read(tmp_path, params, where):
    save_run(tmp_path, params, steps=(1, 2))
    assert_equal_trees(load_pretrained(tmp_path / where).params, params)


def test_a_run_is_read_from_a_relative_path(tmp_path, params, monkeypatch):
    save_run(tmp_path / "run", params)
    monkeypatch.chdir(tmp_path)
    assert_equal_trees(load_pretrained("run").params, params)


def test_the_average_is_read_where_the_run_averaged(tmp_path, params):
    average = jax.tree.map(lambda x: jnp.asarray(x) + 1, params)
    save_run(tmp_path, params, average)
    assert_equal_trees(load_pretrained(tmp_path).params, jax.device_get(average))


def test_a_run_says_itself_what_its_weights_cannot(tmp_path, params, tiny_config):
    overrides = {f"model.{key}": value for key, value in SIZES.items()}
    config = tiny_config(
        **overrides,
        **{
            "model.gelu": "erf",
            "model.layer_norm_epsilon": 1e-5,
            "model.representation_size": 0,
            "dataset.image_size": 16,
            "dataset.protocol": "pretrain",
            "loss": "sigmoid",
        },
    )
    metadata = {"config": to_dict(config), "class_names": ["a", "b", "c"]}
    del metadata["config"]["dataset"]["jpeg_dct"]  # As a run from before this key.
    save_run(tmp_path, params, metadata=metadata)
    pretrained = load_pretrained(tmp_path)
    assert pretrained.model["gelu"] == "erf" and pretrained.model["layer_norm_epsilon"] == 1e-5
    assert pretrained.model["num_classes"] == 3 and "dropout_rate" not in pretrained.model
    assert pretrained.preprocessing == evaluation("pretrain", 16)
    assert pretrained.loss == "sigmoid"


def test_a_damaged_step_is_refused_in_one_line(tmp_path, params):
    save_run(tmp_path, params)
    data = max((p for p in (tmp_path / "checkpoints/1/state").rglob("*") if p.is_file()),
               key=lambda p: p.stat().st_size)  # fmt: skip
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match="checkpoints/1 is damaged: ") as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_that_diverged_is_refused_by_name(tmp_path, params):
    params["head"]["bias"] = np.array([0, np.nan, 0], np.float32)
    save_run(tmp_path, params)
    with pytest.raises(UserError, match="checkpoints/1 has NaN or infinite values in head/bias"):
        load_pretrained(tmp_path)


def test_a_path_that_does_not_exist_says_what_is_accepted(tmp_path):
    with pytest.raises(UserError, match=r"none.npz does not exist: give a run's workdir"):
        load_pretrained(tmp_path / "none.npz")


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint: give"):
        load_pretrained(tmp_path)


def test_a_file_of_other_weights_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **{"conv1/kernel": np.ones(3, np.float32)})
    with pytest.raises(UserError, match=r"has no ViT's parameter names \(conv1/kernel\): give"):
        load_pretrained(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{BLOCK}1/LayerNorm_2/bias": None}, "encoderblock_1/LayerNorm_2/bias is missing"),
        ({"head/bias": None}, "head/kernel is not in the model"),
        ({"extra/kernel": np.ones(2)}, "extra/kernel is not in the model"),
        ({f"{BLOCK}0/LayerNorm_0/scale": np.ones(15)}, r"scale has shape \(15,\), the model \(16,"),
        ({"embedding/kernel": np.ones((8, 8, 16))}, r"embedding/kernel has shape \(8, 8, 16\)"),
        ({f"{BLOCK}0/MlpBlock_3/Dense_0/kernel": None}, "Dense_0/kernel is missing"),
        ({POSITIONS: None}, "pos_embedding is missing or misshapen"),
        ({POSITIONS: np.ones((1, 7, 16))}, "has 7 tokens, which are no square of patches"),
    ],
)
def test_weights_that_are_not_one_whole_vit_are_refused_by_name(tmp_path, params, change, message):
    flat = {**flatten_dict(params, sep="/"), **change}
    np.savez(tmp_path / "a.npz", **{name: x for name, x in flat.items() if x is not None})
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(tmp_path / "a.npz")
    assert str(caught.value).startswith(str(tmp_path / "a.npz"))


def test_an_info_file_says_what_the_file_cannot(tmp_path, params):
    path = save_npz(tmp_path / "a.npz", params)
    info = ModelInfo({"gelu": "erf"}, Preprocessing(16, 0.875), ("x", "y", "z"), "sigmoid")
    info_path(path).write_text(info.to_json())
    pretrained = load_pretrained(path)
    assert pretrained.model["gelu"] == "erf" and pretrained.class_names == ("x", "y", "z")
    assert pretrained.preprocessing == Preprocessing(16, 0.875) and pretrained.loss == "sigmoid"


def test_positions_of_dinov2_are_fitted_to_what_its_folder_shows_if_that_is_no_larger(tmp_path):
    path = save_npz(tmp_path / "a.npz", make_params(layer_scale=0.1, num_classes=0))
    save_pretrained(load_pretrained(path, gelu="erf"), tmp_path / "a", "huggingface")
    (tmp_path / "a/vit_jax.json").unlink()
    processor = json.loads((tmp_path / "a/preprocessor_config.json").read_text())

    def show(height, width):
        size = {"size": {"height": height, "width": width}, "do_center_crop": False}
        (tmp_path / "a/preprocessor_config.json").write_text(json.dumps(processor | size))
        return load_pretrained(tmp_path / "a").params["Transformer"]["posembed_input"]

    for height, width, patches in ((16, 16, 4), (8, 16, 2), (16, 8, 2), (8, 8, 1)):
        assert show(height, width)["pos_embedding"].shape == (1, 1 + patches, 16)
    with pytest.raises(UserError, match=r"has shape \(1, 5, 16\), the model \(1, 10, 16\)"):
        show(24, 24)


def test_a_thousand_classes_are_imagenets_unless_they_have_names(tmp_path):
    path = save_npz(tmp_path / "a.npz", make_params(num_classes=1000))
    names = load_pretrained(path).class_names
    assert (len(names), names[0], names[207]) == (
        1000,
        "n01440764",
        "n02099601",
    )  # Tench, retriever.
    own = tuple(map(str, range(1000)))
    info_path(path).write_text(json.dumps({"class_names": own}))
    assert load_pretrained(path).class_names == own


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "is no readable JSON"),
        ("[]", r"is no readable JSON \(no object\)"),
        ('{"names": []}', "'names' is none of class_names, loss, model, multi_label, prep"),
        ('{"model": {"gleu": "erf"}}', "model.gleu is not a key"),
        ('{"model": {"num_heads": "2"}}', "model.num_heads is '2': it must be of type int"),
        ('{"model": {"architecture": "cnn"}}', "architecture 'cnn' is unknown"),
        ('{"model": {"gelu": "relu"}}', "gelu 'relu' is unknown"),
        ('{"model": 3}', "mend or remove it"),
        ('{"class_names": ["a"]}', "1 class names for 3 classes"),
        ('{"preprocessing": {"size": 3}}', "mend or remove it"),
        ('{"preprocessing": {"image_size": "16"}}', "mend or remove it"),
        ('{"preprocessing": {"image_size": 32}}', "pos_embedding has shape"),
        ('{"loss": "hinge"}', "loss 'hinge' is neither softmax nor sigmoid"),
        ("[" * 100_000, "is no readable JSON"),
    ],
)
def test_a_wrong_info_file_is_one_line(tmp_path, params, document, message):
    path = save_npz(tmp_path / "a.npz", params)
    info_path(path).write_text(document)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(path)
    assert "\n" not in str(caught.value)


def test_overrides_win_over_what_is_read(tmp_path, params):
    path = save_npz(tmp_path / "a.npz", params)
    pretrained = load_pretrained(path, gelu="erf", layer_norm_epsilon=1e-5, num_heads=None)
    assert pretrained.model["gelu"] == "erf" and pretrained.model["layer_norm_epsilon"] == 1e-5
    with pytest.raises(UserError, match="num_heads is 4 by what is said of it, 2 by its shapes"):
        load_pretrained(path, num_heads=4)


def test_heads_that_no_format_tells_are_asked_for(tmp_path, params):
    save_pretrained(
        load_pretrained(save_npz(tmp_path / "a.npz", params)), tmp_path / "b.npz", "timm"
    )
    info_path(tmp_path / "b.npz").unlink()
    with pytest.raises(UserError, match="2 layers, width 16 and MLP width 32 .* give --num_heads"):
        load_pretrained(tmp_path / "b.npz")
    assert_equal_trees(load_pretrained(tmp_path / "b.npz", num_heads=2).params, params)


@pytest.mark.slow
def test_positions_go_from_224_to_384_as_in_the_reference(tmp_path):
    params = make_params(image_size=224, patch_size=16)
    pretrained = load_pretrained(save_npz(tmp_path / "a.npz", params), image_size=384)
    old = params["Transformer"]["posembed_input"]["pos_embedding"]
    new = pretrained.params["Transformer"]["posembed_input"]["pos_embedding"]
    grid = old[0, 1:].reshape(14, 14, -1)
    expected = scipy.ndimage.zoom(grid, (24 / 14, 24 / 14, 1), order=1)  # as the published code
    np.testing.assert_array_equal(new[:, 0], old[:, 0])
    np.testing.assert_allclose(new[0, 1:], expected.reshape(24 * 24, -1), rtol=1e-5, atol=1e-5)
    assert pretrained.preprocessing.image_size == 384


def test_other_channel_statistics_move_into_the_patch_embedding(tmp_path, params):
    path = save_npz(tmp_path / "a.npz", params)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    document = {"preprocessing": {"image_size": 16, "mean": mean, "std": std}}
    info_path(path).write_text(json.dumps(document))
    pretrained = load_pretrained(path)
    pixels = np.random.default_rng(0).uniform(0, 1, (2, 16, 16, 3)).astype(np.float32)
    apply = jax.jit(create_model(pretrained.model).apply)
    expected = apply({"params": params}, (pixels - np.float32(mean)) / np.float32(std))
    folded = apply({"params": fold_normalization(pretrained)}, 2 * pixels - 1)
    np.testing.assert_allclose(folded, expected, rtol=1e-4, atol=1e-4)


def big_vision_s16(**extra):
    """A file as big_vision writes it of its ViT with sincos2d and gap: no positions in it."""
    flat = big_vision(flatten_dict(make_params(classifier="gap"), sep="/"))
    del flat["pos_embedding"]
    return flat | extra


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_big_visions_computed_positions_are_computed(tmp_path, prefix):
    flat = big_vision_s16()
    flat = {f"{prefix}{name}": x for name, x in flat.items()}
    if prefix:
        flat |= {f"opt/{i}/mu/{name}": x for i, name in enumerate(flat) for x in [np.ones(2)]}
    np.savez(tmp_path / "a.npz", **flat)
    pretrained = load_pretrained(tmp_path / "a.npz", image_size=16)
    assert pretrained.model["position_embedding"] == "sincos2d"
    assert pretrained.model["classifier"] == "gap"
    # The same with the positions written out, row by row: sin x, cos x, sin y, cos y.
    omega = 10_000.0 ** -(np.arange(4) / 3)
    table = [
        np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)])
        for y in range(2)
        for x in range(2)
    ]
    written = big_vision_s16(pos_embedding=np.float32(table)[None])
    np.savez(tmp_path / "b.npz", **written)
    learned = load_pretrained(tmp_path / "b.npz")
    assert learned.model["position_embedding"] == "learned"
    images = np.random.default_rng(2).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    logits = [
        jax.jit(create_model(x.model).apply)({"params": x.params}, images)
        for x in (pretrained, learned)
    ]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)
    # Beyer et al. evaluate on the central 224 of 256 pixels.
    usual = load_pretrained(tmp_path / "a.npz").preprocessing
    assert (usual.image_size, usual.center_crop) == (224, 0.875)


def test_positions_in_big_visions_encoder_are_those_of_the_model(tmp_path, params):
    flat = big_vision(flatten_dict(params, sep="/"))
    flat["Transformer/pos_embedding"] = flat.pop("pos_embedding")
    np.savez(tmp_path / "a.npz", **flat)
    assert_equal_trees(load_pretrained(tmp_path / "a.npz").params, params)


@pytest.mark.parametrize("early", [False, True])
def test_big_visions_attention_pooling_is_read(tmp_path, early):
    params = make_params(classifier="map")
    pooling = flatten_dict(params["MAPHead_0"], sep="/")
    flat = big_vision(flatten_dict({k: x for k, x in params.items() if k != "MAPHead_0"}, sep="/"))
    flat |= {name if early else f"MAPHead_0/{name}": x for name, x in pooling.items()}
    assert any("encoderblock_0/MlpBlock_0" in name for name in flat)
    np.savez(tmp_path / "a.npz", **{f"params/{name}": x for name, x in flat.items()})
    pretrained = load_pretrained(tmp_path / "a.npz")
    assert (pretrained.model["classifier"], pretrained.preprocessing.image_size) == ("map", 16)
    assert_equal_trees(pretrained.params, params)
    saved = load_pretrained(save_npz(tmp_path / "b.npz", pretrained.params))  # As it is here.
    assert_equal_trees(saved.params, params)
    assert saved.model == pretrained.model


def test_the_pooling_does_not_pass_for_layers_of_big_vision_without_positions(tmp_path):
    params = make_params(classifier="map", position_embedding="none")
    with pytest.raises(UserError, match="pos_embedding is missing"):
        load_pretrained(save_npz(tmp_path / "a.npz", params))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"params": x, "step": np.int32(3)},
                                  lambda x: {"step": 3, "params": {"params": x}}])  # fmt: skip
def test_what_flax_writes_is_read(tmp_path, params, wrap):
    (tmp_path / "a.msgpack").write_bytes(to_bytes(wrap(params)))
    assert_equal_trees(load_pretrained(tmp_path / "a.msgpack").params, params)


def test_a_head_as_it_begins_knows_no_classes(tmp_path):
    params = make_params()
    params["head"] = {"kernel": np.zeros((16, 3)), "bias": np.full(3, -10.0)}
    pretrained = load_pretrained(save_npz(tmp_path / "a.npz", params))
    with pytest.raises(UserError, match="a.npz has a head of zeros, as before training"):
        pretrained.check_head()
    params["head"]["bias"] = np.arange(3.0)  # Of how often each class is: it was trained.
    load_pretrained(save_npz(tmp_path / "b.npz", params)).check_head()


def test_parameters_are_fitted_to_a_model_without_initializing_it(params):
    module = create_model({"architecture": "vit", "num_classes": 5, **SIZES})
    fitted = fit_params(module, 24, params, old_size=16)
    images = np.zeros((1, 24, 24, 3), np.float32)
    fresh = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    assert jax.tree.map(np.shape, fitted) == jax.tree.map(np.shape, fresh)
    assert not fitted["head"]["kernel"].any()
    assert_equal_trees(fitted["embedding"], params["embedding"])
    with pytest.raises(UserError, match="head/kernel has shape"):
        fit_params(module, 16, params, old_size=16, keep_head=True)


def test_a_model_is_resized_to_images_that_are_no_squares_and_back(tmp_path, params):
    square = load_pretrained(save_npz(tmp_path / "a.npz", params))
    wide = load_pretrained(tmp_path / "a.npz", image_size="24x48")
    before, now = (
        x.params["Transformer"]["posembed_input"]["pos_embedding"][0] for x in (square, wide)
    )
    expected = scipy.ndimage.zoom(before[1:].reshape(2, 2, 16), (1.5, 3, 1), order=1)
    np.testing.assert_allclose(now[1:], expected.reshape(18, 16), atol=1e-6)
    save_pretrained(wide, tmp_path / "wide.npz", "official")
    again = load_pretrained(tmp_path / "wide.npz")
    assert again.preprocessing.image_size == "24x48"
    assert_equal_trees(again.params, wide.params)
    # As many patches in another grid are others; the corners stay in place.
    tall = load_pretrained(tmp_path / "wide.npz", image_size="48x24").params
    moved = tall["Transformer"]["posembed_input"]["pos_embedding"][0, 1:].reshape(6, 3, 16)
    np.testing.assert_allclose(moved[[0, -1]][:, [0, -1]], before[1:].reshape(2, 2, 16), atol=1e-5)
    # Of 6 by 3 patches whose grid nothing tells.
    info_path(tmp_path / "wide.npz").unlink()
    with pytest.raises(UserError, match="19 tokens, which are no square of patches: write"):
        load_pretrained(tmp_path / "wide.npz")
    with pytest.raises(UserError, match="image_size is '24': it must be a whole number from 1"):
        load_pretrained(tmp_path / "a.npz", image_size="24")


@pytest.mark.parametrize("trained", [0.0, 1.0])
def test_a_model_with_two_heads_knows_classes_if_one_does(trained):
    head = {"kernel": np.zeros((16, 3)), "bias": np.zeros(3)}
    params = {"head": head, "head_dist": {**head, "kernel": np.full((16, 3), trained)}}
    found = Pretrained(params, {"architecture": "vit"}, evaluation("bit", 8), None, "softmax", "")
    assert found.has_untrained_head == (trained == 0)
