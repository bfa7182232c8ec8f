"""Writes the malformed inputs that are too large or too special to keep as files.

Usage: python make_malformed.py OUT_DIR [--big]

`--big` also writes the ones of 50 to 100 MB. What was written, and the answer that a good tool
should give, is listed in OUT_DIR/made.json.
"""

import json
import os
import struct
import sys
from pathlib import Path

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "tiny-mistral",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
}
WEIGHTS = "adapter_model.safetensors"


class Maker:
    """Writes into one folder and remembers what it wrote."""

    def __init__(self, out):
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.made = []

    def note(self, path, what, expect="error"):
        self.made.append({"path": path, "what": what, "expect": expect})

    def adapter(self, name):
        folder = self.out / name
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        return folder

    def file(self, name, chunks, what, expect="error"):
        path = self.out / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.writelines(chunks)
        self.note(name, what, expect)

    def weights(self, name, header, what, expect="error"):
        self.adapter(name)
        self.file(f"{name}/{WEIGHTS}", [struct.pack("<Q", len(header)), header], what, expect)

    def special_files(self):
        for name, target, what in [
            ("sym_outside", "/etc/hostname", "weights are a symlink to what is no safetensors"),
            ("sym_loop", WEIGHTS, "symlink to itself"),
            ("sym_dangling", "gone.safetensors", "dangling symlink"),
            ("dev_zero", "/dev/zero", "weights are a link to an endless device"),
        ]:
            (self.adapter(name) / WEIGHTS).symlink_to(target)
            self.note(name, what)
        bank = self.out / "bank_dir_loop"
        bank.mkdir()
        (bank / "again").symlink_to(".")
        self.note("bank_dir_loop", "bank with a symlink to itself: walking must end")
        os.mkfifo(self.adapter("fifo") / WEIGHTS)
        self.note("fifo", "weights are a FIFO: must not hang")
        path = self.adapter("unreadable") / WEIGHTS
        path.write_bytes(b"x")
        path.chmod(0)
        self.note(f"unreadable/{WEIGHTS}", "no read permission (only meaningful when not root)")
        (self.out / os.fsdecode(b"bad_name_\xff\xfe")).mkdir()
        self.note("bad_name_<ff><fe>", "a folder name that is not UTF-8")

    def headers(self, tensors):
        huge = {"a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
        what = "header claims 1 TiB of data that is not there"
        self.weights("claims_1tb", json.dumps(huge).encode(), what)
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        many = json.dumps({f"t{i}": empty for i in range(tensors)}).encode()
        self.weights("many_tensors", many, "very many empty tensors: quadratic checks show")

    def big(self):
        header = b'{"__metadata__":{"x":"' + b"a" * (100_000_000 - 26) + b'"}}'
        what = "a header just under the cap of 100,000,000 bytes"
        self.weights("header_100mb", header, what, "error (no tensors), in little memory and time")
        self.file(
            "config_100mb_nesting/adapter_config.json",
            [b'{"x":', b"[" * 50_000_000, b"]" * 50_000_000, b"}"],
            "100 MB of nested arrays",
            "error, no stack overflow",
        )
        self.file(
            "config_100mb_string/adapter_config.json",
            [b'{"peft_type":"LORA","x":"', b"a" * 100_000_000, b'"}'],
            "a 100 MB string in the config",
            "error: a size cap on the config file",
        )
        self.file(
            "one_line_50mb.jsonl",
            [b'{"input":"', b"word " * 10_000_000, b'","output":["x"]}\n'],
            "one row of 50 MB",
            "accept (or a clear size limit), memory a small multiple of the row",
        )
        self.file(
            "one_line_50mb_no_newline.jsonl",
            [b"a" * 50_000_000],
            "50 MB without a newline, not JSON",
            "error naming line 1, without echoing the line",
        )
        self.file(
            "million_rows.jsonl",
            (b'{"input":"a b c","output":["d"]}\n' for _ in range(1_000_000)),
            "1,000,000 short rows",
            "accept, streaming",
        )


def make(out, big=False):
    """Write all into `out`; return the list of what was written."""
    maker = Maker(out)
    maker.special_files()
    maker.headers(tensors=200_000 if big else 20_000)
    if big:
        maker.big()
    (maker.out / "made.json").write_text(json.dumps(maker.made, indent=1), encoding="utf-8")
    return maker.made


if __name__ == "__main__":
    print(len(make(sys.argv[1], big="--big" in sys.argv)), "written")
