"""A trace holds the steps that it was asked for, as Perfetto reads them."""

import gzip
import json

import pytest

from vit_jax import train
from vit_jax.errors import UserError
from vit_jax.profiling import parse_steps

from .runs import assert_same_run, train_until


def traced(workdir):
    """The numbers of the steps in each trace of a run."""
    found = []
    for path in sorted(workdir.glob("profile/plugins/profile/*/*.trace.json.gz")):
        assert list(path.parent.glob("*.xplane.pb"))  # What TensorBoard's plugin reads.
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        arguments = [x.get("args", {}) for x in events if x.get("name") == "train"]
        steps = {x["step_num"] for x in arguments if "step_num" in x}
        found.append(sorted(map(int, steps)))
    return found


def test_a_trace_has_its_steps_and_changes_nothing(tiny_config, tmp_path, finished, capsys):
    train.train(tiny_config(), tmp_path / "run", train.Shown(profile="3:4"))
    assert traced(tmp_path / "run") == [[3, 4]]
    assert "traced steps 3 to 4: tensorboard --logdir" in capsys.readouterr().out
    assert_same_run(finished, tmp_path / "run", 6)


def test_a_resumed_run_traces_what_is_left_of_its_window_and_says_so(tiny_config, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train_until(tiny_config(), tmp_path / "run", step=5)
    for profile in ("2:3", "3:5"):
        if profile == "3:5":
            (tmp_path / "run/checkpoints/6").rename(tmp_path / "6")
            (tmp_path / "run/metrics.json").unlink()
        train.train(tiny_config(), tmp_path / "run", train.Shown(profile=profile))
    out = capsys.readouterr().out
    assert "--profile 2:3: the run goes on after step 4, what is traced is nothing" in out
    assert "--profile 3:5: the run goes on after step 4, what is traced is from step 5 on" in out
    assert traced(tmp_path / "run") == [[5]]


@pytest.mark.parametrize("text", ["10", "0:3", "5:4", "a:b", "1:2:3", "-1:2", "٣:٤"])
def test_what_is_no_window_is_told_in_a_line(text):
    with pytest.raises(UserError, match="is not understood: use FIRST:LAST, such as 10:20"):
        parse_steps(text)


def test_steps_that_the_run_does_not_have_are_told_before_it_begins(tiny_config, tmp_path):
    with pytest.raises(UserError, match="--profile 5:7 is beyond the 6 steps of the run"):
        train.train(tiny_config(), tmp_path / "run", train.Shown(profile="5:7"))
    assert not (tmp_path / "run").exists()
