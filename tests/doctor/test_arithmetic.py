import jax
import numpy as np
import pytest

from vit_jax.doctor import arithmetic

DEVICE = jax.devices("cpu")[0]


@pytest.mark.slow
def test_this_machine_computes_what_it_should():
    results = list(arithmetic.check_device(DEVICE))
    # Both dtypes, compiled and not: eight operations and five results of a ViT.
    assert len({(r.check, r.dtype, r.jitted) for r in results}) == len(results) == 2 * 2 * 13
    assert [r for r in results if not r.passed] == []


def failures(kind):
    return {name for name, error in kind("float32", jax.jit) if not error <= 2e-5}


def test_a_wrong_operation_is_found(monkeypatch):
    monkeypatch.setattr(arithmetic, "gelu_tanh", jax.nn.relu)
    monkeypatch.setattr(arithmetic, "NUM_GROUPS", 16)  # of the reference alone
    assert failures(arithmetic._operations) == {"GELU", "GroupNorm"}


def test_a_product_of_weights_of_before_is_found():
    def remembering(function):  # As XNNPACK does, by the address.
        weights = []

        def product(a, w):
            weights.append(np.array(w))
            return function(a, weights[0])

        return product

    assert arithmetic._updated_product("float32", remembering) > 0.5


def test_a_step_that_does_not_learn_is_found(monkeypatch):
    def step(state, batch, **options):
        new, metrics = train_step(state, batch, **options)
        return new.replace(params=state.params), metrics

    train_step = arithmetic.train_step
    monkeypatch.setattr(arithmetic, "train_step", step)
    assert failures(arithmetic._model) == {"ViT, update by AdamW"}


def test_not_a_number_does_not_pass():
    assert not arithmetic.Result("product", "float32", True, float("nan")).passed
