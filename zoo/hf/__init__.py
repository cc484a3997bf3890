"""The bridge: the law, the lens and reusable patches on causal language models of `transformers`."""

from zoo.hf.export import export, import_llama
from zoo.hf.wrapped import Wrapped, wrap

__all__ = ["Wrapped", "export", "import_llama", "wrap"]
