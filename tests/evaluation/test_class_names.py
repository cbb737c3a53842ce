import pytest

from vit_jax.data.source import Source
from vit_jax.errors import UserError
from vit_jax.evaluation.class_names import explain, label


def refused(num_classes, class_names, data_names):
    source = Source("data", "test", data_names, 0, 0, lambda seed=None: None)
    with pytest.raises(UserError) as error:
        label(source, num_classes, class_names, explain)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_number_of_classes_is_refused():
    assert "has 3 classes and the data set 2: fine-tune it first" in refused(3, None, ("a", "b"))
    no_head = "the checkpoint has no head, so it knows no classes: fine"
    assert no_head in refused(0, None, ("a", "b"))
    numbers = "the data set 2, whose names are numbers and may count others: fine-tune it first"
    assert numbers in refused(3, ("0", "1", "2"), ("0", "1"))


# To ignore names is advised only where positions may agree, and of numbers with a condition.
@pytest.mark.parametrize(
    ("own", "data", "advice"),
    [
        (("Hund", "Katze"), ("dog", "cat"), "if all mean the same, add --ignore_class_names"),
        (("tench", "goldfish"), ("0", "1"), "if the numbers count the same classes in the same "),
        (("0", "1", "10", "2"), ("a", "b", "c", "d"), "give the classes of the data set the names"),
        (("tench, Tinca", "pike"), ("goldfish", "tench"), "and their positions do not agree: give"),
    ],
)
def test_other_names_are_refused_with_what_is_known_of_them(own, data, advice):
    message = refused(len(own), own, data)
    assert message.startswith(f"class 0 is '{own[0]}' in the checkpoint and '{data[0]}' in the")
    assert advice in message
    assert ("--ignore_class_names" in message) == advice.startswith("if ")
