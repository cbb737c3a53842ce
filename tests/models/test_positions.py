import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.models import create_model, describe
from vit_jax.models.encoder import Encoder, EncoderBlock, MultiHeadSelfAttention
from vit_jax.models.positions import PositionEmbedding, RelativePositionBias, sincos2d

ROWS, COLUMNS, WIDTH, HEADS = 2, 3, 24, 3
PATCHES = ROWS * COLUMNS
TINY = {
    "architecture": "vit",
    "patch_size": 4,
    "hidden_size": WIDTH,
    "num_layers": 2,
    "mlp_dim": 40,
    "num_heads": HEADS,
    "num_classes": 5,
}
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (2, 4 * ROWS, 4 * COLUMNS, 3)).astype(np.float32)


def random_like(shapes):
    return jax.tree.map(lambda x: RNG.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def random_params(module, *args):
    return random_like(jax.eval_shape(module.init, jax.random.key(0), *args)["params"])


def apply(module, params, *args):
    return jax.jit(lambda params: module.apply({"params": params}, *args))(params)


def embedding(kind, has_class=True):
    return PositionEmbedding(kind, (ROWS, COLUMNS), has_class)


@pytest.mark.parametrize("has_class", [True, False])
def test_2d_is_the_column_and_the_row_side_by_side(has_class):
    module = embedding("2d", has_class)
    tokens = jnp.zeros((4, PATCHES + has_class, WIDTH))
    params = random_params(module, tokens)
    x, y = params["pos_embedding_x"], params["pos_embedding_y"]
    assert (x.shape, y.shape) == ((1, COLUMNS, WIDTH // 2), (1, ROWS, WIDTH // 2))
    expected = [np.zeros(WIDTH)] * has_class
    for row in range(ROWS):
        for column in range(COLUMNS):
            expected.append(np.concatenate([x[0, column], y[0, row]]))
    np.testing.assert_array_equal(apply(module, params, tokens), [np.stack(expected)])


def test_sincos2d_is_fixed_and_of_column_then_row():
    module, tokens = embedding("sincos2d"), jnp.zeros((1, 1 + PATCHES, WIDTH))
    variables = module.init(jax.random.key(0), tokens)
    assert not variables
    expected = np.zeros((1 + PATCHES, WIDTH))
    quarter = WIDTH // 4
    for p in range(PATCHES):
        row, column = divmod(p, COLUMNS)
        for i in range(quarter):
            frequency = 1 / 10_000 ** (i / (quarter - 1))
            for part, value in enumerate(
                [
                    np.sin(column * frequency),
                    np.cos(column * frequency),
                    np.sin(row * frequency),
                    np.cos(row * frequency),
                ]
            ):
                expected[1 + p, part * quarter + i] = value  # fmt: skip
    np.testing.assert_allclose(module.apply(variables, tokens), [expected], atol=1e-6)
    assert sincos2d((1, 1), 4).tolist() == [[0, 1, 0, 1]]  # One frequency, no division by 0.


def bias_reference(q, embedding, has_class):
    """One pair of tokens at a time; the embedding of offset o is the one at o + patches - 1."""
    batch, heads, tokens, _ = q.shape
    patches = tokens - has_class
    bias = np.zeros((batch, heads, tokens, tokens))
    for b in range(batch):
        for h in range(heads):
            for i in range(patches):
                for j in range(patches):
                    key = embedding[i - j + patches - 1, h]
                    bias[b, h, i + has_class, j + has_class] = q[b, h, i + has_class] @ key
    return bias


@pytest.mark.parametrize("has_class", [True, False])
def test_relative_is_the_querys_product_with_the_embedding_of_the_offset(has_class):
    module = RelativePositionBias(has_class)
    q = RNG.normal(size=(2, HEADS, PATCHES + has_class, WIDTH // HEADS)).astype(np.float32)
    params = random_params(module, q)
    assert params["rel_embedding"].shape == (2 * PATCHES - 1, HEADS, WIDTH // HEADS)
    expected = bias_reference(q, params["rel_embedding"], has_class)
    np.testing.assert_allclose(apply(module, params, q), expected, atol=1e-5)


def test_relative_logits_are_added_to_those_of_the_content():
    module = MultiHeadSelfAttention(describe(TINY, position_embedding="relative"))
    x = RNG.normal(size=(2, 1 + PATCHES, WIDTH)).astype(np.float32)
    params = random_params(module, x, True)

    def heads(name):
        y = np.einsum("bnd,dhk->bhnk", x, params[name]["kernel"])
        return y + params[name]["bias"][None, :, None]

    logits = np.einsum("bhik,bhjk->bhij", heads("query"), heads("key"))
    logits = logits + bias_reference(heads("query"), params["relative"]["rel_embedding"], 1)
    expected = np.exp(logits / np.sqrt(WIDTH / HEADS))
    expected /= expected.sum(-1, keepdims=True)
    asked = jax.jit(lambda p: module.apply({"params": p}, x, True, mutable="intermediates"))
    _, state = asked(params)
    (weights,) = state["intermediates"]["attention_weights"]
    np.testing.assert_allclose(weights, expected, atol=1e-5)


INPUT, LAYER = "Transformer/posembed_input", "Transformer/encoderblock_{}"
ATTENTION = f"{LAYER}/MultiHeadDotProductAttention_1/relative/rel_embedding"
TREES = [
    ("learned", "stem", {f"{INPUT}/pos_embedding": (1, 7, WIDTH)}),
    ("learned", "shared", {f"{INPUT}/pos_embedding": (1, 7, WIDTH)}),
    (
        "learned",
        "layers",
        {f"{LAYER.format(i)}/posembed/pos_embedding": (1, 7, WIDTH) for i in (0, 1)},
    ),
    ("none", "stem", {}),
    ("sincos2d", "layers", {}),
    ("2d", "stem", {f"{INPUT}/pos_embedding_{x}": (1, n, 12) for x, n in (("x", 3), ("y", 2))}),
    (
        "2d",
        "layers",
        {
            f"{LAYER.format(i)}/posembed/pos_embedding_{x}": (1, n, 12)
            for i in (0, 1)
            for x, n in (("x", 3), ("y", 2))
        },
    ),
    ("relative", "stem", {ATTENTION.format(i): (11, HEADS, 8) for i in (0, 1)}),
]


@pytest.mark.parametrize(("kind", "placement", "expected"), TREES)
def test_nothing_but_the_positions_differs_in_the_tree(kind, placement, expected):
    def shapes(**options):
        model = create_model(TINY, **options)
        params = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
        return {name: x.shape for name, x in flatten_dict(params, sep="/").items()}

    plain = shapes()
    found = shapes(position_embedding=kind, position_placement=placement)
    rest = {name: x for name, x in plain.items() if "posembed" not in name}
    assert found == rest | expected


@pytest.mark.parametrize("kind", ["learned", "2d", "sincos2d"])
@pytest.mark.parametrize("placement", ["stem", "layers", "shared"])
def test_positions_are_added_where_table_8_says(kind, placement):
    config = describe(TINY, position_embedding=kind, position_placement=placement)
    module, where = Encoder(config, (ROWS, COLUMNS)), embedding(kind)
    patches, cls = (
        RNG.normal(size=(batch, tokens, WIDTH)).astype(np.float32)
        for batch, tokens in ((2, PATCHES), (1, 1))
    )
    params = random_params(module, patches, cls, True)
    z = np.concatenate([np.repeat(cls, 2, axis=0), patches], axis=1)
    plain = EncoderBlock(describe(TINY, position_embedding="none"), (ROWS, COLUMNS))
    add = jax.jit(lambda own, z: z + where.apply({"params": own}, z))
    encode = jax.jit(lambda layer, z: plain.apply({"params": layer}, z, True))
    for i in range(2):
        layer = dict(params[f"encoderblock_{i}"])
        own = layer.pop("posembed", {})
        if placement == "layers" or placement == "shared" or i == 0:
            own = own if placement == "layers" else params.get("posembed_input", {})
            z = add(own, z)
        z = encode(layer, z)
    z = np.asarray(z)
    mean, variance = z.mean(-1, keepdims=True), z.var(-1, keepdims=True)
    norm = params["encoder_norm"]
    expected = (z - mean) / np.sqrt(variance + 1e-6) * norm["scale"] + norm["bias"]
    found = apply(module, params, patches, cls, True)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "placement"), [("relative", "stem"), ("2d", "layers"), ("learned", "shared")]
)
def test_remat_and_scan_change_neither_tree_nor_values(kind, placement):
    config = TINY | {"position_embedding": kind, "position_placement": placement}
    plain, other = create_model(config), create_model(config, remat="dots", scan_layers=True)
    params = random_params(plain, IMAGES)
    assert jax.tree.structure(params) == jax.tree.structure(random_params(other, IMAGES))
    expected, actual = (
        jax.jit(model.apply)({"params": params}, IMAGES) for model in (plain, other)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_without_positions_the_order_of_the_patches_is_nothing():
    turned = IMAGES[:, ::-1, ::-1].reshape(2, ROWS, 4, COLUMNS, 4, 3)[:, :, ::-1, :, ::-1]
    turned = turned.reshape(IMAGES.shape)  # The patches are in the opposite order, not turned.
    for kind, same in (("none", True), ("learned", False), ("relative", False), ("2d", False)):
        model = create_model(TINY, position_embedding=kind)
        params = random_params(model, IMAGES)
        call = jax.jit(model.apply)
        logits, other = (call({"params": params}, x) for x in (IMAGES, turned))
        assert np.allclose(logits, other, rtol=1e-3, atol=1e-4) == same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_embedding": "1d"}, "position_embedding '1d' is unknown: use learned, none, 2d"),
        ({"position_placement": "top"}, "position_placement 'top' is unknown: use stem, layers"),
        (
            {"position_embedding": "relative", "position_placement": "shared"},
            "position_placement 'shared' is for embeddings that are added, which 'relative' is not",
        ),
        (
            {"position_embedding": "none", "position_placement": "layers"},
            "which 'none' is not: use stem",
        ),
        (
            {"position_embedding": "sincos2d", "hidden_size": 30, "num_heads": 3},
            "hidden_size 30 is not a multiple of 4, the parts of position_embedding sincos2d",
        ),
        (
            {"position_embedding": "sincos2d", "hidden_size": 26, "num_heads": 2},
            "hidden_size 26 is not a multiple of 4, the parts of position_embedding sincos2d",
        ),
    ],
)
def test_impossible_positions_are_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        create_model(TINY, **options).init(jax.random.key(0), IMAGES)
    assert "\n" not in str(error.value)
