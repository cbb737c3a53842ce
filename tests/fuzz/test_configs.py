"""Every description of a run or a model that comes as text: sound, or one line."""

import json
import pathlib

import pytest
from flax.traverse_util import flatten_dict
from hypothesis import strategies as st

from vit_jax import config_files, recipes
from vit_jax.checkpoints import foreign_configs
from vit_jax.checkpoints.model_info import ModelInfo, info_from_run, read_info_file
from vit_jax.config import check_config, to_dict
from vit_jax.image_size import sides
from vit_jax.models import describe

from ..checkpoints.small_model import INFO, MODEL

VIT = str(pathlib.Path(__file__).parents[2] / "configs/vit.py")
RUN = to_dict(recipes.get_config("ViT-B/16", "pretrain,digits"))

WORDS = [
    *("", "gelu", "16", "5 steps", "7 epochs", "10%", "fsdp", "data:4", "strong1", "vit", "adam"),
    *("randaugment(2,10)+mixup(0.2)", "1,5", "REQUIRED", "objective", "sgd", "resnet", "hybrid"),
    *("é\n", "\x1b[2J", "\0", "\ud800", "9" * 5000, "_", "1_0", "٣ steps", "nan", "1e999", "(1,)"),
]
NUMBERS = st.one_of(
    st.integers(-3, 1000),
    st.sampled_from([2**31, 2**40, -(2**70), 2**70, 10**400, 1e308, -1e308, 1e-300]),
    st.floats(),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from(WORDS), st.text(max_size=9))
KEYS = st.one_of(
    st.sampled_from([*RUN, *RUN["model"], "height", "shortest_edge", "0", "a.b", "__class__", ""]),
    st.text(max_size=6),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=6,
)


def changed(document):
    """Documents with some values replaced, removed or added, at any depth."""
    places = [*flatten_dict(document), *((key,) for key in document)]

    def change(changes):
        result = json.loads(json.dumps(document))
        for path, act, key, value in changes:
            parent = result
            for name in path[:-1]:
                parent = parent.get(name) if isinstance(parent, dict) else None
            if not isinstance(parent, dict):
                continue
            if act == "remove":
                parent.pop(path[-1], None)
            else:
                parent[path[-1] if act == "replace" else key] = value
        return result

    act = st.sampled_from(["replace", "replace", "remove", "add"])
    step = st.tuples(st.sampled_from(places), act, KEYS, VALUES)
    return st.lists(step, max_size=3).map(change)


def text_of(documents):
    """Their JSON, sometimes damaged."""
    written = st.one_of(documents, VALUES).map(lambda x: json.dumps(x).encode())
    nested = st.builds(
        lambda opening, n: opening * n, st.sampled_from([b"[", b'{"a":']), st.just(10**5)
    )

    def damage(text, at, junk):
        at %= len(text) + 1
        return text[:at] + junk + text[at + 1 :]

    damaged = st.builds(damage, written, st.integers(0, 10**4), st.binary(max_size=3))
    return st.one_of(written, written, damaged, nested)


def complete(info):
    """Describes the model, as far as what the shapes of weights tell is missing."""
    if info.model["architecture"] == "vit":
        describe({**MODEL, **{key: x for key, x in info.model.items() if x is not None}})


def test_run_configs(fuzz):
    def read(path):
        check_config(config_files.load(str(path)).config)

    fuzz("run_config", text_of(changed(RUN)), read, sound=[json.dumps(RUN).encode()], name="c.json")


def test_configs_in_checkpoints(fuzz):
    def read(path):
        try:
            metadata = json.loads(path.read_text())
        except (ValueError, RecursionError):  # Of a damaged document the reader is another.
            return
        if isinstance(metadata, dict):
            complete(info_from_run({"config": metadata, "class_names": ["a", "b"]}))

    fuzz("run_metadata", text_of(changed(RUN)), read, sound=[json.dumps(RUN).encode()])


def folders(format):
    files = foreign_configs.config_files(INFO, format)
    drawn = {name: text_of(changed(document)) for name, document in files.items()}
    sound = {name: json.dumps(document).encode() for name, document in files.items()}
    return st.fixed_dictionaries(drawn), sound


@pytest.mark.parametrize("format", ["huggingface", "timm"])
def test_foreign_configs(fuzz, format):
    strategy, sound = folders(format)
    told = {
        "huggingface": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32},
        "timm": {"embed_dim": 16, "depth": 1, "num_classes": 3, "mlp_ratio": 2.0},
    }[format]

    def read(folder):
        info = foreign_configs.read_folder(folder, format, MODEL, 16)
        assert max(sides(info.preprocessing.image_size)) <= 10_000
        document = json.loads((folder / "config.json").read_text())
        document = document if format == "huggingface" else document.get("model_args") or {}
        # What contradicts the shapes is refused.
        assert all(document.get(key) in (None, 0, x) for key, x in told.items())

    fuzz(f"{format}_config", strategy, read, sound=[sound])


def test_info_files(fuzz):
    document = json.loads(INFO.to_json())

    def read(path):
        complete(read_info_file(path.parent, ModelInfo({"architecture": "vit"})))

    fuzz(
        "info_file",
        text_of(changed(document)),
        read,
        sound=[json.dumps(document).encode()],
        name="vit_jax.json",
    )


FLAG_KEYS = st.one_of(
    st.sampled_from([*flatten_dict(RUN, sep="."), "evals.x.type", "evals.x.every", "model", "a"]),
    st.text(st.characters(exclude_characters="\n="), max_size=8),
)
FLAG_VALUES = st.one_of(
    VALUES.map(str),
    st.sampled_from(["[" * 5000, "((((", "-" * 100 + "1", "1" + "+1" * 5000, "True", "none"]),
    st.text(max_size=12),
).map(lambda text: text.replace("\n", " "))
FLAG = st.builds("--config.{}{}{}".format, FLAG_KEYS, st.sampled_from(["=", "\n", ""]), FLAG_VALUES)
COMMANDS = st.builds(
    lambda name, flags: "\n".join([name, *flags]),
    st.sampled_from(["digits", "b16:finetune,cifar10", "vit:R50x1"]),
    st.lists(FLAG, max_size=3),
)


def test_overrides(fuzz):
    def read(text):
        name, *flags = text.split("\n")
        loaded = config_files.load(name, flags)
        check_config(loaded.config, may_lack=True)
        config_files.explain(loaded)

    fuzz("overrides", COMMANDS, read, sound=["digits\n--config.seed=1", "vit:R50x1"])


SPEC_WORDS = st.one_of(
    st.sampled_from(
        [
            *("b16", "digits", "vit", "ViT-B/16", "R50x1", "R50+ViT-B/16", "Axial-ViT-B/16", "dev"),
            *("ViT-8-1024-2048/32", "pretrain", "finetune", "masked", "cifar10", "512", "vtab:x"),
            *("folder:/a, b", "imagenet21k", "jft", "10%", VIT, "ViT-B/0"),
            *("ViT-B/" + "9" * 5000, "R50x" + "9" * 5000, "ViT-1-" + "64" * 9 + "-1/1", "R50x99"),
        ]
    ),
    st.text(max_size=8),
)
SPECS = st.lists(
    st.one_of(SPEC_WORDS, st.sampled_from([":", ",", "/", "+", "x", "-"])), max_size=7
).map("".join)


def test_specs(fuzz):
    def read(text):
        for name in (text, f"vit:{text}"):
            loaded = config_files.load(name)
            check_config(loaded.config, may_lack=True)
            assert "/" not in config_files.default_workdir(name).removeprefix("runs/")

    fuzz("specs", SPECS, read, sound=["b16"])
