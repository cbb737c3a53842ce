import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax import command as commands
from vit_jax import main, train
from vit_jax.checkpoints.pretrained import abstract_params
from vit_jax.config_files import default_workdir
from vit_jax.models import model_config
from vit_jax.recipes import get_config

from . import prepared

MAIN = [sys.executable, "-m", "vit_jax.main"]
B16 = "configs/b16.py"


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs the command in this process; returns its exit code and what it printed."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["main", *flags])
        with pytest.raises(SystemExit) as end:
            commands.run(main.main)
        return end.value.code, "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config is missing: for example --config digits; known are b16, "),
        (["--config"], "Missing value for flag --config"),
        (["--config", "configs/b17.py"], "config configs/b17.py does not exist"),
        (["--config", "digit"], "did you mean digits? known are b16, b32, "),
        (["--config", f"{B16}:finetun,cifar10"], "recipe 'finetun' is unknown"),
        ([f"--config={B16}", "--config.bacth_size=8"], "did you mean config.batch_size?"),
        (["--config", B16, "--config.eval_every=1"], "config.eval_every is config.evals.val.every"),
        (
            ["--config", B16, "--config.fewshot.dataset=cifar100"],
            "config.fewshot.dataset is config.evals.fewshot.dataset today: set that",
        ),
        (["--config", B16, "--config.base_lr=1"], "did you mean config.schedule.base_lr?"),
        (["--config", B16, "--config.batch_size=big"], "is 'big': it must be of type int"),
        (["--config", B16, "batch_size=8"], "argument 'batch_size=8' is not a flag"),
        (["--confg", B16], "unrecognized arguments: --confg: did you mean --config? (--help lists"),
        ([f"-config={B16}", "--config.bacth_size=8"], "did you mean config.batch_size?"),
        (["--config", B16, "--num_processes=2"], "go together: give all three"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run_main, tmp_path, flags, message):
    code, output = run_main("--workdir", str(tmp_path / "run"), *flags)
    assert code == 2
    assert output.startswith("error: ")
    assert message in output
    assert output.count("\n") == 1
    assert not (tmp_path / "run").exists()


NEED_NO_DATA = [
    (["--config.batch_size=-3"], "config.batch_size is -3: it must be at least 1"),
    (["--config.duration=12 epchs"], "config.duration: duration '12 epchs' is not understood"),
    (["--config.log_every=1 minute"], "config.log_every: duration '1 minute' is not under"),
    (["--config.duration=20 steps"], "schedule.warmup is 500 steps but the run has 20"),
    (
        ["--config.duration=2 epochs", "--config.schedule.warmup=2.5 epochs"],
        "schedule.warmup is 2.5 epochs but the run has 2",
    ),
    (["--config.init_from=/nowhere/a.npz"], "/nowhere/a.npz does not exist: give a run's"),
    ([], "config.init_from must be given"),
    (["--config.duration=20 steps", "--print_config"], "is 500 steps but the run has 20"),
]


def test_mistakes_that_need_no_data_are_told_before_tensorflow_is_imported(tmp_path):
    begin = ["--config", f"{B16}:finetune,cifar10", "--workdir", str(tmp_path / "run")]
    commands = [[*begin, *flags] for flags, _ in NEED_NO_DATA]
    for command_line, (flags, _) in zip(commands, NEED_NO_DATA, strict=True):
        if flags and not any("init_from" in flag for flag in flags):
            command_line.append(f"--config.init_from={tmp_path}")
    code = (
        "import json, sys; from vit_jax import main\n"
        "for flags in json.load(sys.stdin):\n"
        "    try: main.main(flags)\n"
        "    except ValueError as error: print(error)\n"
        "    if 'tensorflow' in sys.modules: sys.exit(f'{flags} import it')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(commands), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    for line, (_, message) in zip(done.stdout.splitlines(), NEED_NO_DATA, strict=True):
        assert message in line
    assert not (tmp_path / "run").exists()


def test_a_config_is_shown_without_the_weights_that_it_asks_for(capsys):
    assert main.main(["--config", f"{B16}:finetune,cifar10", "--print_config"]) == 0
    assert re.search(r"^config.init_from = 'REQUIRED'", capsys.readouterr().out, re.M)


def test_a_number_that_the_weights_would_give_is_given_by_a_flag(run_main, tmp_path):
    model = {"architecture": "vit", "num_classes": 0, **model_config("ViT-Ti/16"), "num_layers": 1}
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract_params(model, 32))
    np.savez(tmp_path / "a.npz", **flatten_dict(params, sep="/"))
    flags = [
        "--config",
        "configs/vit.py:ViT-Ti/16,finetune,cifar10",
        "--workdir",
        str(tmp_path / "run"),
    ]
    flags += [f"--config.init_from={tmp_path / 'a.npz'}", "--config.model.num_layers=1"]
    flags += [f"--config.dataset.data_dir={tmp_path}", "--config.model.layer_norm_epsilon=1e-5"]
    code, output = run_main(*flags)
    *_, error = output.splitlines()
    assert code == 2
    assert error.startswith("error: model.layer_norm_epsilon is 1e-05 but ")
    code, output = run_main(*flags, "--config.model.layer_norm_epsilon=1e-6")
    *_, taken, error = output.splitlines()
    assert taken.endswith(
        "has it: classifier token, gelu tanh, position_embedding learned, position_placement stem"
    )
    assert error.startswith("error: data set 'cifar10' is not prepared")


def test_without_imagenet_it_says_where_it_looked_and_what_to_do(run, tmp_path):
    data = f"--config.dataset.data_dir={tmp_path}"
    code, output = run([*MAIN, "--config", B16, data, "--workdir", str(tmp_path / "run")])
    assert code == 2
    *_, error = output.splitlines()
    assert error.startswith("error: data set 'imagenet2012' is not prepared in data_dir")
    assert str(tmp_path) in error
    assert "download_and_prepare()" in error
    assert "configs/digits.py" in error
    assert "Traceback" not in output


def test_b16_takes_two_real_steps_at_a_reduced_size(tmp_path):
    real = get_config("ViT-B/16")
    real.update_from_flattened_dict(
        {
            "batch_size": 8,
            "duration": "2 steps",
            "schedule.warmup": "1 step",
            "model.num_layers": 2,
            "model.hidden_size": 48,
            "model.mlp_dim": 96,
            "model.representation_size": 48,
        }
    )
    noise = np.random.default_rng(0)
    splits = ("train", "validation")
    examples = {name: prepared.random_examples("imagenet2012", 12, noise) for name in splits}
    prepared.write("imagenet2012", tmp_path / "data", examples)
    real.dataset.data_dir = str(tmp_path / "data")
    final = train.train(real, tmp_path / "run")
    assert (final["step"], final["examples"]) == (2, 12)
    losses = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    # The mean of two steps: the first guesses among 1,000 classes, the second after lr 0.
    assert losses[0]["loss"] == pytest.approx(6.9078, abs=1e-3)


@pytest.mark.parametrize("is_named", [False, True])
def test_a_run_keeps_its_programs_where_it_is_told(
    tiny_config, tmp_path, command, run, monkeypatch, is_named
):
    by_default, named = tmp_path / "cache/xla", tmp_path / "named"
    monkeypatch.setenv("VIT_JAX_CACHE", str(by_default.parent))
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if is_named:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(named))
    config = tiny_config(**{"duration": "2 steps", "schedule.warmup": "1 step"})
    code, output = run(command(config, tmp_path / "run"))
    assert code == 0, output
    kept = [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*train_step*-cache")]
    assert kept == ["named" if is_named else "cache"]
    assert by_default.exists() != is_named


@pytest.mark.parametrize(
    ("name", "workdir"),
    [
        ("configs/b16.py", "runs/b16"),
        ("configs/b16.py:finetune,cifar10", "runs/b16-finetune-cifar10"),
        (
            "configs/b16.py:finetune,folder:/data/my flowers",
            "runs/b16-finetune-folder-data-my-flowers",
        ),
        ("runs/x/config.json", "runs/x"),
    ],
)
def test_the_default_workdir_is_named_after_the_config(name, workdir):
    assert pathlib.Path(default_workdir(name)) == pathlib.Path(workdir)
