"""The facts about weights beyond their values, and the info file beside them that records them.

Google's and timm's files hold arrays and nothing else. `vit_jax.convert` writes the rest to an
info file: `<file>.json`, in a folder `vit_jax.json`. One written by hand is read as well:

    {"model": {"gelu": "erf", "num_heads": 8}, "class_names": ["daisy", "iris"],
     "preprocessing": {"image_size": 224, "center_crop": 0.875}, "loss": "softmax"}
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from vit_jax.data.protocols import Preprocessing, evaluation
from vit_jax.errors import UserError, brief, first_line
from vit_jax.models import check_fields, prediction_fields
from vit_jax.printable import printable

_MAX_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """The facts about a model besides its parameters, or some of them; see `Pretrained`.

    Attributes:
        model: some of the entries that `models.create_model` takes.
        preprocessing: None if it is not known.
        class_names: None if they are not known.
        loss: "softmax" or "sigmoid", None if it is not known.
        multi_label: whether it predicts any number of classes of an image, by a sigmoid of each.
    """

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    loss: str | None = None
    multi_label: bool = False

    def require_preprocessing(self) -> Preprocessing:
        """Returns the preprocessing of a model of which all is known.

        Raises:
            ValueError: it is not known.
        """
        if self.preprocessing is None:
            raise ValueError("the preprocessing of the model is not known")
        return self.preprocessing

    def to_json(self) -> str:
        """Returns the text of an info file."""
        values = dataclasses.asdict(self)
        if not self.multi_label:  # Files of before it was a key are of models with one label.
            del values["multi_label"]
        return json.dumps(values, indent=2) + "\n"


def info_path(path: Path) -> Path:
    """Returns the path of the info file, beside a file of weights or in a folder of them."""
    return path / "vit_jax.json" if path.is_dir() else path.with_name(path.name + ".json")


def read_info_file(path: Path, default: ModelInfo) -> ModelInfo:
    """Returns `default`, which names the architecture, with what the info file of `path` replaces.

    Raises:
        UserError: it cannot be read, or has an unknown key or a value of the wrong kind.
    """
    file = info_path(path)
    document = read_json(file)
    allowed = {field.name for field in dataclasses.fields(ModelInfo)}
    try:
        if unknown := sorted(document.keys() - allowed):
            raise UserError(f"{brief(unknown[0])} is none of {', '.join(sorted(allowed))}")
        model = {**default.model, **document.pop("model", {})}
        check_fields(model)
        # Null leaves the default; but class_names may be null where the default has names.
        document = {key: x for key, x in document.items() if x is not None or key == "class_names"}
        if "preprocessing" in document:
            document["preprocessing"] = _preprocessing(document["preprocessing"])
        if document.get("class_names") is not None:
            document["class_names"] = _names(document["class_names"])
        if document.get("loss", "softmax") not in ("softmax", "sigmoid"):
            raise UserError(f"loss {document['loss']!r} is neither softmax nor sigmoid")
        if "loss" in document:
            document.setdefault("multi_label", False)
        _check_multi_label(document.get("multi_label", False))
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {printable(first_line(error))}: mend or remove it") from error
    return dataclasses.replace(default, model=model, **document)


def _check_multi_label(value: Any) -> None:
    if not isinstance(value, bool):
        raise UserError(f"multi_label is {brief(value)}: it must be true or false")


def _preprocessing(values: Any) -> Preprocessing:
    if not isinstance(values, dict):
        raise UserError(f"preprocessing is {brief(values)}: it must be an object")
    arguments: dict[str, Any] = {
        key: tuple(x) if isinstance(x, list) else x for key, x in values.items()
    }
    return Preprocessing(**arguments)


def info_from_run(metadata: dict[str, Any]) -> ModelInfo:
    """Returns what a run of this project saved beside its weights, in a checkpoint's metadata.

    Raises:
        UserError: it is not what a run saves.
    """
    config = metadata.get("config")
    names = metadata.get("class_names")
    names = None if names is None else _names(names)
    multi_label = metadata.get("multi_label", False)
    _check_multi_label(multi_label)
    if config is None:
        return ModelInfo(class_names=names)
    try:
        info = _info_from_config(config, names)
        return dataclasses.replace(info, multi_label=multi_label)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"the config beside the weights is none of a run ({first_line(error)}): mend it"
        ) from error


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise UserError(f"class_names is {brief(values)}: it must be a list of names")
    return tuple(map(str, values))


def _info_from_config(config: dict[str, Any], names: tuple[str, ...] | None) -> ModelInfo:
    # Here because it takes the optimizers along, which no other weights need.
    from vit_jax.config_migration import migrate

    config = migrate(config)
    data, model = config["dataset"], prediction_fields(config["model"])
    check_fields({key: x for key, x in model.items() if x is not None})
    return ModelInfo(
        model,
        evaluation(data["protocol"], data["image_size"], data["jpeg_dct"], data["channels"]),
        names,
        config["loss"],
    )


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object; a missing file reads as an empty one.

    Raises:
        UserError: it is no JSON object, or larger than 64 MiB.
    """
    path = Path(path)
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("larger than 64 MiB")
        document = json.loads(path.read_text())
        if not isinstance(document, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON ({first_line(error)}): mend it") from error
    return document
