import json
import math
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorameta_rs.config import AdapterConfig, as_json, portable_config
from lorameta_rs.config_fields import FILE_NAME
from lorameta_rs.errors import InvalidAdapter, MissingFile, UnreadableFile

MALFORMED = Path(__file__).parent / "golden" / "malformed"
MODULES = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]

# The others of kind `adapter` are about tensors, or about members that differ.
ABOUT_THE_CONFIG = {"ok", "dora", "bias_all", "lora_bias", "fan_in_fan_out", "layer_replication"}
ABOUT_THE_BANK = ["config_r_missing", "config_base_other", "config_base_same_other_spelling"]


@pytest.fixture
def load(tmp_path):
    """A function that loads a configuration with the given fields."""

    def load(**fields):
        complete = {"peft_type": "LORA", "base_model_name_or_path": "base", **fields}
        (tmp_path / FILE_NAME).write_text(json.dumps(complete), encoding="utf-8")
        return AdapterConfig.load(tmp_path)

    return load


def malformed():
    entries = json.loads((MALFORMED / "adapters.json").read_text(encoding="utf-8"))["entries"]
    for entry in entries:
        name = entry["path"].removeprefix("adapters/")
        if (entry["class"] == "config" or name in ABOUT_THE_CONFIG) and name not in ABOUT_THE_BANK:
            yield pytest.param(entry, id=name)


@pytest.mark.parametrize("entry", list(malformed()))
def test_malformed(entry):
    folder = MALFORMED / entry["path"]
    if entry["expect"] == "error":
        with pytest.raises(InvalidAdapter) as caught:
            AdapterConfig.load(folder).ranks(MODULES)
        assert str(folder / FILE_NAME) in str(caught.value)
        said = str(caught.value).replace(str(folder), "")
    else:
        config = AdapterConfig.load(folder)
        assert config.ranks(MODULES) == [2] * 4
        assert config.scalings([(module, 2) for module in MODULES])
        said = "\n".join(config.warnings)
        assert bool(said) == (entry["expect"] == "warn")
    for name in entry["message_should_name"]:
        assert name in said


@pytest.mark.parametrize("name", ABOUT_THE_BANK)
def test_what_only_the_bank_can_judge_is_accepted(name):
    assert AdapterConfig.load(MALFORMED / "adapters" / name).warnings == ()


def test_folder_of_mlx_is_recognised():
    with pytest.raises(InvalidAdapter, match=r"fine_tune_type.*mlx.*adapters\.safetensors"):
        AdapterConfig.load(MALFORMED / "adapters" / "mlx_folder")


def test_absent_fields_have_the_defaults_of_peft(load):
    config = load()
    assert (config.r, config.lora_alpha) == (8, 8.0)
    assert (config.use_rslora, config.fan_in_fan_out) == (False, False)
    assert (config.rank_pattern, config.alpha_pattern) == ({}, {})
    assert (config.target_modules, config.layer_replication, config.task_type) == (None,) * 3
    assert (config.extra, config.warnings) == ({}, ())


def test_file_and_folder_are_the_same(load, tmp_path):
    assert load(r=4) == AdapterConfig.load(tmp_path / FILE_NAME)
    assert load(r=4) == AdapterConfig.load(str(tmp_path))


def test_other_fields_are_kept(load):
    assert load(bias="none", revision="main").extra == {"bias": "none", "revision": "main"}


def test_numbers_are_kept_exactly(load):
    assert load(lora_alpha=4.5).lora_alpha == 4.5
    assert load(r=2.0).r == 2
    assert load(r=2**20).r == 2**20


@pytest.mark.parametrize("r", [0, True, 2**20 + 1, 1e300, math.inf, {}])
def test_rank_out_of_range(load, r):
    with pytest.raises(InvalidAdapter, match=r"`r` is .*, expected an integer from 1 to 1048576\n"):
        load(r=r)


@pytest.mark.parametrize("alpha", [True, None, [16], -math.inf, 10**400])
def test_alpha_that_is_no_finite_number(load, alpha):
    with pytest.raises(InvalidAdapter, match=r"`lora_alpha` is .*, expected a finite number\n"):
        load(lora_alpha=alpha)


@pytest.mark.parametrize("field", ["use_rslora", "fan_in_fan_out"])
@pytest.mark.parametrize("value", ["false", 0, []])
def test_flag_that_is_no_boolean(load, field, value):
    with pytest.raises(InvalidAdapter, match=f"`{field}` is .*, expected true or false"):
        load(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 0.1}),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(load, field, value):
    with pytest.raises(InvalidAdapter, match=f"`{field}` is .*, which cannot be merged: "):
        load(**{field: value})
    assert load(**{field: None}).warnings == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", ["q_proj", 7]),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"\ud800": 1}),
        ("base_model_name_or_path", 7),
        ("base_model_name_or_path", "\ud800"),
        ("layer_replication", 2),
        ("peft_type", "lora"),
        ("peft_type", ["LORA"]),
    ],
)
def test_field_of_another_type(load, field, value):
    with pytest.raises(InvalidAdapter, match=rf"`{field}.* is .*, expected "):
        load(**{field: value})


def test_long_and_hostile_values_are_shown_short_and_escaped(load):
    with pytest.raises(InvalidAdapter) as caught:
        load(r="\x1b[2J" + "9" * 1000)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_names_given_twice_are_reported_once_and_bounded(tmp_path):
    twice = "".join(f'"x{i}": 1, "x{i}": 2, ' for i in range(1000))
    (tmp_path / FILE_NAME).write_text(
        "{" + twice + '"peft_type": "LORA", "base_model_name_or_path": "base"}'
    )
    (warning,) = AdapterConfig.load(tmp_path).warnings
    assert '"x0"' in warning
    assert len(warning) < 100


@pytest.mark.parametrize("name", ["pissa_niter_16", "PiSSA", "olora", "loftq"])
def test_initialisation_that_changes_the_base_is_reported(load, name):
    config = load(init_lora_weights=name)
    assert "`init_lora_weights`" in config.warnings[0]
    assert config.extra["init_lora_weights"] == name
    assert load(init_lora_weights="gaussian").warnings == ()


@pytest.mark.parametrize("targets", ["all-linear", r"(?!x).*\.(q|v)_proj", "[[a]", ["(", "q"], []])
def test_targets_that_are_not_reported(load, targets):
    config = load(target_modules=targets)
    assert (config.target_modules, config.warnings) == (targets, ())


@pytest.mark.parametrize("targets", ["(", "a{99999999999}", "(" * 9000 + ")" * 9000, "a" * 10**6])
def test_targets_that_are_no_usable_expression(load, targets):
    assert "`target_modules`" in load(target_modules=targets).warnings[0]


def test_first_pattern_in_the_order_of_the_file_counts(load):
    config = load(r=8, rank_pattern={"layers.0.self_attn.q_proj": 4, "v_proj": 2, "q_proj": 16})
    assert config.ranks(MODULES) == [4, 8, 2, 8]
    assert config.ranks(["model.layers.1.self_attn.q_proj", "q_proj", "xq_proj"]) == [16, 16, 8]


def test_key_matches_from_a_dot_to_the_end(load):
    config = load(rank_pattern={"q|v": 1, "layers.*1": 2})
    modules = ["a.q", "a.v", "a.q.b", "aq", "layers.x.1", "layers.11.b"]
    assert config.ranks(modules) == [1, 1, 8, 8, 2, 8]


def test_scaling_is_alpha_over_the_rank_of_the_tensors(load):
    config = load(r=8, lora_alpha=16, alpha_pattern={"k_proj": 4.0, "v_proj": 32})
    ranks = zip(MODULES, [8, 8, 2, 4], strict=True)
    assert config.scalings(list(ranks)) == [2.0, 0.5, 16.0, 4.0]


def test_scaling_of_rslora(load):
    config = load(lora_alpha=16, use_rslora=True)
    assert config.scalings([("q", 16), ("k", 8)]) == [4.0, 16 / math.sqrt(8)]


def test_without_patterns_the_core_is_not_needed(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "lorameta_rs._core", None)
    assert load(r=4).ranks(MODULES) == [4] * 4
    assert load(r=4).scalings([("q", 4)]) == [2.0]


def test_pattern_that_is_no_expression_names_file_and_field(load, tmp_path):
    with pytest.raises(InvalidAdapter) as caught:
        load(alpha_pattern={"(q_proj": 1}).scalings([("q_proj", 4)])
    assert str(caught.value).startswith(f"`{tmp_path / FILE_NAME}`: `alpha_pattern`: ")


def test_missing_folder_and_missing_file(tmp_path):
    for source, missing in [(tmp_path / "gone", "gone"), (tmp_path, FILE_NAME)]:
        with pytest.raises(MissingFile) as caught:
            AdapterConfig.load(source)
        assert caught.value.filename == str(tmp_path / missing)
        assert FILE_NAME in str(caught.value)


def test_file_that_the_system_refuses(load, tmp_path, monkeypatch):
    load()

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UnreadableFile) as caught:
        AdapterConfig.load(tmp_path)
    assert (caught.value.errno, caught.value.filename) == (13, str(tmp_path / FILE_NAME))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with a name")
def test_pipe_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / FILE_NAME)
    with pytest.raises(InvalidAdapter, match="expected a regular file"):
        AdapterConfig.load(tmp_path)


def test_directory_under_the_name(tmp_path):
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(InvalidAdapter, match="expected a regular file"):
        AdapterConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b" " * (4 * 2**20 + 1), "larger than 4 MiB"),
        (b'{"x":' + b"[" * 10**6 + b"]" * 10**6 + b"}", "nested too deeply"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "not JSON"),
        ('{"r": 2}'.encode("utf-16"), "not JSON in UTF-8"),
        (b"", "not JSON"),
        (b'"LORA"', 'expected a JSON object, found "LORA"'),
    ],
    ids=["size", "nesting", "digits", "utf-16", "empty", "text"],
)
def test_file_that_is_no_configuration(tmp_path, data, message):
    (tmp_path / FILE_NAME).write_bytes(data)
    with pytest.raises(InvalidAdapter, match=message):
        AdapterConfig.load(tmp_path)


FIELDS = ["peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"]
FIELDS += ["target_modules", "bias", "use_dora", "layer_replication", "init_lora_weights", "x"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["LORA", "(", "é"]),
    lambda values: st.lists(values) | st.dictionaries(st.sampled_from(["q_proj", "("]), values),
    max_leaves=4,
)


@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_object_is_read_or_refused(tmp_path_factory, fields):
    path = tmp_path_factory.getbasetemp() / FILE_NAME
    path.write_text(json.dumps(fields), encoding="utf-8")
    try:
        config = AdapterConfig.load(path)
    except InvalidAdapter:
        return
    assert 1 <= config.r <= 2**20
    assert math.isfinite(config.lora_alpha)


def test_portable_config_is_read_back_without_a_doubt(tmp_path):
    config = portable_config("mistralai/é", 16, 16.0, ["v_proj", "q_proj", "q_proj"])
    (tmp_path / FILE_NAME).write_text(as_json(config), encoding="utf-8")
    back = AdapterConfig.load(tmp_path)
    assert back.warnings == ()
    assert (back.base_model_name_or_path, back.r, back.lora_alpha) == ("mistralai/é", 16, 16.0)
    assert back.target_modules == ["q_proj", "v_proj"]
    assert back.scalings([("q_proj", 16)]) == [1.0]


def test_portable_config_in_full():
    assert as_json(portable_config("base", 8, 8.0, ["q_proj"], task_type="CAUSAL_LM")) == (
        """{
  "alpha_pattern": {},
  "base_model_name_or_path": "base",
  "bias": "none",
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "lora_alpha": 8,
  "lora_dropout": 0.0,
  "modules_to_save": null,
  "peft_type": "LORA",
  "r": 8,
  "rank_pattern": {},
  "target_modules": [
    "q_proj"
  ],
  "task_type": "CAUSAL_LM",
  "use_dora": false,
  "use_rslora": false
}
"""
    )


def test_portable_config_keeps_an_alpha_that_is_no_integer():
    assert portable_config(None, 2, 4.5, [])["lora_alpha"] == 4.5
