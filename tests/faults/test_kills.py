"""Killed at any moment, and again, a run ends with the bits of one that never was."""

import pytest

from . import harness
from .harness import CHECKPOINT_EVERY, KEEP, LONG, Fault

START = {
    "import of the loop": Fault("import", r"^vit_jax\.train$"),
    "import of orbax": Fault("import", r"^orbax\.checkpoint$"),
    "first look at an image": Fault("read", r"/data/train/"),
    "config.json is written": Fault("write", r"\.config\.json\."),
    "config.json gets its name": Fault("rename", r"/config\.json$"),
    "checkpoints/ is opened": Fault("line", r"parameters, .* training images"),
    "compile": Fault("line", r"^compiling"),
    "metrics.jsonl gets its name": Fault("rename", r"/metrics\.jsonl$"),
    "event file is opened": Fault("write", r"/events\.out"),
}


def stage(step):
    """The moments in the steps up to a checkpoint, which a run that comes from before it meets."""
    found = {
        f"step {step}": Fault("line", rf"^step {step}/\d+  loss"),
        f"save of {step} begins": Fault("mkdir", rf"checkpoints/{step}\.\S*tmp"),
        f"arrays of {step} are written": Fault("write", rf"checkpoints/{step}\.\S*tmp"),
        f"save of {step} gets its name": Fault("rename", rf"checkpoints/{step}$"),
    }
    if step == 8:
        found |= {
            "evaluation at 6": Fault("read", "/data/test/", nth=2 * 16 + 5),  # 32 at the start
            "best/6 begins": Fault("mkdir", r"best/6\.\S*tmp"),
            "best/6 gets its name": Fault("rename", r"best/6$"),
            "evaluation of the watched set at 8": Fault("line", r"^step 8/.* of watched"),
        }
    if old := max(step - KEEP * CHECKPOINT_EVERY, 0):
        found[f"checkpoint {old} is removed"] = Fault("rmtree", rf"checkpoints/{old}$")
    if step == harness.STEPS:
        found |= {
            "last evaluation": Fault("line", rf"^step {step}/.* of test"),
            "the end is told": Fault("line", r"^best: "),
            "metrics.json is written": Fault("write", r"\.metrics\.json\."),
            "metrics.json gets its name": Fault("rename", r"/metrics\.json$"),
        }
    return found


STAGES = [stage(step) for step in range(4, harness.STEPS + 1, CHECKPOINT_EVERY)]


def draw(chance, moments):
    name = chance.choice(sorted(moments))
    return name, moments[name]


def chain(chance, kills):
    """Moments of which each is met after the one before: one or two of the start, others later."""
    starts = 1 + kills // 5
    stages = sorted(chance.sample(range(len(STAGES)), kills - starts))
    found = [draw(chance, STAGES[index]) for index in stages]
    for _ in range(starts):
        found.insert(chance.randint(0, len(found)), draw(chance, START))
    return found


CHAINS = (
    [("KILL", 5, i) for i in range(4)] + [("TERM", 5, 0), ("INT", 5, 0)]
    if LONG
    else [("KILL", 4, 0), ("TERM", 3, 0), ("INT", 2, 0)]
)


@pytest.mark.parametrize(("name", "kills", "number"), CHAINS)
def test_a_run_ends_as_if_it_had_not_been_killed(
    name, kills, number, chance, train, finishes, reference, row, tmp_path
):
    del number  # The draws differ.
    told = []
    for moment, fault in chain(chance, kills):
        # Now and then it falls into what follows: the middle of a write, another thread's work.
        later = chance.choice([0, 0, chance.uniform(0, 0.02)])
        outcome = train(fault._replace(target=name, amount=later)).end()
        # What TERM and INT save may lie beyond the moment: the run then comes to its end.
        came = outcome.struck or (name != "KILL" and outcome.code == 0)
        assert came, f"{moment} has not come\n{outcome.text}"
        end = harness.assert_ended_by(outcome, name, tmp_path / "run")
        harness.assert_nothing_half_written(tmp_path / "run", reference)
        told.append((moment + (f" + {1000 * later:.0f} ms" if later else ""), end))
        row(name, *told[-1])
        if (tmp_path / "run/metrics.json").exists():
            break
    finishes()
    row(f"after these {len(told)} {name}", "", "bit-identical")
