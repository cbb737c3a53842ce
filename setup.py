"""Packaging. The lower bounds are the oldest versions that the tests were run with."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vit_jax/__init__.py").read_text())[1]

# Its CPU build, where there is one, is a tenth of the size.
TENSORFLOW = [
    "tensorflow-cpu>=2.21; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "tensorflow>=2.21; sys_platform != 'linux' or platform_machine != 'x86_64'",
]

SERVE = [
    "fastapi>=0.165",
    "onnxruntime>=1.31",
    "prometheus-client>=0.26",
    "python-multipart>=0.0.34",
    "uvicorn>=0.54",
]

DETECTION = ["pycocotools>=2.0.10"]

setup(
    name="vit_jax",
    version=VERSION,
    description="Vision Transformers in JAX/Flax, from pre-training to a TensorRT engine",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # The configs are what people type and edit: in a clone they lie at the top.
    packages=[*find_packages(include=["vit_jax", "vit_jax.*"]), "vit_jax.configs"],
    package_dir={"vit_jax.configs": "configs"},
    package_data={
        "vit_jax": ["py.typed", "webpage.css"],
        "vit_jax.analysis": ["page.css"],
        "vit_jax.serving": ["page.css", "page.js"],
        "vit_jax.data": ["imagenet_classes.txt", "objectnet_classes.txt"],
    },
    entry_points={"console_scripts": ["vit-jax = vit_jax.cli:main"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.5",
        "flax>=0.12.0",
        "google-crc32c>=1.9",
        "grain>=0.2.18",
        "huggingface-hub>=2.4",
        "importlib-resources>=7.1",  # TFDS imports it without saying so.
        "jax>=0.7.1",
        "matplotlib>=3.11",
        "ml-collections>=1.1.0",
        "ml-dtypes>=0.6",
        "msgpack>=1.2",
        "numpy>=2.4",
        "opencv-python-headless>=5.0",  # Older ones sample at 32nds of a pixel.
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=13.0",
        "requests>=2.34",
        "safetensors>=0.8",
        "scikit-learn>=1.9",
        "scipy>=1.17",
        "simplejpeg>=1.9",
        "tensorboard>=2.21",
        "tensorflow-datasets>=4.9.10",
        "tqdm>=4.70",
    ],
    extras_require={
        # CUDA 13 wants a driver of 580 or newer.
        "cuda": ["jax[cuda13]"],
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        # TFDS writes its data sets with TensorFlow; they are read without.
        "prepare": TENSORFLOW,
        "export": [
            *TENSORFLOW,
            "flax==0.12.0",  # Newer ones need a newer JAX; pip would try them all.
            "jax==0.7.1",  # The last whose jax2tf emits a TensorFlow graph that tf2onnx can read.
            "onnx>=1.23",
            "onnxruntime>=1.31",
            "onnxscript>=0.7.2",
            "tf2onnx>=1.17",
        ],
        # For newer JAX, with `pip install --no-deps jax2onnx`: jax2onnx 0.17 forbids today's orbax.
        "export-newest": [
            "dm-pix>=0.4.4",
            "einops>=0.8.1",
            "equinox>=0.13.1",
            "onnx>=1.23",
            "onnxruntime>=1.31",
            "onnxscript>=0.7.2",
        ],
        # COCO's average precision: `vit-jax evaluate` and runs of detection.
        "detection": DETECTION,
        # The other implementations, to compare with. PyTorch and torchvision go together by release
        # and by build: on Linux, PyPI's are both for CUDA.
        "peers": ["timm>=1.0.31", "torch==2.14.1", "torchvision==0.29.1", "transformers>=5.23"],
        # Where a run can be shown: `vit-jax train --track`.
        "mlflow": ["mlflow>=3.17"],
        "wandb": ["wandb>=0.31"],
        # The pages: `make docs`, which runs the notebook.
        "docs": [
            "ipykernel>=7.4",
            "mkdocs-jupyter>=0.26.3",  # The last for Python 3.11.
            "mkdocs-material>=9.8",
            "mkdocstrings[python]>=1.0.8",
        ],
        # `vit-jax serve`.
        "serve": SERVE,
        # NVIDIA's own index has the libraries that these load; TensorRT 8.6 is for Python 3.10.
        "tensorrt": ["cuda-python>=12.2", "tensorrt>=10"],
        "test": [
            *DETECTION,
            *SERVE,
            *TENSORFLOW,  # What is compared with.
            "httpx2>=2.16",  # Of the test client of FastAPI.
            "hypothesis>=6.170",
            "pytest>=9.2",
            "pytest-cov>=7.1",
            "pytest-xdist>=3.8",
            "ruff>=0.17.5",
            "ty>=0.0.107",
        ],
    },
)
