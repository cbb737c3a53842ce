import pytest

from vit_jax.errors import UserError
from vit_jax.export.profiles import Profile, parse_batch


@pytest.mark.parametrize(
    "spec, profiles",
    [
        ("8", [(8, 8, 8)]),
        ("1:8:64", [(1, 8, 64)]),
        ("1,8:32:64", [(1, 1, 1), (8, 32, 64)]),
    ],
)
def test_batch_specifications(spec, profiles):
    assert parse_batch(spec) == tuple(Profile(*sizes) for sizes in profiles)


@pytest.mark.parametrize("spec", ["", "0", "1:8", "8:1:64", "1:64:8", "a", "1:8:64,", "-1", "1.5"])
def test_a_wrong_batch_specification_is_named(spec):
    with pytest.raises(UserError, match="1:8:64"):
        parse_batch(spec)
