"""Pictures of what a model looks at in an image; by Flax, for a graph gives no attention."""

import io
import json
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vit_jax.data.image_files import read_view
from vit_jax.data.images import preprocess
from vit_jax.errors import UserError
from vit_jax.export.parity import as_pixels
from vit_jax.inference import VisionModel
from vit_jax.models import prediction_fields
from vit_jax.serving.served import Served

if TYPE_CHECKING:
    from vit_jax.checkpoints.pretrained import Pretrained

# The cosine of what the weights give for an image and what their export gives, at least; that of
# int8 is of another kind.
_ALIKE = 0.95
_ALIKE_IN_INT8 = 0.7


class Attention:
    """Draws attention rollout (Appendix D.8) over images.

    Args:
        pretrained: the weights that were exported.
        served: what was exported of them.

    Raises:
        UserError: the two are not of one model, or it has no attention between all patches. Weights
            are compared by logits or features; an export of anything else only by its architecture.
    """

    def __init__(self, pretrained: "Pretrained", served: Served):
        self._preprocessing = pretrained.preprocessing
        exported = json.loads(served.metadata.get("model", "{}"))
        own = prediction_fields(pretrained.model)
        # An export of features has no head.
        differing = [
            key
            for key in sorted(own.keys() & exported.keys() - {"num_classes", "representation_size"})
            if json.loads(json.dumps(own[key])) != exported[key]
        ]
        if pretrained.preprocessing != served.preprocessing:
            differing.append("preprocessing")
        if differing:
            raise UserError(
                f"--checkpoint {pretrained.source} is not what {served.name} was exported from: "
                f"{', '.join(differing)} differ; give that checkpoint"
            )
        self._model = VisionModel(pretrained, 1)
        if served.output in ("logits", "features") and not self._is_like(served):
            raise UserError(
                f"--checkpoint {pretrained.source} is not what {served.name} was exported from: "
                f"the weights differ, as the {served.output} of an image do; give that checkpoint"
            )
        height, width, channels = pretrained.preprocessing.image_shape
        self._model.attention(np.zeros((1, height, width, channels), np.float32))  # Compiles.

    def _is_like(self, served: Served) -> bool:
        """Tells whether an export gives for noise what the weights give."""
        rule = self._preprocessing
        noise = np.random.default_rng(0).random(rule.image_shape)
        given = image = ((noise - rule.mean) / rule.std).astype(np.float32)
        if served.takes_pixels:
            given = as_pixels(image, rule)
        if served.takes_raw:
            image = preprocess(given, rule)
        own = self._model.logits if served.output == "logits" else self._model.features
        pair = own(image[None])[0], served.predict(given[None])[0]
        if pair[0].shape != pair[1].shape:
            return False
        # What all classes have in common tells nothing.
        a, b = (outputs.ravel() - outputs.mean() for outputs in pair)
        least = _ALIKE_IN_INT8 if served.metadata.get("precision") == "int8" else _ALIKE
        return bool(a @ b >= least * np.linalg.norm(a) * np.linalg.norm(b))

    def draw(self, name: str, encoded: bytes) -> bytes:
        """An image under the mask of what is looked at, as in Figure 6, as a PNG.

        Args:
            name: of the image file, for the message.
            encoded: its content.

        Raises:
            UserError: as `images.read_image` does.
        """
        view = read_view(name, self._preprocessing, encoded)
        mask = self._model.attention(view[None])[0]
        picture = self._preprocessing.to_picture(view) * mask[..., None]
        data = io.BytesIO()
        Image.fromarray(np.rint(255 * picture).astype(np.uint8)).save(data, "PNG")
        return data.getvalue()
