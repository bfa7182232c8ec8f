"""A base model that answers, with and without adapters: a Hugging Face folder, run by transformers.

To its user it is a `llama.Llama`. It needs the extra `hf`: transformers, PEFT and torch, of which
nothing is imported before a `with` block begins. PEFT applies the adapters, so that they may have
all that it knows, also what no merge takes.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Self

from lorameta_rs.bank import TOKENIZER
from lorameta_rs.errors import InvalidSetting, MissingExtra, MissingFile
from lorameta_rs.formats.base import CONFIG
from lorameta_rs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from lorameta_rs.llama import Prompt

_PACKAGES = ("torch", "transformers", "peft")


class HuggingFace:
    """A base model in a folder of Hugging Face's, for as long as a `with` block lasts.

    Within it `limit` is the context that the model was made for; None if that is not said.
    """

    def __init__(
        self, base: Path, adapters: Sequence[Path] = (), *, slots: int = 4, threads: int = 0
    ) -> None:
        """Nothing is loaded yet.

        Args:
            base: The folder: `config.json`, safetensors, and `tokenizer.json` for prompts in words.
            adapters: PEFT folders of adapters for it.
            slots: Prompts that are answered in one batch.
            threads: Of torch; 0 for as many as it takes by itself.
        """
        self.base = base
        self.adapters = list(adapters)
        self.slots = slots
        self.threads = threads
        self.limit: int | None = None
        self._model: Any = None
        self._strengths: list[tuple[dict[str, float], str, float]] = []

    def __enter__(self) -> Self:
        """Load the model and the adapters.

        Raises:
            MissingExtra: A package of the extra `hf` is not installed.
            MissingFile: The folder has no `config.json`.
            InvalidSetting: transformers or PEFT refuses the model or an adapter.
        """
        if lacking := [name for name in _PACKAGES if find_spec(name) is None]:
            raise MissingExtra(
                f"running `{self.base}`, a Hugging Face folder, needs {', '.join(lacking)}: "
                "pip install 'lorameta-rs[hf]'"
            )
        if not (self.base / CONFIG).is_file():
            raise MissingFile(2, "no such file", str(self.base / CONFIG))
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if self.threads:
            torch.set_num_threads(self.threads)
        with _refusals(self.base):
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                self.base, dtype="auto", use_safetensors=True, local_files_only=True
            )
        self.limit = getattr(self._model.config, "max_position_embeddings", None)
        self._load_adapters()
        self._model.eval()
        return self

    def __exit__(self, *_: object) -> None:
        """Let the model go."""
        self._model = None
        self._strengths = []

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.base / TOKENIZER)

    def tokens(self, text: str) -> list[int]:
        """The ids of a text by the model's own tokenizer, with the special tokens before it.

        Raises:
            MissingFile, InvalidBank: The folder has no `tokenizer.json`, or none that can be used.
        """
        (ids,) = self._tokenizer.prompts([text])
        return ids

    def answers(
        self,
        prompts: Sequence[Prompt],
        scales: Sequence[float] = (),
        most_tokens: int = 128,
        progress: Callable[[int], object] | None = None,
    ) -> list[tuple[str, list[int]]]:
        """What the model says after each prompt, as `Llama.answers`.

        Returns:
            Of each prompt the text, empty where the model has no `tokenizer.json`, and its token
            ids, with that which ended it.

        Raises:
            InvalidSetting: A prompt has no token, or does not fit into the model's context.
        """
        rows = [prompt if isinstance(prompt, list) else self.tokens(prompt) for prompt in prompts]
        found: list[list[int]] = []
        with self._acting(scales):
            for start in range(0, len(rows), self.slots):
                found += self._continued(rows[start : start + self.slots], most_tokens)
                if progress is not None:
                    progress(len(found))
        if not self._tokenizer.path.exists():
            return [("", ids) for ids in found]
        texts = self._tokenizer.decode([_before(ids, self._ends) for ids in found])
        return list(zip(texts, found, strict=True))

    @property
    def _ends(self) -> set[int]:
        """The ids of which each ends a text."""
        ends = self._model.generation_config.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends or ())

    def _continued(self, rows: Sequence[list[int]], most_tokens: int) -> list[list[int]]:
        """The ids that follow each row, up to one that ends a text, and that one."""
        import torch
        from transformers import GenerationConfig

        length = max(map(len, rows))
        most = self.limit
        if not all(rows):
            raise InvalidSetting(f"`{self.base}`: a prompt has no token to go on from")
        if most is not None and length + most_tokens > most:
            raise InvalidSetting(
                f"`{self.base}`: {length} tokens and an answer of {most_tokens} do not fit into "
                f"its context of {most}"
            )
        said = self._model.generate(
            input_ids=torch.tensor([[0] * (length - len(row)) + row for row in rows]),
            attention_mask=torch.tensor(
                [[0] * (length - len(row)) + [1] * len(row) for row in rows]
            ),
            # A new one: what the model's own says of chance or repetition is not greedy.
            generation_config=GenerationConfig(
                max_new_tokens=most_tokens,
                do_sample=False,
                eos_token_id=sorted(self._ends) or None,
                pad_token_id=0,
            ),
        )
        answers: list[list[int]] = said[:, length:].tolist()
        return [row[: len(_before(row, self._ends)) + 1] for row in answers]

    def _load_adapters(self) -> None:
        """Put the adapters into the model, each under its number."""
        if not self.adapters:
            return
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        for number, path in enumerate(self.adapters):
            with _refusals(path):
                if number == 0:
                    wrapped = PeftModel.from_pretrained(
                        self._model, path, adapter_name="0", torch_device="cpu"
                    )
                else:
                    wrapped.load_adapter(path, adapter_name=str(number), torch_device="cpu")
        self._tuner = wrapped.base_model
        self._strengths = [
            (module.scaling, name, strength)
            for module in self._model.modules()
            if isinstance(module, LoraLayer)
            for name, strength in module.scaling.items()
        ]

    @contextmanager
    def _acting(self, scales: Sequence[float]) -> Iterator[None]:
        """The adapters act as strongly as their scales say, while the block lasts."""
        given = list(scales) or [0.0] * len(self.adapters)
        if len(given) != len(self.adapters):
            raise InvalidSetting(f"{len(given)} scales for {len(self.adapters)} adapters")
        if not self.adapters:
            yield
            return
        for scaling, name, strength in self._strengths:
            scaling[name] = strength * given[int(name)]
        acting = [str(number) for number, scale in enumerate(given) if scale]
        if acting:
            self._tuner.enable_adapter_layers()
            self._tuner.set_adapter(acting)
        else:
            self._tuner.disable_adapter_layers()
        yield


def _before(ids: Sequence[int], ends: set[int]) -> list[int]:
    return list(takewhile(lambda one: one not in ends, ids))


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Say of what file or folder the libraries' own errors are.

    Raises:
        InvalidSetting: One occurred, of whatever kind.
    """
    try:
        with warnings.catch_warnings():
            # What one of them has to change in its use of another is no matter of the user's.
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            yield
    except Exception as error:  # they raise nothing more precise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InvalidSetting(f"`{path}`: transformers does not load it: {reason}") from error
