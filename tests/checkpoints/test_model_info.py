import dataclasses
import json

from vit_jax.checkpoints.model_info import info_path, read_info_file

from .small_model import INFO


def test_null_leaves_what_is_known_but_takes_class_names_away(tmp_path):
    path = tmp_path / "a.npz"
    nothing = {"preprocessing": None, "loss": None, "class_names": None}
    info_path(path).write_text(json.dumps(nothing))
    assert read_info_file(path, INFO) == dataclasses.replace(INFO, class_names=None)
