"""The formats of other runtimes: recognised, read and written.

`peft`: the folder of PEFT, which transformers, vLLM, SGLang and LoRAX load; `gguf`: the file of
llama.cpp and Ollama; `mlx`: the folder of mlx-lm. Files of kohya and diffusers are read alone.
"""

from __future__ import annotations

FORMATS = ("peft", "gguf", "mlx")
"""Those that are written."""
