"""What one would use instead of this project's models: the same model, from the same weights."""

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import paired
import turns
from flax.traverse_util import flatten_dict, unflatten_dict
from official_vit import OfficialViT
from paired import Repeat, Unavailable, torch_device

from vit_jax.checkpoints import layouts
from vit_jax.errors import UserError
from vit_jax.models import DTYPES, create_model, describe, model_config
from vit_jax.models.vit import ViTConfig

NUM_CLASSES = 1000
# In the order of the tables. timm's are two, of which the faster one counts.
OURS, OFFICIAL, TIMM = "ours", "official", "timm"
COMPILED = "timm, torch.compile"
HUGGING_FACE = "Hugging Face"
PEERS = (OFFICIAL, TIMM, COMPILED, HUGGING_FACE)
# Relative errors of right arithmetic are several times smaller. Accelerators round the factors of
# 32-bit products to 10 bits.
TOLERANCES = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 1e-1}
# Of the norm of all gradients: below it a parameter's own counts as that. A key's bias has none.
SMALL_GRADIENT = 1e-2

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Workload:
    """One model at one batch size, and what it is fed with.

    Attributes:
        name: of the model, "ViT-B/16".
        config: of the model, as it is ours.
        batch: images in a batch.
        image_size: in pixels.
        params: the weights that all begin with, official names joined by "/".
        images: [batch, image_size, image_size, 3] float32 in [-1, 1].
        labels: [batch] int32.
    """

    name: str
    config: dict[str, Any]
    batch: int
    image_size: int
    params: Arrays
    images: np.ndarray
    labels: np.ndarray

    @property
    def description(self) -> ViTConfig:
        """Our description of the model, without what is not a matter of its function."""
        fields = {k: v for k, v in self.config.items() if k in _FUNCTION}
        return cast(ViTConfig, describe(fields))

    @property
    def tree(self) -> dict[str, Any]:
        """The weights as a tree of JAX arrays, fresh ones."""
        return jax.tree.map(jnp.array, unflatten_dict(self.params, sep="/"))


class TorchModel(NamedTuple):
    """A model of PyTorch.

    Attributes:
        module: the model.
        layout: how its parameters are called, of `checkpoints.layouts`.
        device: where it is, as PyTorch calls it.
    """

    module: Any
    layout: str
    device: str


_FUNCTION = {
    "architecture",
    "patch_size",
    "hidden_size",
    "num_layers",
    "mlp_dim",
    "num_heads",
    "num_classes",
    "classifier",
    "representation_size",
    "gelu",
    "layer_norm_epsilon",
    "dtype",
    "dropout_rate",
}


def workload(
    name: str, batch: int, *, image_size: int, dtype: str, overrides: Mapping[str, Any]
) -> Workload:
    """A model with random weights and a batch of random images."""
    config = {**model_config(name), "num_classes": NUM_CLASSES, "dtype": dtype, **overrides}
    if config["architecture"] != "vit":
        raise UserError(f"model {name!r} is no plain ViT: the others have no peers here")
    for key, usual in _USUAL.items():
        if (value := config.get(key, usual)) != usual:
            raise UserError(f"no peer is compared with {key} {value!r}: leave it {usual!r}")
    generator = np.random.default_rng(0)
    images = generator.uniform(-1, 1, (batch, image_size, image_size, 3)).astype(np.float32)
    model = create_model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *images.shape[1:])))
    params = {
        path: _draw(generator, path, x.shape)
        for path, x in flatten_dict(shapes["params"], sep="/").items()
    }
    labels = generator.integers(NUM_CLASSES, size=batch).astype(np.int32)
    return Workload(name, config, batch, image_size, params, images, labels)


def _draw(generator: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter of a size that it could have in a trained model; none is 0."""
    noise = generator.standard_normal(shape, dtype=np.float32)
    if path.endswith("/kernel"):
        inputs = shape[0] if path.endswith(_PROJECTIONS) else math.prod(shape[:-1])
        return noise * np.float32(inputs**-0.5)
    return noise / 10 + np.float32(path.endswith("/scale"))


_PROJECTIONS = ("query/kernel", "key/kernel", "value/kernel")


_USUAL = {
    "position_embedding": "learned",
    "position_placement": "stem",
    "representation_size": 0,
    "attention_dropout_rate": 0.0,
    "stochastic_depth": 0.0,
}


def official(load: Workload) -> OfficialViT:
    """The stock modules."""
    return OfficialViT(load.description)


def torch_module(peer: str, load: Workload) -> TorchModel:
    """The model of timm or Hugging Face with the weights, on the device that JAX computes on.

    Raises:
        ImportError: it is not installed.
        Unavailable: it cannot take part.
    """
    import torch

    device = torch_device()
    if device == "cuda":  # As JAX has it: 32-bit factors are rounded.
        torch.set_float32_matmul_precision("high")
    module = (_huggingface if peer == HUGGING_FACE else _timm)(load)
    layout = "huggingface" if peer == HUGGING_FACE else "timm"
    theirs = {name.official: getattr(name, layout) for name in layouts.names(load.params)}
    arrays = layouts.from_official(dict(load.params), layout)
    state = module.state_dict()
    if peer == HUGGING_FACE:  # Transformers 5 has other names in memory than on disk.
        heads = load.description.num_heads
        on_disk = {
            name: theirs[next(iter(layouts.to_official({name: x.numpy()}, layout, heads)))]
            for name, x in state.items()
        }
        arrays = {name: arrays[disk] for name, disk in on_disk.items()}
    module.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in arrays.items()})
    module.to(device)
    if peer == COMPILED:
        module.compile()
    return TorchModel(module, layout, device)


def _timm(load: Workload) -> Any:
    import timm
    from torch import nn

    model = load.description
    gelu = functools.partial(nn.GELU, approximate="tanh" if model.gelu == "tanh" else "none")
    return timm.models.VisionTransformer(
        img_size=load.image_size,
        patch_size=model.patch_size,
        embed_dim=model.hidden_size,
        depth=model.num_layers,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_dim / model.hidden_size,
        num_classes=model.num_classes,
        class_token=model.has_class,
        global_pool="token" if model.has_class else "avg",
        fc_norm=False,
        pos_drop_rate=model.dropout_rate,
        proj_drop_rate=model.dropout_rate,
        norm_layer=functools.partial(nn.LayerNorm, eps=model.layer_norm_epsilon),
        act_layer=gelu,
        weight_init="skip",
    )


def _huggingface(load: Workload) -> Any:
    import transformers

    model = load.description
    if not model.has_class:
        raise Unavailable("its ViT has a class token")
    config = transformers.ViTConfig(
        image_size=load.image_size,
        patch_size=model.patch_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=model.mlp_dim,
        num_labels=model.num_classes,
        hidden_act="gelu_pytorch_tanh" if model.gelu == "tanh" else "gelu",
        layer_norm_eps=model.layer_norm_epsilon,
        hidden_dropout_prob=model.dropout_rate,
    )
    return transformers.ViTForImageClassification(config)


def tolerance(dtype: str) -> float:
    """The relative error that right arithmetic stays below on this device."""
    rounds = dtype == "float32" and jax.default_backend() != "cpu"
    return TOLERANCES["tf32" if rounds else dtype]


def check(peer: str, what: str, error: float, limit: float) -> None:
    """Raises Wrong if a peer does not compute the same."""
    if not error <= limit:  # NaN is wrong too.
        raise Wrong(f"{peer}: {what} off by {error:.1e} relative, more than {limit:.0e}")


class Wrong(AssertionError):
    """What is to be compared does not compute the same."""


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value that is expected."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def gradient_error(found: Arrays, expected: Arrays) -> float:
    """The worst parameter's error: norms, relative to that of its own gradient.

    A gradient below `SMALL_GRADIENT` of all is taken relative to that: a key's bias has none.
    """
    if found.keys() != expected.keys():
        raise Wrong(f"gradients of other parameters: {sorted(found.keys() ^ expected.keys())[:3]}")
    floor = SMALL_GRADIENT * np.sqrt(sum(float(np.sum(x**2)) for x in expected.values()))
    return max(
        float(np.linalg.norm(found[name] - x)) / max(float(np.linalg.norm(x)), floor)
        for name, x in expected.items()
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what tells a workload, its peers and how long to time them."""
    parser.add_argument("model", help='of the paper, for example "ViT-B/16"')
    parser.add_argument("batch", type=int)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument(
        "--override",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of our model's config, such as scan_layers=True or gelu=erf",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        default=list(PEERS),
        choices=PEERS,
        metavar="PEER",
        help=f"of {', '.join(map(repr, PEERS))}; none for ours alone",
    )
    paired.add_arguments(parser)


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, Workload]:
    """A command line, and the workload that it tells."""
    args = parser.parse_args(argv)
    try:
        load = workload(
            args.model,
            args.batch,
            image_size=args.image_size,
            dtype=args.dtype,
            overrides=paired.overrides(args.override),
        )
    except UserError as error:
        parser.error(str(error))
    return args, load


def build(
    load: Workload,
    names: Iterable[str],
    builders: Mapping[str, Callable[[Workload], Any]],
    check: Callable[[str, Any, float], dict[str, float]],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Ours and those peers that can take part, each checked, and what there is to tell of each.

    Args:
        load: what they are built for.
        names: of the peers.
        builders: by name; what they make is called with a number of calls.
        check: calls one that was built, named so, and returns its errors, at most the last number.

    Raises:
        Wrong: one does not compute the same.
    """
    built, found = {}, {}
    for name in (OURS, *names):
        start = time.perf_counter()
        try:
            candidate = builders[name](load)
        except (ImportError, Unavailable) as error:
            if name == OURS:
                raise
            print(f"{name} cannot take part: {error}", flush=True)
            found[name] = {"unavailable": str(error)}
            continue
        errors = check(name, candidate, tolerance(load.config["dtype"]))
        built[name] = candidate
        seconds = time.perf_counter() - start
        temporaries = candidate.temporaries
        found[name] = {"errors": errors, "built_in": seconds, "temporary_bytes": temporaries}
        words = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
        print(f"{name}: {words}; built and checked in {seconds:.0f} s", flush=True)
    return built, found


def compare(
    benchmark: str,
    args: argparse.Namespace,
    load: Workload,
    candidates: Mapping[str, Repeat],
    found: dict[str, dict[str, Any]],
    flops: int,
) -> None:
    """Times candidates in turns, prints a table, and the ratios as the last line.

    Args:
        benchmark: its name.
        args: of the command line.
        load: what they do.
        candidates: ours and the peers that take part.
        found: what is known of each, to which the times are added.
        flops: of one image.
    """
    turns.wait()
    products, product_flops = paired.matrix_products(load.config["dtype"])
    times = paired.time_in_turns(
        {**candidates, **products}, rounds=args.rounds, seconds=args.seconds
    )
    rate = max(product_flops / paired.summary(times[name]).median for name in products)
    rows = []
    for name in candidates:
        taken = paired.summary(times[name])
        ratio = paired.ratio(times[OURS], times[name])
        share = flops * load.batch / taken.median / rate
        found[name] |= {
            "seconds": taken._asdict(),
            "images_per_second": load.batch / taken.median,
            "share_of_matrix_rate": share,
            "ours_to_it": ratio._asdict(),
            "turns": times[name],
        }
        rows.append(
            [
                name,
                f"{1e3 * taken.median:.1f}",
                f"{1e3 * taken.lower:.1f} to {1e3 * taken.upper:.1f}",
                f"{load.batch / taken.median:.1f}",
                f"{share:.2f}",
                f"{ratio.median:.3f} ({ratio.lower:.3f} to {ratio.upper:.3f})",
            ]
        )
    info = paired.report(
        benchmark=benchmark,
        model=load.name,
        batch=load.batch,
        image_size=load.image_size,
        dtype=load.config["dtype"],
        matrix_rate=rate,
        flops_of_an_image=flops,
        candidates=found,
    )
    print(
        f"\n{load.name}, batch {load.batch}, {load.image_size} px, {load.config['dtype']}, "
        f"{info['machine']['device']}: {rate / 1e9:,.0f} GFLOP/s in products; "
        f"{len(times[OURS])} turns"
    )
    print(paired.markdown(_HEADER, rows))
    paired.write(args.output, info)
    print(last_line(found))


_HEADER = ["", "ms", "quartiles", "images/s", "of the matrix rate", "ours / it"]


def last_line(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The ratios of ours to the official model and to the faster of timm's."""
    ratios = {
        peer: each["ours_to_it"]["median"] for peer, each in found.items() if "ours_to_it" in each
    }
    best = {
        OFFICIAL: ratios.get(OFFICIAL),
        TIMM: max((ratios[peer] for peer in (TIMM, COMPILED) if peer in ratios), default=None),
    }
    return " ".join(
        f"ours/{peer} {'not measured' if ratio is None else f'{ratio:.3f}'}"
        for peer, ratio in best.items()
    )
