import json

import pytest

from vit_jax.config import check_config, migrate, to_dict
from vit_jax.config_files import load
from vit_jax.errors import UserError
from vit_jax.image_size import in_words, of_sides, sides, size_problem
from vit_jax.program import abstract_batch
from vit_jax.sharding import make_mesh

FLAG = "--config.dataset.image_size"


def test_a_size_is_a_number_or_two():
    assert (sides(224), sides("224x320")) == ((224, 224), (224, 320))
    assert (of_sides(8, 8), of_sides(8, 16), in_words("8x16")) == (8, "8x16", "8 x 16")
    for value in (0, True, 8.0, "8", "8X16", "08x16", "0x8", "8x-8", (8, 16), "8x10001", "８x16"):
        assert "it must be a whole number from 1 to 10000, or two as" in size_problem(value)
    assert size_problem("8x8") == "is '8x8': of a square it is one number, 8"
    assert size_problem(8) is size_problem("8x16") is None


@pytest.mark.parametrize("flags", [[f"{FLAG}=8x16"], [FLAG, "8x16"]])
def test_a_config_takes_either(flags, tmp_path):
    config = load("digits", flags).config
    check_config(config)
    assert config.dataset.image_size == "8x16"
    assert abstract_batch(config, make_mesh())["image"].shape[1:] == (8, 16, 3)
    saved = to_dict(config)
    assert migrate(saved)["dataset"]["image_size"] == "8x16"
    path = tmp_path / "config.json"
    path.write_text(json.dumps(saved))
    assert load(str(path)).config.dataset.image_size == "8x16"
    again = load(str(path), [FLAG, "8"]).config.dataset.image_size
    assert (again, type(again)) == (8, int)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("8x17", "image_size 8x17 is not a multiple of patch_size 2: use 8x16 or 8x18"),
        ("8x", "config.dataset.image_size is '8x': it must be a whole number from 1 to 10000, or"),
        ("8x8", "config.dataset.image_size is '8x8': of a square it is one number, 8"),
    ],
)
def test_a_wrong_size_is_one_line(size, message):
    with pytest.raises(UserError) as caught:
        check_config(load("digits", [f"{FLAG}={size}"]).config)
    assert message in str(caught.value) and "\n" not in str(caught.value)
