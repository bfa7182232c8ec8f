"""A base model that answers, with and without adapters: llama.cpp, served on loopback.

It comes from the package `xllamacpp` (extra `llama`), which holds llama.cpp itself. Adapters are
loaded once; every request says how strongly each of them acts, so that a mixture needs no merging:
scales add up what adapters do.

It runs in a process of its own: within ours its end could wait for ever, and an assertion that
fails in it would end us. That process ends when its standard input does, however this one ended.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

from lorameta_rs import _core
from lorameta_rs.errors import InvalidSetting, MissingExtra, MissingFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    Prompt = str | list[int]

# Enough to leave no other token a chance, and far from the end of float32.
_FORCED = 1e4
_ERRORS = 1  # llama.cpp's level of talk that tells what goes wrong, and little else
_SECONDS = 600


class Llama:
    """A base model in GGUF, for as long as a `with` block lasts.

    Within it `limit` is the context that the model was made for; None if its file does not say.
    """

    def __init__(
        self,
        base: Path,
        adapters: Sequence[Path] = (),
        *,
        context: int = 2048,
        slots: int = 4,
        threads: int = 0,
        names: Sequence[Path] | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            base: The model, a GGUF file.
            adapters: GGUF files of adapters for it.
            context: Tokens that a prompt and its answer may have together.
            slots: Requests that are worked on side by side.
            threads: Of the computation; 0 for half as many as the machine says it has cores: they
                wait for each other by spinning, and stall where one has no core of its own.
            names: What errors call the adapters, where these files were made of others.
        """
        self.base = base
        self.adapters = list(adapters)
        self.names = self.adapters if names is None else list(names)
        self.context = context
        self.slots = slots
        self.threads = threads or max(1, (os.cpu_count() or 1) // 2)
        self.limit: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._address = ""

    def __enter__(self) -> Self:
        """Load the model and the adapters.

        Raises:
            MissingExtra: `xllamacpp` is not installed.
            MissingFile: A file is not there.
            InvalidAdapter: The base is no GGUF file.
            InvalidSetting: llama.cpp refuses the model or an adapter; the message has its words.
        """
        if find_spec("xllamacpp") is None:
            what = "running a model needs llama.cpp: pip install 'lorameta-rs[llama]'"
            raise MissingExtra(what)
        for path in (self.base, *self.adapters):
            if not path.is_file():
                raise MissingFile(2, "no such file", str(path))
        known = _core.gguf_metadata(os.fspath(self.base))
        # llama.cpp gives no more than that, whatever context it is asked for.
        limit = known.get(f"{known.get('general.architecture')}.context_length")
        self.limit = limit if isinstance(limit, int) else None
        settings = {
            "base": os.fspath(self.base),
            "adapters": [os.fspath(path) for path in self.adapters],
            "context": self.context * self.slots,
            "slots": self.slots,
            "threads": self.threads,
        }
        with tempfile.TemporaryFile() as chatter:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lorameta_rs.llama", json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=chatter,
                start_new_session=True,  # Ctrl-C is for us, who then end it
            )
            assert self._process.stdout is not None
            self._address = self._process.stdout.readline().decode().strip()
            if not self._address:
                chatter.seek(0)
                said = chatter.read().decode(errors="replace")
                self.__exit__()
                for path, name in zip(self.adapters, self.names, strict=True):
                    said = said.replace(str(path), str(name))
                names = ", ".join(f"`{path}`" for path in (self.base, *self.names))
                raise InvalidSetting(f"llama.cpp does not load {names}: {_reason(said)}")
        return self

    def __exit__(self, *_: object) -> None:
        """End the server, whatever it is doing."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        self._process = None

    def tokens(self, text: str) -> list[int]:
        """The ids of a text by the model's own tokenizer, with its special tokens."""
        found = self._post("tokenize", {"content": text, "add_special": True})
        ids: list[int] = found["tokens"]
        return ids

    def answers(
        self,
        prompts: Sequence[Prompt],
        scales: Sequence[float] = (),
        most_tokens: int = 128,
        progress: Callable[[int], object] | None = None,
    ) -> list[tuple[str, list[int]]]:
        """What the model says after each prompt, always taking the likeliest token.

        Args:
            prompts: Texts, or token ids with the special tokens that belong to them.
            scales: How strongly each adapter acts, in the order of `adapters`; none of them unless
                given. Any number is right: 0 is off.
            most_tokens: The longest answer.
            progress: Told how many are done.

        Returns:
            Of each prompt the text as the model's own tokenizer has it, and its token ids.

        Raises:
            InvalidSetting: A prompt does not fit into the context.
        """

        def one(prompt: Prompt) -> tuple[str, list[int]]:
            body = {
                "prompt": prompt,
                "n_predict": most_tokens,
                "temperature": 0.0,
                "return_tokens": True,
                "cache_prompt": False,
            }
            found = self._post("completion", self._with(scales) | body)
            return found["content"], found["tokens"]

        return self._each(one, prompts, progress)

    def log_likelihoods(
        self,
        rows: Sequence[tuple[list[int], list[int]]],
        scales: Sequence[float] = (),
        progress: Callable[[int], object] | None = None,
    ) -> list[list[float]]:
        """The natural logarithm of the probability of each token of given answers.

        The server tells the probabilities of what it says: so it is made to say the answer, one
        token a request, while the prompt stays in its cache. A row costs one pass over its prompt
        and about a millisecond and one token's computation for each token of its answer.

        Args:
            rows: The ids of each prompt, and those of the answer to it.
            scales: As `answers`; also negative, or above one.
            progress: Told how many rows are done.

        Returns:
            One list for each row, as long as its answer.

        Raises:
            InvalidSetting: A row does not fit into the context.
        """

        def one(row: tuple[list[int], list[int]]) -> list[float]:
            prompt, answer = row
            found = []
            for place, token in enumerate(answer):
                body = {
                    "prompt": prompt + answer[:place],
                    "n_predict": 1,
                    "temperature": -1.0,  # greedy, with the probabilities told
                    "n_probs": 1,
                    "logit_bias": [[token, _FORCED]],
                }
                said = self._post("completion", body | self._with(scales))
                (probability,) = said["completion_probabilities"]
                if probability["id"] != token:
                    raise InvalidSetting(f"`{self.base}` has no token {token}: another tokenizer?")
                found.append(float(probability["logprob"]))
            return found

        return self._each(one, rows, progress)

    def _with(self, scales: Sequence[float]) -> dict[str, Any]:
        given = list(scales) or [0.0] * len(self.adapters)
        if len(given) != len(self.adapters):
            raise InvalidSetting(f"{len(given)} scales for {len(self.adapters)} adapters")
        lora = [{"id": number, "scale": scale} for number, scale in enumerate(given)]
        return {"cache_prompt": True, "lora": lora}

    def _each(
        self,
        work: Callable[[Any], Any],
        things: Iterable[Any],
        progress: Callable[[int], object] | None,
    ) -> list[Any]:
        """The work on each thing, as many side by side as there are slots; the order is kept."""
        pool = ThreadPoolExecutor(self.slots)
        try:
            found = []
            for answer in pool.map(work, things):
                found.append(answer)
                if progress is not None:
                    progress(len(found))
            return found
        finally:
            pool.shutdown(cancel_futures=True)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """What the server answers; it listens on this machine alone."""
        request = urllib.request.Request(
            f"{self._address}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        # No proxy: what the environment names would be asked for this machine itself.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")[:300]
            raise InvalidSetting(f"`{self.base}`: llama.cpp says: {said}") from None
        except (OSError, http.client.HTTPException) as error:
            raise InvalidSetting(f"`{self.base}`: llama.cpp has ended: {error}") from error


def _reason(chatter: str) -> str:
    """The first things that llama.cpp calls errors, or else the last that it said."""
    errors = [line.partition(" E ")[2].strip() for line in chatter.splitlines() if " E " in line]
    return "; ".join(errors[:2]) or chatter.strip().rpartition("\n")[2] or "it says nothing"


def _serve(settings: dict[str, Any]) -> None:
    """Serve until standard input ends: what the process does that a `Llama` starts."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = settings["base"]
    parameters.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in settings["adapters"]
    ]
    parameters.n_ctx = settings["context"]
    parameters.n_parallel = settings["slots"]
    parameters.cpuparams.n_threads = settings["threads"]
    parameters.cpuparams_batch.n_threads = settings["threads"]
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.verbosity = _ERRORS
    # Its cache of earlier prompts does not ask which adapters were on when it computed them.
    parameters.cache_ram_mib = 0
    # In 16 bits, as is usual, a cache changes log-probabilities by 1e-3.
    parameters.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # the server would first finish what it was asked for


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
