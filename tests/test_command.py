"""How commands end, in one process."""

import signal

import pytest

from vit_jax import command
from vit_jax.errors import UserError
from vit_jax.signals import Stopped


@pytest.fixture(autouse=True)
def own_signals():
    """An interrupted command leaves SIGINT to the system."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_mistake_in_a_flag_is_one_line_without_the_usage():
    parser = command.Parser(prog="demo")
    parser.add_argument("--batch_size", type=command.positive)
    for flags in [
        ["--batch_size", "0"],
        ["--batch_size", "1.5"],
        ["--batch", "3"],
        ["--batch_size"],
    ]:
        with pytest.raises(UserError) as error:
            parser.parse_args(flags)
        assert "\n" not in str(error.value)
    assert parser.parse_args(["--batch_size", "12"]).batch_size == 12


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [
        (UserError("size 3 is odd: use 4"), 2, "error: size 3 is odd: use 4\n"),
        (UserError("file a\nb is missing"), 2, "error: file a\\nb is missing\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Stopped(), 130, ""),
    ],
)
def test_the_end_of_a_command_is_a_line_and_a_code(raised, code, printed, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as end:
        command.run(main)
    assert (end.value.code, capsys.readouterr().err) == (code, printed)


def test_the_code_that_main_returns_is_that_of_the_process():
    with pytest.raises(SystemExit) as end:
        command.run(lambda: 1)
    assert end.value.code == 1


def test_a_mistake_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command.run(lambda: 1 // 0)
