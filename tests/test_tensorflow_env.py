import os
import subprocess
import sys

from vit_jax import tensorflow_env


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "")
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS")
    tensorflow_env.quiet()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == "0"


def test_no_command_imports_tensorflow_before_it_can_quiet_it():
    code = (
        "import importlib, sys\n"
        "for name in ('main', 'evaluate', 'export.__main__', 'export.pipeline'):\n"
        "    importlib.import_module(f'vit_jax.{name}')\n"
        "    if 'tensorflow' in sys.modules: sys.exit(f'{name} imports it')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
