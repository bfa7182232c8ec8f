"""LoRA adapters for new datasets, from a bank of adapters, without training (arXiv 2507.01806).

    from lorameta_rs import Bank, jensen_shannon, normalized, token_distribution

    bank = Bank("adapters/")
    target = token_distribution("questions.jsonl", tokenizer=bank.tokenizer)
    coefficients = normalized(jensen_shannon(bank.fingerprints, target))
    bank.merge(coefficients, out="predicted/")

or, in one call, `generate("adapters/", "questions.jsonl", "predicted/")`.
"""

from __future__ import annotations

# Of `typing`, whose import takes long enough for a Ctrl-C that nobody could catch.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from lorameta_rs.bank import Bank as Bank
    from lorameta_rs.coefficients import attentional as attentional
    from lorameta_rs.coefficients import nearest as nearest
    from lorameta_rs.coefficients import normalized as normalized
    from lorameta_rs.coefficients import select as select
    from lorameta_rs.coefficients import uniform as uniform
    from lorameta_rs.distance import cosine as cosine
    from lorameta_rs.distance import jensen_shannon as jensen_shannon
    from lorameta_rs.distance import kullback_leibler as kullback_leibler
    from lorameta_rs.distance import maximum_mean_discrepancy as maximum_mean_discrepancy
    from lorameta_rs.distance import wasserstein as wasserstein
    from lorameta_rs.errors import LoraMetaError as LoraMetaError
    from lorameta_rs.fingerprint import Fingerprint as Fingerprint
    from lorameta_rs.fingerprint import Fingerprints as Fingerprints
    from lorameta_rs.fingerprint import token_distribution as token_distribution
    from lorameta_rs.flow import generate as generate
    from lorameta_rs.merge import Options as Options
    from lorameta_rs.ranking import Settings as Settings

# In the order of the flow. Each is imported when it is first asked for, so that the command line
# can show its help without numpy, the tokenizers or the core.
_MODULES = {
    "Bank": "bank",
    "Fingerprint": "fingerprint",
    "Fingerprints": "fingerprint",
    "token_distribution": "fingerprint",
    "jensen_shannon": "distance",
    "kullback_leibler": "distance",
    "wasserstein": "distance",
    "maximum_mean_discrepancy": "distance",
    "cosine": "distance",
    "attentional": "coefficients",
    "normalized": "coefficients",
    "nearest": "coefficients",
    "uniform": "coefficients",
    "select": "coefficients",
    "Settings": "ranking",
    "Options": "merge",
    "generate": "flow",
    "LoraMetaError": "errors",
}

__all__ = list(_MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
