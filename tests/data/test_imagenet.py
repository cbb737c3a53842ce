import tensorflow_datasets as tfds

from vit_jax.data.imagenet import classes, readable


def test_ids_and_their_order_are_those_of_tfds():
    assert (
        list(classes())
        == tfds.builder_cls("imagenet2012")(data_dir="/none").info.features["label"].names
    )


def test_names_are_as_everybody_knows_them():
    names = list(classes().values())
    assert len(set(names)) == 1000
    # Indices that are printed in many a tutorial.
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 985: "daisy"}
    known |= {999: "toilet tissue"}
    assert {i: names[i].split(",")[0] for i in known} == known


def test_other_names_stay_as_they_are():
    assert readable("n11939491") == "daisy" and readable("my class") == "my class"
