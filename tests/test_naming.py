"""Files of kohya and diffusers: what each name means, how strongly it acts, and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

RANK = 2
# Of each module of a pipeline, the shape of its weight. Names hold `_` themselves, so that kohya's,
# which have it for every dot, cannot be undone by putting the dots back.
UNET = {
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": (6, 6),
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0": (6, 6),
    "mid_block.resnets.0.conv1": (8, 4, 3, 3),
    "mid_block.resnets.0.conv_shortcut": (8, 4, 1, 1),
}
TEXT = {
    "text_model.encoder.layers.0.self_attn.q_proj": (5, 5),
    "text_model.encoder.layers.0.mlp.fc1": (7, 5),
}
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


def drawn(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def factors(shape, seed):
    """A and B as a trainer has them; of a convolution, A has its kernel."""
    return drawn(seed, (RANK, *shape[1:])), drawn(
        seed + 1, (shape[0], RANK, *[1] * (len(shape) - 2))
    )


def delta(a, b, scaling):
    """What they add to the weight, in float64; a convolution by its own sum over the ranks."""
    return scaling * np.einsum(
        "or,r...->o...", b.reshape(len(b), RANK).astype(float), a.astype(float)
    )


@pytest.fixture
def pipeline(tmp_path):
    """The folder of a base: an image model and a text encoder, as diffusers saves them."""
    for component, modules in (("unet", UNET), ("text_encoder", TEXT)):
        folder = tmp_path / "base" / component
        folder.mkdir(parents=True)
        weights = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in modules.items()}
        save_file(weights, folder / "model.safetensors")
    return tmp_path / "base"


@pytest.fixture
def converted(lorameta, tmp_path):
    """A function that converts a file to PEFT: what ended up of it, or what was said against it."""

    def run(tensors, base=None, metadata=None):
        file, out = tmp_path / "made.safetensors", tmp_path / "out"
        save_file(tensors, file, metadata)
        given = [] if base is None else ["--base-config", base]
        status, _, err = lorameta("convert", file, "-o", out, "--to", "peft", *given)
        assert (status == 0) == out.exists()
        return err if status else out

    return run


def deltas(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    begin, end = "base_model.model.", ".lora_A.weight"
    return {
        name.removeprefix(begin).removesuffix(end): delta(
            tensors[name],
            tensors[name.replace("lora_A", "lora_B")],
            config["lora_alpha"] / config["r"],
        )
        for name in tensors
        if name.endswith(end)
    }


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for module, one in wanted.items():
        np.testing.assert_allclose(found[module], one, rtol=1e-5, atol=1e-6, err_msg=module)


def test_kohyas_names_are_those_of_the_base_and_alpha_is_its_own(converted, pipeline):
    tensors, wanted = {}, {"unet": {}, "text_encoder": {}}
    alphas = {0: np.array(1.0, np.float32), 1: np.array([3.0], np.float16), 2: None}
    for component, modules in (("unet", UNET), ("text_encoder", TEXT)):
        for i, (module, shape) in enumerate(modules.items()):
            a, b = factors(shape, 10 * i + len(component))
            name = KOHYA[component] + module.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
            alpha = alphas[i % 3]
            if alpha is not None:
                tensors[f"{name}.alpha"] = alpha
            # Without an alpha, alpha is the rank.
            scaling = 1.0 if alpha is None else float(alpha.reshape(())) / RANK
            wanted[component][module] = delta(a, b, scaling)
    out = converted(tensors, pipeline)
    for component, modules in wanted.items():
        same(deltas(out / component), modules)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (".lora.down.weight", ".lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        (".lora_A.weight", ".lora_B.weight"),
    ],
)
def test_diffusers_names_are_the_modules(converted, down, up):
    tensors, wanted = {}, {}
    for i, (module, shape) in enumerate(UNET.items()):
        a, b = factors(shape, i)
        tensors |= {f"unet.{module}{down}": a, f"unet.{module}{up}": b}
        wanted[module] = delta(a, b, 1.0)
    same(deltas(converted(tensors)), wanted)


def test_old_attention_processors_are_the_layers_they_stood_for(converted):
    a, b = factors((6, 6), 1)
    begin = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor"
    text = "text_encoder.text_model.encoder.layers.0.self_attn"
    tensors = {
        f"{begin}.to_q_lora.down.weight": a,
        f"{begin}.to_q_lora.up.weight": b,
        f"{begin}.to_out_lora.down.weight": 2 * a,
        f"{begin}.to_out_lora.up.weight": b,
        f"{text}.to_q_lora.down.weight": 3 * a,
        f"{text}.to_q_lora.up.weight": b,
    }
    out = converted(tensors)
    one = delta(a, b, 1.0)
    q, to_out = list(UNET)[:2]
    same(deltas(out / "unet"), {q: one, to_out: 2 * one})
    same(deltas(out / "text_encoder"), {next(iter(TEXT)): 3 * one})


def test_the_configuration_that_diffusers_recorded_holds(converted):
    module = next(iter(UNET))
    a, b = factors((6, 6), 1)
    tensors = {f"unet.{module}.lora_A.weight": a, f"unet.{module}.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 5, "target_modules": ["to_q"]}
    recorded = {f"unet.{key}": value for key, value in config.items()}
    out = converted(tensors, metadata={"lora_adapter_metadata": json.dumps(recorded)})
    same(deltas(out), {module: delta(a, b, 5 / RANK)})


def test_a_record_that_is_no_json_is_refused(converted):
    a, b = factors((6, 6), 1)
    tensors = {"unet.x.lora_A.weight": a, "unet.x.lora_B.weight": b}
    broken = {"lora_adapter_metadata": "{half"}
    assert "`lora_adapter_metadata` is not JSON" in converted(tensors, metadata=broken)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_unet_mid_block_nowhere": None}, "`lora_unet_mid_block_nowhere` names no module"),
        ({"alpha": np.ones(2, np.float32)}, "expected one number"),
        ({"alpha": np.array(np.nan, np.float32)}, "is nan, expected a finite number"),
        ({".dora_scale": np.ones((6, 1), np.float32)}, "is no half of a plain LoRA"),
        ({".hada_w1_a": np.ones((6, 2), np.float32)}, "is no half of a plain LoRA"),
        ({"stray": None}, "`stray` is not one of kohya's names"),
        ({"half": None}, "has no lora_B"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(converted, pipeline, change, words):
    name = "lora_unet_" + next(iter(UNET)).replace(".", "_")
    a, b = factors((6, 6), 1)
    tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    ((key, value),) = change.items()
    if key == "half":
        del tensors[f"{name}.lora_up.weight"]
    elif value is None:
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
    else:
        tensors[f"{name}{key}" if key.startswith(".") else f"{name}.{key}"] = value
    assert words in converted(tensors, pipeline)


def test_a_name_that_two_modules_have_is_refused(converted, tmp_path):
    weights = {f"{name}.weight": np.zeros((6, 6), np.float32) for name in ("a.b_c", "a_b.c")}
    save_file(weights, tmp_path / "base.safetensors")
    a, b = factors((6, 6), 1)
    tensors = {"lora_unet_a_b_c.lora_down.weight": a, "lora_unet_a_b_c.lora_up.weight": b}
    assert "names several modules" in converted(tensors, tmp_path / "base.safetensors")
    (tmp_path / "empty").mkdir()
    assert "holds no safetensors file" in converted(tensors, tmp_path / "empty")
    assert "kohya's names" in converted(tensors)


def test_a_file_of_neither_is_told_what_an_adapter_is(converted):
    assert "none of its tensors has a name" in converted({"x": np.zeros(3, np.float32)})
