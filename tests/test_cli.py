"""The command line as a whole; what each command does is tested with its module."""

import importlib
import subprocess
import sys

import pytest

import vit_jax
from vit_jax import cli
from vit_jax.errors import nearest

NAMES = ["train", "probe", "evaluate", "predict", "segment", "detect", "restore", "features"]
NAMES += ["convert", "export", "serve", "analyze", "weights", "sweep", "plan", "doctor"]


@pytest.fixture
def vit_jax_command(monkeypatch, capsys):
    """Runs `vit-jax ARGUMENTS...` in this process; returns its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vit-jax", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code, *capsys.readouterr())

    return run


def test_help_lists_every_command_with_what_it_does(vit_jax_command):
    assert list(cli.COMMANDS) == NAMES
    for flags, code in ((["--help"], 0), (["help"], 0), ([], 2)):
        found, output, errors = vit_jax_command(*flags)
        assert (found, errors) == (code, "")
        for name, each in cli.COMMANDS.items():
            assert f"\n  {name}" in output and each.purpose in output


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_says_how_it_was_called(vit_jax_command, name):
    code, output, _ = vit_jax_command(name, "--help")
    assert code == 0
    assert output.startswith(f"usage: vit-jax {name} ")
    assert "%(prog)s" not in output


@pytest.mark.parametrize("name", NAMES)
def test_a_module_that_runs_alone_says_so_in_its_help(name, capsys):
    module = importlib.import_module(cli.COMMANDS[name].module)
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    short = cli.COMMANDS[name].module.removesuffix(".__main__")
    assert capsys.readouterr().out.startswith(f"usage: python -m {short} ")


def test_version(vit_jax_command):
    assert vit_jax_command("--version") == (0, f"vit_jax {vit_jax.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "command 'trian' is unknown: did you mean train?"),
        (["anlayze", "--help"], "command 'anlayze' is unknown: did you mean analyze?"),
        (["xyz"], "command 'xyz' is unknown: use train, probe, evaluate"),
        (["predict", "--chekpoint", "a.npz", "b.png"], "--chekpoint: did you mean --checkpoint?"),
        (["predict", "--topq=3"], "unrecognized arguments: --topq: did you mean --topk?"),
        (["train", "--confg", "digits"], "unrecognized arguments: --confg: did you mean"),
        (["train", "--config", "digits", "--workdri=x"], "did you mean --workdir?"),
        (["train", "--config", "digits", "--config.batch=3"], "did you mean config.batch_size?"),
        (["sweep", "--config", "b16", "--sseds=2"], "did you mean --seeds?"),
        (["weights", "B_17"], "'B_17' is no name of published weights"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_nearest(vit_jax_command, arguments, message):
    code, output, errors = vit_jax_command(*arguments)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ") and message in errors


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (
            "vit_jax.main",
            ["--config=configs/b16.py:finetune,cifar10", "--config.init_from=no.npz"],
        ),
        ("vit_jax.evaluate", ["--checkpoint=no.npz", "--dataset=folder:{}"]),
        ("vit_jax.export", ["--checkpoint=no.npz", "--output={}"]),
    ],
)
def test_a_mistake_of_a_process_is_all_that_it_prints(module, flags, tmp_path):
    flags = [flag.format(tmp_path) for flag in flags]
    command = [sys.executable, "-m", module, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and "no.npz does not exist" in done.stderr


def test_print_config_trains_nothing(vit_jax_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--config.seed=5", "--print_config"]
    code, output, errors = vit_jax_command("train", "--config", "digits", *flags)
    assert (code, errors) == (0, "")
    seed, *_ = [line for line in output.splitlines() if line.startswith("config.seed")]
    assert seed.split() == ["config.seed", "=", "5", "#", "command", "line"]
    assert not list(tmp_path.iterdir())


def test_help_imports_neither_jax_nor_tensorflow():
    code = (
        "import sys; from vit_jax import cli\n"
        f"for name in {NAMES!r}:\n"
        "    assert cli._run([name, '--help']) == 0\n"
        "    found = {'jax', 'tensorflow', 'absl', 'PIL'} & set(sys.modules)\n"
        "    if found: sys.exit(f'{name} imports {found}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_nearest_name_is_one_that_is_like_it():
    assert nearest("evalute", NAMES) == "evaluate"
    assert nearest("zzz", NAMES) is None
