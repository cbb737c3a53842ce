"""Published weights by their names: over the network into a cache, verified, once.

Google's weights lie in the public bucket `vit_models`, whose directories are listed in the README
of github.com/google-research/vision_transformer. They are read over HTTPS into
`$VIT_JAX_CACHE/<directory>/<file>`. The Hugging Face hub has its own client and its own cache.
"""

import json
import os
import re
import urllib.parse
from pathlib import Path

from vit_jax.checkpoints import augreg
from vit_jax.checkpoints.download import Source, fetch_file, root_reason
from vit_jax.errors import UserError
from vit_jax.files import cache_dir

DIRECTORIES = ("imagenet21k", "imagenet21k+imagenet2012", "augreg", "sam", "gsam")
AUGREG_MODELS = (
    *("Ti_16", "S_32", "S_16", "B_32", "B_16", "B_8", "L_16"),
    *("R_Ti_16", "R26_S_32", "R50_L_32"),
)

# Weights without a pickle in them, and how to use them.
_HUB_FILES = (
    *("config.json", "preprocessor_config.json"),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
)
_MAX_INDEX = 4 << 20  # bytes, as `arrays.read_sharded` reads
_BUCKET = "vit_models"
_BUCKET_URL = f"https://storage.googleapis.com/{_BUCKET}"
_ACCEPTED = (
    "ViT-B_16, imagenet21k+imagenet2012/ViT-B_16, augreg/FILE, gs://vit_models/DIRECTORY/FILE, "
    f"an AugReg model ({', '.join(AUGREG_MODELS)}) or hf:OWNER/NAME[@REVISION]"
)

_PART = r"\w[\w.+-]*"  # of a path in the bucket: nothing that could leave the cache
_BUCKET_NAME = re.compile(r"(R\d+\+)?ViT-[A-Z][a-z]?_\d+(-224)?", re.ASCII)
_HUB_NAME = re.compile(r"hf:(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)


def is_remote_name(name: str) -> bool:
    """Tells whether `fetch` knows `name`, and it neither exists on disk nor looks like a path.

    Of names with a directory, those in `DIRECTORIES` count. `ViT-B_16.npz` is a path.
    """
    if os.path.exists(name):
        return False
    if name.startswith(("hf:", "gs://", f"{_BUCKET_URL}/")):
        return True
    directory, slash, _ = name.partition("/")
    if slash:
        return directory in DIRECTORIES
    return bool(_BUCKET_NAME.fullmatch(name)) or name in AUGREG_MODELS


def locate(name: str) -> tuple[str, Path]:
    """The address of a file of Google's bucket and its place in the cache.

    Args:
        name: as `fetch`, but neither an AugReg model nor on the Hugging Face hub. `.npz` may be
            left out. `$VIT_JAX_BUCKET_URL` takes the place of the bucket's address.

    Raises:
        UserError: the name is not of this form.
    """
    path = name.removeprefix(f"gs://{_BUCKET}/").removeprefix(f"{_BUCKET_URL}/")
    if path == name and _BUCKET_NAME.fullmatch(stem := name.removesuffix(".npz")):
        # Those trained at 224 px are the fine-tuned ones; there is no other of that name.
        directory = "imagenet21k+imagenet2012" if stem.endswith("-224") else "imagenet21k"
        path = f"{directory}/{stem}"
    if path == name and path.split("/")[0] not in DIRECTORIES:
        raise UserError(f"{name!r} is no name of published weights: give {_ACCEPTED}")
    if not re.fullmatch(rf"{_PART}(/{_PART})+", path, re.ASCII):
        raise UserError(f"{name!r} is no path in the bucket {_BUCKET}: give {_ACCEPTED}")
    if not path.endswith((".npz", ".csv")):
        path += ".npz"
    base = os.environ.get("VIT_JAX_BUCKET_URL") or _BUCKET_URL
    return f"{base}/{urllib.parse.quote(path)}", cache_dir() / path


def split_hub_name(name: str) -> tuple[str, str | None]:
    """Splits `hf:owner/name@revision` into `owner/name` and the revision, if it has one.

    Raises:
        UserError: the name is not of this form.
    """
    match = _HUB_NAME.fullmatch(name)
    if not match or ".." in name:
        raise UserError(
            f"{name!r} is no name on the Hugging Face hub: give hf:OWNER/NAME[@REVISION]"
        )
    return match[1], match[2]


def fetch(name: str) -> Path:
    """Fetches published weights, once; what is in the cache is used without the network.

    Args:
        name: a file of Google's bucket: `ViT-B_16` (of `imagenet21k`), `imagenet21k/ViT-B_16`,
            `imagenet21k+imagenet2012/ViT-B_16`, `augreg/B_16-i21k-300ep-...`, with or without
            `gs://vit_models/` and `.npz`; or an AugReg model, `R26_S_32`, of which the recommended
            pre-trained file is taken; or `hf:owner/name[@revision]`.

    Returns:
        The file, or the folder of a repository of the Hugging Face hub.

    Raises:
        UserError: the name is none of these; or the file is not in the cache, and cannot be
            reached, does not exist, is not what was published, or does not fit on the disk.
    """
    if name.startswith("hf:"):
        return _fetch_hub(name)
    if name in AUGREG_MODELS:
        name = f"augreg/{augreg.recommended(augreg.read_index(fetch_index()), name)}"
    return _fetch_from_bucket(name, name)


def fetch_index() -> Path:
    """Fetches the index of AugReg, `augreg/index.csv`: see `augreg.read_index`."""
    return _fetch_from_bucket("augreg/index.csv", "the index of AugReg")


def _fetch_from_bucket(name: str, label: str) -> Path:
    url, path = locate(name)
    is_google = url.startswith(_BUCKET_URL)
    return fetch_file(Source(label, url, path, has_checksum=is_google))


def _fetch_hub(name: str) -> Path:
    repository, revision = split_hub_name(name)
    try:
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(f"{name} needs huggingface_hub: pip install huggingface_hub") from error
    by_hand = (
        "put config.json, preprocessor_config.json and model.safetensors from "
        f"{constants.ENDPOINT}/{repository}/tree/{revision or 'main'} "
        "into a folder and give that folder"
    )
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(_HUB_FILES)
        )
    except LocalEntryNotFoundError as error:
        host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
        raise UserError(
            f"{name} is not in the cache and {host} cannot be reached ({root_reason(error)}): "
            f"{by_hand}"
        ) from error
    except Exception as error:  # Its transport changes with its version, and so do the classes.
        raise UserError(
            f"{name} cannot be fetched ({root_reason(error)}): check the name, or {by_hand}"
        ) from error
    folder = Path(folder)
    if missing := _missing_weights(folder):
        raise UserError(
            f"{name} has no {missing}: only safetensors are read, so convert it, "
            "or name another revision"
        )
    return folder


def _missing_weights(folder: Path) -> str | None:
    """The first file of the weights that is not there."""
    if (folder / "model.safetensors").exists():
        return None
    try:
        with (folder / "model.safetensors.index.json").open("rb") as file:
            index = json.loads(file.read(_MAX_INDEX))
        shards = sorted(set(index["weight_map"].values()))
        return next((shard for shard in shards if not (folder / shard).exists()), None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "model.safetensors"
