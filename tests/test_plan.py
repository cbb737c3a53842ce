import json
import math
import subprocess

import pytest
from ml_collections import ConfigDict

from vit_jax.config import to_dict
from vit_jax.errors import UserError
from vit_jax.plan import __main__ as command
from vit_jax.plan import compiler, estimate, planning, report
from vit_jax.plan.accelerators import ACCELERATORS, USABLE, parse_target
from vit_jax.recipes import get_config

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "devices"), [("h100", 1), ("h100:8", 8), ("v5e:4x4", 16), ("v5p:2x2x4", 16)]
)
def test_a_target_is_a_kind_and_how_many(text, devices):
    assert parse_target(text).devices == devices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h10:8", "accelerator 'h10' is unknown: did you mean h100?"),
        ("h100:many", "--on 'h100:many' names no number of devices: for example h100:8"),
        ("h100:0", "names no number of devices"),
        ("v5e:16", "names no slice of TPUs: give its shape, for example v5e:4x4"),
        ("v5p", "give its shape, for example v5p:2x2x1"),
    ],
)
def test_a_target_that_is_none_is_told(text, message):
    with pytest.raises(UserError) as error:
        parse_target(text)
    assert message in str(error.value)


def test_every_accelerator_has_its_numbers_and_their_source():
    for name, each in ACCELERATORS.items():
        if name != "cpu":
            assert estimate.flops.peak_flops(each.kind), name
            assert min(each.memory, each.bandwidth, each.links) > 1e9 and each.source, name


def test_collectives_are_counted_with_what_they_leave_a_device():
    text = """
%body.1 (param: (f32[4])) -> (f32[4]) {
  %rs.1 = f32[6]{0} reduce-scatter(%g), channel_id=9
}

%wrapped (p: f32[8]) -> f32[8] {
  ROOT %ar.2 = s32[3]{0} all-reduce(%p), channel_id=7
}

ENTRY %main.5 (a: f32[4]) -> f32[4] {
  %while.1 = (f32[4]) while(%t), condition=%cond, body=%body.1, \\
backend_config={"known_trip_count":{"n":"32"},"known_init_step":{"init":"0","step":"1"}}
  %async = ((f32[8]), f32[8]) async-start(%c), calls=%wrapped
  %ag.1 = bf16[1280,16,80]{2,1,0} all-gather(%p), channel_id=1, dimensions={0}
  ROOT %rs = (f32[160,10]{1,0}, bf16[8]{0}) reduce-scatter(%a, %b), channel_id=2
  %ars = f32[100]{0} all-reduce-start(%c), channel_id=3
  %ags = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%d), channel_id=4
  %agd = f32[16,4]{1,0} all-gather-done(%ags)
  %fusion = f32[5]{0} fusion(%all-reduce.3), kind=kLoop
}
""".replace("\\\n", "")
    assert compiler.collectives(text) == {
        "all-gather": {"count": 2, "bytes": 1280 * 16 * 80 * 2 + 16 * 4 * 4},
        "reduce-scatter": {"count": 32 + 1, "bytes": 32 * 6 * 4 + 160 * 10 * 4 + 8 * 2},
        "all-reduce": {"count": 1 + 1, "bytes": 3 * 4 + 400},
    }


@pytest.mark.parametrize(
    ("name", "epochs", "exaflops"),
    [("ViT-B/16", 7, 224), ("ViT-H/14", 14, 4262)],
)
def test_the_arithmetic_is_that_of_table_6(name, epochs, exaflops):
    config = get_config(name, "pretrain,jft")
    config.duration = f"{epochs} epochs"
    classes, images = estimate.dataset_size(config, 0, 0)
    found = planning.plan(config, classes, images, parse_target("h100:8"), None, mfu=0.5, price=2.0)
    assert found["run"]["exaflops"] == pytest.approx(exaflops, rel=0.025)
    by = found["run"]["by"]["assumed"]
    # All of it at half of 8 * 989 TFLOP/s, and 8 devices at 2 an hour.
    seconds = found["run"]["exaflops"] * 1e18 / (0.5 * 8 * 989e12)
    assert by["days"] == pytest.approx(seconds / 86400, rel=1e-3)
    assert by["cost"] == pytest.approx(seconds / 3600 * 16, rel=1e-3)


def test_memory_is_that_of_the_parameters_and_their_moments():
    config = get_config("ViT-B/16", "pretrain,imagenet2012")
    config.ema_decay = 0.9
    # 86,567,656 as in Table 1, and the hidden layer of the head, 768 * 769.
    size = 4 * (86_567_656 + 768 * 769)
    whole = estimate.describe(config, 1000, 8).memory()
    assert whole["parameters"] == whole["average"] == size
    assert whole["optimizer"] == 2 * size + 2 * 4  # With the counts of two transformations.
    assert whole["batch"] == config.batch_size // 8 * (224 * 224 * 3 + 4)  # uint8, int32
    config.sharding = "fsdp"
    split = estimate.describe(config, 1000, 8).memory()
    assert split["parameters"] == pytest.approx(size / 8, rel=1e-3)


def linear(fixed, each):
    """Stands for a compiler: a constant and so much for each image of a device."""

    def run(config, classes, target):
        assert classes == 1000
        size = fixed + each * config["batch_size"] / target.devices
        run.batches.append(config["batch_size"])
        memory = {"arguments": fixed, "temporaries": size - fixed, "outputs": 0, "code": 0}
        return {"memory": memory, "collectives": {}, "custom_calls": {}, "optimal_seconds": None}

    run.batches = []
    return run


def plan_with(run, **changes):
    config = get_config("ViT-B/16", "pretrain,imagenet2012")
    config.update_from_flattened_dict({"batch_size": 1024, "model.num_layers": 1, **changes})
    target = parse_target("h100:8")
    return planning.plan(config, 1000, 1_281_167, target, run, mfu=0.5, price=None)


@pytest.mark.parametrize(("fixed", "each"), [(2.0, 0.1), (2.0, 0.9), (60, 0.01)])
def test_the_largest_batch_is_the_last_that_fits(fixed, each):
    run = linear(fixed * GIB, each * GIB)
    found = plan_with(run)
    usable = USABLE * ACCELERATORS["h100"].memory / GIB
    largest = math.floor((usable - fixed) / each + 1e-9) * 8
    assert found["largest_batch"]["batch_size"] == largest
    assert found["largest_batch"]["how"] == "compiled"
    assert largest in run.batches
    assert found["fits"] == (fixed + each * 128 <= usable)
    text = report.render({"config": "b16", **found})
    assert ("it fits" in text) == found["fits"]
    assert f"largest batch that fits: {largest:,}, {largest // 8:,} a device" in text


def test_a_batch_that_fits_nowhere_is_told():
    found = plan_with(linear(90 * GIB, GIB))
    assert found["largest_batch"]["batch_size"] == 0
    assert "no batch fits" in report.render({"config": "b16", **found})


def test_every_policy_of_rematerialization_is_compiled_once():
    found = plan_with(linear(GIB, GIB / 100))
    names = list(found["remat"])
    assert len(names) == len(set(names)) >= 2
    assert str(get_config("ViT-B/16").model.remat) in names


@pytest.mark.slow
def test_the_bytes_of_h14_are_those_that_the_compiler_counts():
    """On eight simulated devices; three of its 32 layers, which differ in nothing."""
    config = get_config("ViT-H/14", "pretrain,imagenet2012")
    config.update_from_flattened_dict(
        {"sharding": "fsdp", "batch_size": 8, "model.num_layers": 3, "model.scan_layers": True}
    )
    target = parse_target("cpu:8")
    predicted = sum(estimate.describe(config, 1000, 8).memory().values())
    found = compiler.run(to_dict(config), 1000, target)
    assert found["memory"]["arguments"] == pytest.approx(predicted, rel=0.05)
    assert found["memory"]["temporaries"] > 0
    assert "all-to-all" not in found["collectives"]


def test_without_the_wheels_it_tells_what_needs_none(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "plan.json"
    flags = ["--config", "b16", "--on", "h100:8", "--price", "3", "--json", str(path)]
    assert command.main([*flags, "--config.batch_size=2048"]) == 1
    output, errors = capsys.readouterr()
    assert errors.startswith("error: no compiler for h100:8 is installed: pip install 'jax[cuda12]")
    assert errors.count("\n") == 1
    assert "batch 2,048" in output and "needs the compiler" in output
    found = json.loads(path.read_text())
    assert found["memory"]["parameters"] == 4 * (86_567_656 + 768 * 769)
    assert found["run"]["by"]["roofline"]["cost"] > 0


def test_what_the_data_set_does_not_tell_is_asked_for():
    config = get_config("ViT-B/16", "pretrain,folder:/data/photos")
    with pytest.raises(UserError, match="classes of folder:/data/photos are not known here: add"):
        estimate.dataset_size(config, 0, 0)
    with pytest.raises(UserError, match="add --images N"):
        estimate.dataset_size(config, 12, 0)
    assert estimate.dataset_size(config, 12, 3456) == (12, 3456)


@pytest.mark.parametrize("recipe", ["segmentation", "detection"])
def test_classes_of_images_are_not_taken_for_those_of_pixels_or_objects(recipe):
    config = get_config("ViT-S/16", f"{recipe},cifar10")
    with pytest.raises(UserError, match="classes of cifar10 are not known here: add --classes N"):
        estimate.dataset_size(config, 0, 0)
    assert estimate.dataset_size(config, 4, 50_000)[0] == 4


# ImageNet has 1,281,167 images to train on, CIFAR 50,000, the digits 1,442.
@pytest.mark.parametrize(
    ("dataset", "changes", "images"),
    [
        ("imagenet2012", {}, 1_281_167),
        ("imagenet2012", {"train_split": "train[:99%]"}, 1_268_355),
        ("imagenet2012", {"development": True}, 1_268_355),
        ("imagenet2012", {"train_split": "train[:1000]+train[-24:]"}, 1_024),
        ("cifar10:3.0.2", {"development": True}, 49_000),
        ("cifar100", {"train_split": "train[:98%]", "subset": "10%"}, 4_900),
        ("digits", {"subset": "1000"}, 1_000),
        ("digits", {"development": True}, 1_298),
    ],
)
def test_the_images_are_those_of_the_split(dataset, changes, images):
    config = get_config("ViT-B/16", f"pretrain,{dataset}")
    config.dataset.update(changes)
    assert estimate.dataset_size(config, 0, 0)[1] == images
    assert estimate.dataset_size(config, 0, 77)[1] == 77


@pytest.mark.parametrize("split", ["validation", "train[", "train+test"])
def test_images_of_a_split_that_is_not_known_are_asked_for(split):
    config = get_config("ViT-B/16", "pretrain,cifar10")
    config.dataset.train_split = split
    with pytest.raises(UserError, match="images of cifar10 are not known here: add --images N"):
        estimate.dataset_size(config, 0, 0)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    config = ConfigDict(get_config("ViT-B/16", "pretrain,imagenet2012"))
    with pytest.raises(UserError, match="batch_size 4096 does not divide evenly over 7 devices"):
        estimate.describe(config, 1000, 7)


def refuse(monkeypatch, errors):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=errors)
    monkeypatch.setattr(compiler.subprocess, "run", lambda *_, **__: done)
    return lambda: compiler.run({}, 1000, parse_target("v5e:2x2"))


def test_a_tpu_program_that_does_not_fit_is_told_with_what_it_needs(monkeypatch):
    errors = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
    )
    errors += "hbm. Used 25.50G of 15.75G hbm. Exceeded hbm capacity by 9.75G.\n"
    assert refuse(monkeypatch, errors)() == {"needs": 25.5 * GIB}


def test_another_refusal_is_one_line(monkeypatch):
    errors = 'Traceback (most recent call last):\n  File "x"\nValueError: no such topology\n'
    with pytest.raises(UserError, match="^compiling for v5e:2x2 failed: ValueError: no such topol"):
        refuse(monkeypatch, errors)()


@pytest.mark.parametrize("sharding", ["fsdp", "replicated", "fsdp:2"])
def test_parameters_and_gradients_go_around_a_ring(sharding):
    config = get_config("ViT-B/16", "pretrain,imagenet2012")
    config.update_from_flattened_dict({"sharding": sharding, "model.num_layers": 1})
    described = estimate.describe(config, 1000, 8)
    size = sum(x.size for x in estimate.jax.tree.leaves(described.state.params)) * 2  # 16 bits
    links = estimate.bounds(described, parse_target("h100:8")).links * 450e9
    # In a ring of n a device sends (n - 1) / n of an array to gather it, as much to sum it into its
    # part, twice that to sum it for all. In pairs: 2 * 1/2, and of the half 2 * 3/4 over four.
    expected = {"fsdp": 2 * 7 / 8, "replicated": 2 * 7 / 8, "fsdp:2": 2 * 1 / 2 + 2 * 3 / 4 / 2}
    assert links == pytest.approx(expected[sharding] * size, rel=0.01)
