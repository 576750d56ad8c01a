"""Packaging. The library `sparsity` needs torch alone; the trainer is the extra `train`.

Exact pins where a version's insides are used (DeepSpeed's masters, DALI's decoders), ranges elsewhere. The
one set-up that all tests and figures come from is in constraints.txt.
"""

from setuptools import find_packages, setup

TRAIN = [
    "torchvision>=0.26,<0.29",
    "deepspeed==0.19.8",
    "nvidia-dali-cuda130==2.4.0",
    "numpy>=1.26",
    "tensorboard>=2.18",
    "pyyaml>=6.0",
    "pydantic>=2.9",
    "pillow>=10.4",
    "safetensors>=0.4.5",
    "psutil>=5.9",
    "rich>=13.7",
    "matplotlib>=3.9",
    "simplejpeg>=1.9",
]
ONNX = ["onnx>=1.17", "onnxscript>=0.5"]
DOCS = ["mkdocs-material>=9.5"]
DEV = [
    "hypothesis>=6.100",
    "mypy==2.4.1",
    "onnxruntime>=1.20",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "ruff==0.17.6",
    "scikit-image>=0.24",
    "setuptools>=77",
    "timm>=1.0",
    "types-PyYAML",
]

setup(
    name="acdc-train",
    version="0.1.0",
    description="AC/DC training: one run yields an accurate sparse model together with its dense twin",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["trainer*", "sparsity*", "data*", "configs*", "benchmarks*"]),
    package_data={
        "configs": ["**/*.yaml"],
        "data.datasets.bundled": ["*.npz", "LICENSE*"],
        "sparsity.kernels.unstructured": ["native/*"],
        "trainer.report": ["style.css", "hover.js"],
    },
    entry_points={"console_scripts": ["acdc=trainer.cli.main:main"]},
    install_requires=["torch>=2.11,<2.14"],
    extras_require={
        "train": TRAIN,
        "onnx": ONNX,
        "timm": ["timm>=1.0"],
        "wandb": ["wandb>=0.19"],
        "examples": ["pytorch-lightning>=2.5", "transformers>=5", "accelerate>=1.10"],
        "docs": DOCS,
        "dev": [*TRAIN, *ONNX, *DOCS, *DEV],
    },
)
