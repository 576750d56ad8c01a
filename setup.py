"""Packaging. Exact pins where a version changes what is computed or compiled; ranges elsewhere."""

from setuptools import find_packages, setup

setup(
    name="acdc-train",
    version="0.1.0",
    description="AC/DC training: one run yields an accurate sparse model together with its dense twin",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["trainer*", "sparsity*", "data*", "configs*", "benchmarks*"]),
    package_data={"configs": ["**/*.yaml"], "data.datasets.bundled": ["*.npz", "LICENSE*"]},
    entry_points={"console_scripts": ["acdc=trainer.cli.main:main"]},
    install_requires=[
        "torch==2.13.0",
        "torchvision==0.28.0",
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
    ],
    extras_require={
        "timm": ["timm>=1.0"],
        "onnx": ["onnx>=1.17", "onnxscript>=0.5"],
        "dev": [
            "hypothesis>=6.100",
            "mypy==2.4.1",
            "onnx>=1.17",
            "onnxruntime>=1.20",
            "onnxscript>=0.5",
            "pytest>=8.3",
            "ruff==0.17.6",
            "scikit-image>=0.24",
            "types-PyYAML",
        ],
    },
)
