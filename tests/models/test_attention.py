import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import attention, create_model

TINY = {
    "architecture": "vit",
    "patch_size": 4,
    "hidden_size": 32,
    "num_layers": 2,
    "mlp_dim": 40,
    "num_heads": 2,
    "num_classes": 5,
    "dtype": "bfloat16",
}
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("


def random(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype))


def exact(q, k, v, dy):
    """Eqs. 6 and 7 and the gradients of sum(dy * y) in float64, one image and head at a time."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    y, dq, dk, dv = (np.zeros_like(q) for _ in range(4))
    for at in np.ndindex(q.shape[0], q.shape[2]):
        i, j = (at[0], slice(None), at[1]), q.shape[-1] ** -0.5
        weights = np.exp(q[i] @ k[i].T * j)
        weights /= weights.sum(-1, keepdims=True)
        y[i], dv[i] = weights @ v[i], weights.T @ dy[i]
        d_weights = dy[i] @ v[i].T
        jacobians = np.einsum("tp,pq->tpq", weights, np.eye(len(weights)))
        jacobians = jacobians - np.einsum("tp,tq->tpq", weights, weights)
        d_logits = np.einsum("tpq,tq->tp", jacobians, d_weights) * j
        dq[i], dk[i] = d_logits @ k[i], d_logits.T @ q[i]
    return y, dq, dk, dv


def value_and_gradients(attend, q, k, v, dy):
    """The value, and the gradients of sum(dy * y) by q, k and v."""

    @jax.jit
    def both(q, k, v, dy):
        y, pullback = jax.vjp(attend, q, k, v)
        return y, *pullback(dy)

    return both(q, k, v, dy)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_value_and_gradients_are_those_of_float64(dtype, tolerance):
    q, k, v, dy = (random(2, 7, 3, 8, dtype=dtype, seed=i) for i in range(4))
    both = value_and_gradients(attention.attend, q, k, v, dy)
    for found, right in zip(both, exact(q, k, v, dy), strict=True):
        assert found.dtype == dtype
        found = np.asarray(found, np.float64)
        np.testing.assert_allclose(found, right, rtol=0, atol=tolerance * np.abs(right).max())


@pytest.fixture
def by_xla(monkeypatch):
    """The kernel's place is taken by JAX's own form; returns the numbers of tokens it is given."""
    given = []

    def attend(q, k, v, *, implementation, **lengths):
        assert implementation == "cudnn"
        given.append(q.shape[1])
        return plain_attention(q, k, v, implementation="xla", **lengths)

    plain_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    return given


@pytest.mark.parametrize("tokens", [6, 7])
def test_the_kernel_is_given_an_even_number_of_tokens_and_their_true_number(tokens, by_xla):
    q, k, v, dy = (random(2, tokens, 3, 8, seed=i) for i in range(4))
    attend = functools.partial(attention._attend_by_cudnn, count=tokens)
    both = value_and_gradients(attend, q, k, v, dy)
    for found, right in zip(both, exact(q, k, v, dy), strict=True):
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-5 * np.abs(right).max())
    assert by_xla == [tokens + tokens % 2]


@pytest.mark.usefixtures("by_xla")
@pytest.mark.parametrize("form", [attention._attend_plainly, attention._attend_by_cudnn])
def test_a_token_that_only_makes_their_number_even_changes_nothing(form):
    q, k, v, dy = (random(2, 8, 3, 8, seed=i) for i in range(4))
    dy[:, 7] = 0  # Nobody reads what it gets.
    found = value_and_gradients(functools.partial(form, count=7), q, k, v, dy)
    expected = exact(*(x[:, :7] for x in (q, k, v, dy)))
    for x, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(x[:, :7], right, rtol=0, atol=1e-5 * np.abs(right).max())
    for gradient in found[1:]:
        assert not gradient[:, 7].any()


@pytest.fixture
def cudnn(monkeypatch):
    """As on a machine with JAX's CUDA packages; lowering for a GPU needs no more of them."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    attention.has_kernel.cache_clear()
    yield
    attention.has_kernel.cache_clear()


def gradient_for(platform, *, train=True, mutable=False, size=(8, 12), **options):
    """The program of a model's gradient for a platform, which need not be here."""
    model = create_model(TINY, **options)
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(variables, images):
        rngs = {"dropout": jax.random.key(0)}
        y = model.apply(variables, images, train=train, rngs=rngs, mutable=mutable)
        return (y[0] if mutable else y).sum()

    lowered = jax.jit(jax.grad(loss)).trace(variables, images)
    return lowered.lower(lowering_platforms=(platform,)).as_text().replace("@", "").replace('"', "")


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("remat", ["nothing", "dots", "everything"])
@pytest.mark.parametrize(  # 7 and 10 tokens.
    ("size", "scan_layers", "layers"), [((8, 12), False, 2), ((12, 12), True, 1)]
)
def test_for_a_gpu_every_layer_is_fused_in_both_directions(remat, size, scan_layers, layers):
    program = gradient_for("cuda", remat=remat, size=size, scan_layers=scan_layers)
    recomputed = 2 if remat == "everything" else 1
    assert program.count(FORWARD) == recomputed * layers
    assert program.count(BACKWARD) == layers
    # Of the other form nothing is left: what there is belongs to the MLPs' GELU.
    assert all("x40x" in line for line in program.splitlines() if "exponential" in line)


@pytest.mark.usefixtures("cudnn")
def test_for_a_gpu_tokens_are_made_even_once_and_keep_their_layout():
    program = gradient_for("cuda", size=(8, 12), remat="nothing")  # 7 tokens.
    assert "custom_call LayoutConstraint(" in program
    assert "tensor<2x8x2x16xbf16>" in program and "tensor<2x7x2x16xbf16>" not in program
    # Queries, keys and values are products of their own, not parts of one.
    assert "x96xbf16>" not in program


@pytest.mark.usefixtures("by_xla")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remat": "nothing"},
        {"remat": "everything"},
        {"scan_layers": True},
        {"classifier": "gap", "position_embedding": "none"},
        {"position_placement": "layers"},
        {"position_placement": "shared"},
        {"num_registers": 2, "stochastic_depth": 0.5},
        {"architecture": "axial_vit", "classifier": "gap"},
    ],
    ids=str,
)
def test_a_model_is_the_same_function_with_tokens_made_ready_for_the_kernel(options, monkeypatch):
    model = create_model({**TINY, "dtype": "float32"}, **options)
    images, rngs = random(3, 8, 12, 3), {"dropout": jax.random.key(1)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    params = jax.tree.map(lambda x: 0.3 * random(*x.shape), shapes)["params"]

    def both():
        def loss(params):
            return jnp.square(model.apply({"params": params}, images, train=True, rngs=rngs)).sum()

        logits = model.apply({"params": params}, images)
        return logits, *jax.jit(jax.value_and_grad(loss))(params)

    plain = both()
    monkeypatch.setattr(attention, "has_kernel", lambda _shape, _dtype: True)
    largest = max(
        np.abs(x).max() for x in jax.tree.leaves(plain[2])
    )  # Some are 0 but for rounding.
    for found, right in zip(*map(jax.tree.leaves, (both(), plain)), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize(
    ("platform", "options"),
    [
        ("cpu", {}),
        ("cuda", {"dtype": "float32"}),
        ("cuda", {"position_embedding": "relative"}),
        ("cuda", {"attention_dropout_rate": 0.1}),
        ("cuda", {"mutable": ["intermediates"]}),
        ("cuda", {"num_heads": 8}),  # Of 4 features each, which are too few for the kernel.
        ("cuda", {"architecture": "axial_vit", "classifier": "gap"}),
    ],
)
def test_elsewhere_the_form_of_the_equations_stays(platform, options):
    program = gradient_for(platform, num_layers=1, **options)
    assert "cudnn" not in program and "exponential" in program


@pytest.mark.usefixtures("cudnn")
def test_attention_dropout_keeps_nobody_from_the_kernel_in_evaluation():
    program = gradient_for("cuda", num_layers=1, train=False, attention_dropout_rate=0.1)
    assert FORWARD in program


def test_without_cudnn_there_is_no_kernel(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", missing)
    attention.has_kernel.cache_clear()
    # Of a size that nothing was traced for: JAX keeps what it has traced.
    assert "cudnn" not in gradient_for("cuda", size=(12, 16))
    attention.has_kernel.cache_clear()


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize(
    ("capabilities", "has_kernel"),
    [
        (["8.0"], True),  # A100
        (["9.0"], True),
        (["12.0"], True),
        (["7.5"], False),  # T4
        (["7.0", "8.0"], False),  # One program is for all devices.
        (["gfx942"], True),  # Not NVIDIA's: what the program has for it is another branch.
        ([None], True),  # A CPU, as when one compiles for a GPU elsewhere.
    ],
)
def test_a_gpu_before_the_a100_has_no_kernel(capabilities, has_kernel, monkeypatch):
    devices = [
        types.SimpleNamespace() if x is None else types.SimpleNamespace(compute_capability=x)
        for x in capabilities
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert attention.has_kernel((2, 8, 4, 64), jnp.dtype(jnp.bfloat16)) == has_kernel


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float16", "bfloat16", "float32"])
def test_the_kernel_is_for_sixteen_bits(dtype):
    expected = dtype in ("float16", "bfloat16")
    assert attention.has_kernel((2, 8, 4, 64), jnp.dtype(dtype)) == expected


def test_weights_that_are_asked_for_are_those_that_the_values_are_mixed_with():
    model = create_model(TINY, dtype="float32", num_layers=1)
    images = random(2, 8, 12, 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda x: 0.3 * random(*x.shape), shapes)
    logits, state = jax.jit(functools.partial(model.apply, mutable="intermediates"))(
        variables, images
    )
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), logits, atol=1e-5)
    block = state["intermediates"]["Transformer"]["encoderblock_0"]
    (weights,) = block["MultiHeadDotProductAttention_1"]["attention_weights"]
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
