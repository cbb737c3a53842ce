"""The description of a model in its Hugging Face or timm folder, also after that was edited."""

import contextlib
import dataclasses
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from vit_jax.checkpoints import huggingface_config, timm_config
from vit_jax.checkpoints.model_info import ModelInfo, info_path, read_info_file, read_json
from vit_jax.errors import UserError, first_line
from vit_jax.image_size import ImageSize

_FORMATS = {"timm": timm_config, "huggingface": huggingface_config}


def read_info(path: Path, format: str, sizes: dict[str, Any], image_size: ImageSize) -> ModelInfo:
    """Returns what is known of weights besides their values.

    The info file of a file of weights adds to what their folder tells; in a folder, its own files
    come first where they were changed since the info file was written.

    Args:
        path: of the weights, a file or a folder.
        format: "official", "timm", "torchvision" or "huggingface".
        sizes: of the model, as far as shapes tell them, with `num_heads` of any value.
        image_size: that of the position embeddings, for where nothing names one; 0 if they are no
            square's.

    Raises:
        UserError: a configuration is of a model that is no plain or hybrid ViT, or not readable.
    """
    folder = find_folder(path, format)
    from_folder = read_folder(folder, format, sizes, image_size)
    if folder is None or format not in _FORMATS or (path != folder and info_path(path).is_file()):
        return read_info_file(path, from_folder)
    from_info_file = read_info_file(folder, from_folder)
    return merge_info(from_folder, from_info_file, folder, format, sizes, image_size)


def find_folder(path: Path, format: str) -> Path | None:
    """Returns the folder whose configuration is that of the weights at a path, None without one.

    A file that is named itself has that of its folder, if a `config.json` in there is one of this
    format.
    """
    if path.is_dir():
        return path
    if format not in _FORMATS:
        return None
    try:
        config = read_json(path.with_name("config.json"))
    except UserError:  # Whosever it is, nobody named it.
        return None
    return path.parent if config.keys() & set(_FORMATS[format].MARKS) else None


def read_folder(
    folder: Path | None, format: str, sizes: dict[str, Any], image_size: ImageSize
) -> ModelInfo:
    """Returns what the format of weights and the configuration in their folder tell of a model.

    Args:
        folder: None where only the format's conventions are known.
        format: "official", "timm", "torchvision" or "huggingface".
        sizes: of the model, as far as shapes tell them.
        image_size: that of the position embeddings, for where the configuration names none.

    Raises:
        UserError: the configuration is of a model that is no plain or hybrid ViT.
    """
    if format == "official":
        return ModelInfo({"architecture": sizes["architecture"]})
    if format == "torchvision":
        return timm_config.torchvision_info(sizes, image_size)
    files = {}
    if folder is not None:
        files = {name: read_json(folder / name) for name in _FORMATS[format].FILES}
    with _naming_folder(folder):
        return _read_config(files, format, sizes, image_size)


def config_files(info: ModelInfo, format: str) -> dict[str, dict[str, Any]]:
    """Returns the JSON files of a folder in a format, by name, of a model of which all is known.

    Raises:
        UserError: the format has no name for such a model.
    """
    return _FORMATS[format].config_files(info)


def merge_info(
    from_folder: ModelInfo,
    from_info_file: ModelInfo,
    folder: Path,
    format: str,
    sizes: dict[str, Any],
    image_size: ImageSize,
) -> ModelInfo:
    """Returns what is known of a folder that we wrote, and that may have been changed since.

    The info file says more, and more exactly; but where the folder's own files no longer say what
    we would write for it, somebody changed them, and they are right.

    Args:
        from_folder: what the folder's own files tell.
        from_info_file: the same, with what the info file replaces.
        folder: where both lie.
        format: "timm" or "huggingface".
        sizes: of the model, as far as shapes tell them, with `num_heads` of any value.
        image_size: that of the position embeddings.
    """
    if from_info_file == from_folder or not (folder / "config.json").is_file():
        return from_info_file
    # What it would be read as, had nobody changed the files.
    shapes = {key: x for key, x in sizes.items() if key not in ("num_heads", "layer_scale")}
    model = {"num_heads": 1, **from_info_file.model, **shapes}
    with _naming_folder(folder):
        files = config_files(dataclasses.replace(from_info_file, model=model), format)
        files = {name: x for name, x in files.items() if (folder / name).is_file()}
        as_written = _read_config(files, format, sizes, image_size)

    def newer(field: str) -> Any:
        is_unchanged = getattr(from_folder, field) == getattr(as_written, field)
        return getattr(from_info_file if is_unchanged else from_folder, field)

    unchanged = {key: x for key, x in from_info_file.model.items() if key not in shapes}
    changed = dict(from_folder.model.items() - as_written.model.items())
    # Older folders name the sigmoid's problem of one label that of several.
    of_labels = from_info_file if from_folder.loss in (None, from_info_file.loss) else from_folder
    return ModelInfo(
        unchanged | changed,
        newer("preprocessing"),
        newer("class_names"),
        from_folder.loss or from_info_file.loss,
        of_labels.multi_label,
    )


def _read_config(
    files: Mapping[str, dict[str, Any]], format: str, sizes: dict[str, Any], image_size: ImageSize
) -> ModelInfo:
    config = files.get("config.json", {})
    if format == "timm":
        return timm_config.read_config(config, sizes, image_size)
    processor = files.get("preprocessor_config.json", {})
    return huggingface_config.read_config(config, processor, sizes, image_size)


@contextlib.contextmanager
def _naming_folder(folder: Path | None) -> Generator[None]:
    """Turns what a value of a wrong form leads to into a UserError that names the folder."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{folder}: a value in its configuration is not understood ({first_line(error)})"
        ) from error
