import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints.detector import split_detector
from vit_jax.checkpoints.model_info import ModelInfo
from vit_jax.models.detection import HEAD

from ..detectors import random_detector


def test_the_head_is_taken_out_and_all_else_that_is_known_of_the_trunk_stays():
    pretrained = random_detector(["a", "b", "c"])
    trunk = flatten_dict(pretrained.params, sep="/")
    head = flatten_dict({HEAD: pretrained.detection.params}, sep="/")
    # Neither of these two are told by arrays, and the count between them is of objects.
    model = {**pretrained.model, "gelu": "erf", "position_placement": "layers", "num_classes": 3}
    told = ModelInfo(model, class_names=("a",))
    kept, info, found = split_detector({**trunk, **head}, told)
    assert info == ModelInfo({key: x for key, x in model.items() if key != "num_classes"})
    assert found.class_names == ("a", "1", "2") and found.shape == pretrained.detection.shape
    assert kept.keys() == trunk.keys()
    for name, x in flatten_dict(found.params, sep="/").items():
        np.testing.assert_array_equal(x, head[f"{HEAD}/{name}"])
