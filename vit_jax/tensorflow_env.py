"""TensorFlow's settings that must be made before it is imported."""

import logging
import os


def quiet() -> None:
    """Keeps TensorFlow from greeting on every start; what the user has set stays.

    Its warnings are about accelerators that it is not meant to use. oneDNN is told of in a line of
    its own, and computes with another rounding than the rest.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def silence() -> None:
    """Does as `quiet`, and keeps libraries from logging what they raise as well."""
    import absl.logging

    quiet()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    absl.logging.set_verbosity(absl.logging.FATAL)
