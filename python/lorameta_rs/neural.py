"""The pipeline that is learned from a bank: softmin of f(z), f a small network of one number.

f is Linear 1 → h, LayerNorm, ReLU, Linear h → h, LayerNorm, ReLU, Linear h → 1, and z a dataset's
standardised distances. It is trained so that each member is as near as possible to its mixture of
the others, C X ≈ X. The loss knows the members X only by their inner products G = X Xᵀ:
‖CX − X‖² = tr((C − I) G (C − I)ᵀ), with the slope 2 (C − I) G towards C. Adam takes full batches.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorameta_rs.errors import InvalidBank, InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from lorameta_rs._metrics import Floats

    Numbers = NDArray[np.floating]
    Weights = Mapping[str, Numbers]

PAPER_WIDTH = 4000
PAPER_EPOCHS = 40
EPSILON = 1e-5
"""Of LayerNorm."""
RATE = 1e-3
DECAYS = 0.9, 0.999
TINY = 1e-8
"""Beside the root of Adam's second moment."""
NAMES = tuple(f"mlp.{layer}.{kind}" for layer in (0, 1, 3, 4, 6) for kind in ("weight", "bias"))
"""The network's tensors, as the authors' module has them: 0, 3 and 6 are linear, 1 and 4 norms."""


@dataclass(frozen=True, eq=False)
class Training:
    """A network, and how it came to be."""

    weights: dict[str, Numbers]
    """By `NAMES`; all of one dtype."""
    losses: list[float]
    """Before each epoch's step: the mean squared difference, over members and numbers."""


def initial_weights(
    width: int, seed: int = 0, dtype: type[np.floating] = np.float64
) -> dict[str, Numbers]:
    """PyTorch's initial values in distribution: linear layers uniform within ±1/√inputs.

    Args:
        width: h, 1 or more; the authors have `PAPER_WIDTH`.
        seed: Of numpy's generator.
        dtype: In which the network will compute; the authors' is float32.

    Raises:
        InvalidSetting: `width` is below 1.
    """
    if width < 1:
        raise InvalidSetting(f"width {width}: expected 1 or more")
    generator = np.random.default_rng(seed)
    weights: dict[str, Numbers] = {}
    for name, shape in _shapes(width).items():
        if name.startswith(("mlp.1", "mlp.4")):
            weights[name] = np.full(shape, 1.0 if name.endswith("weight") else 0.0)
        else:
            bound = 1.0 if name.startswith("mlp.0") else width**-0.5
            weights[name] = generator.uniform(-bound, bound, shape)
    return {name: tensor.astype(dtype) for name, tensor in weights.items()}


def is_network(weights: Mapping[str, NDArray[Any]]) -> bool:
    """Whether these are the tensors of a network, in shapes that fit each other and one type."""
    width = weights["mlp.0.bias"].size if "mlp.0.bias" in weights else 0
    found = {name: tensor.shape for name, tensor in weights.items()}
    return found == _shapes(width) and len({tensor.dtype for tensor in weights.values()}) == 1


def _shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Of each tensor of a network, in the order of `NAMES`."""
    linear = {0: (width, 1), 3: (width, width), 6: (1, width)}
    return {
        f"mlp.{layer}.{kind}": shape
        for layer in (0, 1, 3, 4, 6)
        for kind, shape in (
            ("weight", linear.get(layer, (width,))),
            ("bias", (1 if layer == 6 else width,)),
        )
    }


def paper_members(count: int) -> list[int]:
    """The four fifths of a bank's members that the authors train on."""
    return random.Random(42).sample(range(count), int(0.8 * count))


def standardised(distances: Floats) -> Floats:
    """Each row's z = (d − mean)/std, over all of it: a dataset's zero from itself is part of it.

    Args:
        distances: [rows, n]; a row is what `normalized` standardises: the distances of one dataset
            from all members, and its own.

    Raises:
        InvalidBank: A distance is not finite.
    """
    if not np.isfinite(distances).all():
        raise InvalidBank("the distances are not all finite")
    deviations = distances.std(axis=1, keepdims=True)
    z: Floats = (distances - distances.mean(axis=1, keepdims=True)) / np.where(
        deviations > 0.0, deviations, 1.0
    )
    return z


def coefficients(weights: Weights, distances: Floats) -> Floats:
    """softmin(f(z)) of a new dataset's distances.

    Args:
        weights: As `train` found them.
        distances: The members' distances [n], finite.

    Returns:
        float64 [n], sums to one.

    Raises:
        InvalidBank: There are no distances, or one of them is not finite.
    """
    if len(distances) == 0:
        raise InvalidBank("the bank has no members to choose from")
    z = standardised(np.append(distances, 0.0)[None])[0, :-1]
    outputs, _ = _outputs(weights, z.astype(weights[NAMES[0]].dtype))
    c: Floats = _softmin(outputs[None])[0]
    return c


def leave_one_out(weights: Weights, distances: Floats) -> Floats:
    """C [n, n]: each member's coefficients of the others, itself at 0.

    Args:
        weights: As `train` found them.
        distances: [n, n], a row for each member; the diagonal as the metric has it.

    Raises:
        InvalidBank: There are fewer than two members, or a distance is not finite.
    """
    z = _pairs(distances, np.arange(len(distances)))
    return _of_pairs(weights, z.astype(weights[NAMES[0]].dtype))[0]


def train(
    distances: Floats,
    gram: Floats,
    numbers: int,
    weights: Weights,
    epochs: int = PAPER_EPOCHS,
    members: Sequence[int] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Training:
    """Fit the network to a bank, each member left out in turn.

    Args:
        distances: [n, n] between the members' datasets, a row for each, n of 2 or more.
        gram: Inner products of the members [n, n], in the same order (`gram.gram_matrix`).
        numbers: How many numbers a member has, by which the loss is divided: the scale of the
            loss, which Adam hardly sees.
        weights: Where to begin (`initial_weights`), and the dtype to compute in. They stay.
        epochs: Steps of Adam.
        members: Learn from these alone, each as a mixture of the others among them; z is that of
            all members. The authors take `paper_members`.
        progress: Told epochs done, and in all.

    Raises:
        InvalidBank: Distances and inner products are not of the same two or more members, or one
            is not finite.
        InvalidSetting: `epochs` is below 0, or `numbers` below 1.
    """
    chosen = np.arange(len(distances)) if members is None else np.asarray(members)
    if epochs < 0 or numbers < 1:
        raise InvalidSetting(f"epochs {epochs}, numbers {numbers}: expected 0 and 1 or more")
    if gram.shape != distances.shape or not np.isfinite(gram).all():
        raise InvalidBank(
            f"inner products of shape {gram.shape}: expected finite ones of {distances.shape}"
        )
    now = {name: np.array(weights[name]) for name in NAMES}
    z = _pairs(distances, chosen).astype(now[NAMES[0]].dtype)
    scaled = gram[np.ix_(chosen, chosen)] / (len(chosen) * numbers)
    first = {name: np.zeros_like(tensor) for name, tensor in now.items()}
    second = {name: np.zeros_like(tensor) for name, tensor in now.items()}
    losses = []
    for epoch in range(1, epochs + 1):
        loss, slopes = loss_and_gradients(now, z, scaled)
        losses.append(loss)
        for name, slope in slopes.items():
            m, v = first[name], second[name]
            m += (1 - DECAYS[0]) * (slope - m)
            v += (1 - DECAYS[1]) * (slope * slope - v)
            unbiased = np.sqrt(v / (1 - DECAYS[1] ** epoch)) + TINY
            now[name] -= RATE / (1 - DECAYS[0] ** epoch) * m / unbiased
        if progress is not None:
            progress(epoch, epochs)
    return Training(now, losses)


def loss_and_gradients(
    weights: Weights, z: Numbers, gram: Floats
) -> tuple[float, dict[str, Numbers]]:
    """tr((C − I) G (C − I)ᵀ), and its slope towards each tensor of the network.

    Args:
        weights: The network.
        z: Of each member's others [n · (n − 1)], row after row.
        gram: G [n, n].
    """
    c, tape = _of_pairs(weights, z)
    n = len(c)
    difference = c - np.eye(n)
    product = difference @ gram
    loss = float(np.sum(product * difference))
    # Softmin: dc_i/do_j = −c_i (δ_ij − c_j). The diagonal of c is 0, and so is its slope.
    towards_c = 2.0 * product
    towards_o = -c * (towards_c - np.sum(c * towards_c, axis=1, keepdims=True))
    others = towards_o[~np.eye(n, dtype=bool)].astype(z.dtype)
    return loss, _gradients(weights, tape, others)


@dataclass(frozen=True, eq=False)
class _Tape:
    """What the way back through the network needs of the way there."""

    inputs: list[Numbers]
    """Of the linear layers, [rows, features]."""
    normal: list[Numbers]
    """What the norms have before they scale and shift it."""
    deviations: list[Numbers]
    """What the norms divide by."""


def _outputs(weights: Weights, z: Numbers) -> tuple[Numbers, _Tape]:
    """f(z) of each number."""
    tape = _Tape([z[:, None]], [], [])
    for linear, norm in ((0, 1), (3, 4)):
        x = tape.inputs[-1] @ weights[f"mlp.{linear}.weight"].T + weights[f"mlp.{linear}.bias"]
        centred = x - x.mean(axis=1, keepdims=True)
        deviation = np.sqrt(np.mean(centred * centred, axis=1, keepdims=True) + EPSILON)
        normal = (centred / deviation).astype(z.dtype)
        tape.deviations.append(deviation)
        tape.normal.append(normal)
        scaled = normal * weights[f"mlp.{norm}.weight"] + weights[f"mlp.{norm}.bias"]
        tape.inputs.append(np.maximum(scaled, 0))
    last = tape.inputs[-1] @ weights["mlp.6.weight"].T + weights["mlp.6.bias"]
    return last[:, 0], tape


def _gradients(weights: Weights, tape: _Tape, towards: Numbers) -> dict[str, Numbers]:
    """The slopes towards all tensors, from those towards the outputs."""
    slopes: dict[str, Numbers] = {}
    slope = towards[:, None]
    for linear, norm, i in ((6, 4, 1), (3, 1, 0)):
        x = tape.inputs[i + 1]
        slopes[f"mlp.{linear}.weight"] = slope.T @ x
        slopes[f"mlp.{linear}.bias"] = slope.sum(axis=0)
        slope = (slope @ weights[f"mlp.{linear}.weight"]) * (x > 0)
        normal = tape.normal[i]
        slopes[f"mlp.{norm}.weight"] = np.sum(slope * normal, axis=0)
        slopes[f"mlp.{norm}.bias"] = slope.sum(axis=0)
        slope = slope * weights[f"mlp.{norm}.weight"]
        # What a norm takes away, a common shift and a common scale, has no slope.
        along = np.mean(slope * normal, axis=1, keepdims=True)
        slope = (slope - slope.mean(axis=1, keepdims=True) - normal * along) / tape.deviations[i]
    slopes["mlp.0.weight"] = slope.T @ tape.inputs[0]
    slopes["mlp.0.bias"] = slope.sum(axis=0)
    return slopes


def _pairs(distances: Floats, members: NDArray[np.integer]) -> Floats:
    """The z of each of the members' others among them, row after row [n · (n − 1)]."""
    n = len(members)
    if n < 2 or distances.shape != (len(distances),) * 2:
        raise InvalidBank(
            f"distances of shape {distances.shape}, {n} members to learn from: expected those of "
            "each member from all, and 2 or more"
        )
    z: Floats = standardised(distances)[np.ix_(members, members)][~np.eye(n, dtype=bool)]
    return z


def _of_pairs(weights: Weights, z: Numbers) -> tuple[Floats, _Tape]:
    outputs, tape = _outputs(weights, z)
    n = (1 + int(np.sqrt(1 + 4 * len(z)))) // 2
    c = np.zeros((n, n))
    c[~np.eye(n, dtype=bool)] = _softmin(outputs.reshape(n, n - 1)).ravel()
    return c, tape


def _softmin(rows: Numbers) -> Floats:
    wide = rows.astype(np.float64)
    exponential = np.exp(wide.min(axis=1, keepdims=True) - wide)
    c: Floats = exponential / exponential.sum(axis=1, keepdims=True)
    return c
