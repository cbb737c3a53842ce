"""scikit-learn's handwritten digits as a TFDS data set: real images with nothing to download."""

import contextlib
import io

import numpy as np
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 gray 8x8 images of handwritten digits (UCI ML repository) that scikit-learn ships.

    The source has no test split. Every fifth image of each digit, in scikit-learn's order, is
    the test split here: 355 images, and 1,442 to train on. The split is by digit because the
    order is not random: it often runs from 0 to 9 again and again.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, test):
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Ink is counted from 0 to 16.
        images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
        seen = np.zeros(10, int)
        for index, (image, label) in enumerate(zip(images, digits.target, strict=True)):
            seen[label] += 1
            if (seen[label] % 5 == 0) == test:
                yield index, {"image": image, "label": label}


def prepare_digits(data_dir: str = "") -> tfds.core.DatasetBuilder:
    """Returns the builder of `Digits`, prepared in `data_dir` ("" = the TFDS default).

    Preparing takes seconds and ends in one rename, so a killed process leaves nothing that looks
    finished, and of several at once the first one wins.

    Raises:
        OSError: if `data_dir` cannot be written.
    """
    tfds.disable_progress_bar()
    try:
        # TFDS prints about a download here, which there is not.
        with contextlib.redirect_stdout(io.StringIO()):
            Digits(data_dir=data_dir or None).download_and_prepare()
    except OSError:
        if not Digits(data_dir=data_dir or None).is_prepared():
            raise
    return Digits(data_dir=data_dir or None)
