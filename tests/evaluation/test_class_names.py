import pytest

from vit_jax.errors import UserError
from vit_jax.evaluation.class_names import match_classes


def test_another_number_of_classes_is_refused():
    with pytest.raises(UserError, match="has 3 classes and the data set 2: fine-tune it first"):
        match_classes(3, None, ("a", "b"))
    with pytest.raises(UserError, match="the checkpoint has no head, so it knows no classes: fine"):
        match_classes(0, None, ("a", "b"))
    numbers = "the data set 2, whose names are numbers and may count others: fine-tune it first"
    with pytest.raises(UserError, match=numbers):
        match_classes(3, ("0", "1", "2"), ("0", "1"))


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
    with pytest.raises(UserError) as error:
        match_classes(len(own), own, data)
    message = str(error.value)
    assert message.startswith(f"class 0 is '{own[0]}' in the checkpoint and '{data[0]}' in the")
    assert advice in message and "\n" not in message
    assert ("--ignore_class_names" in message) == advice.startswith("if ")
