"""The methods by name."""

from __future__ import annotations

from model.methods import customcontrast, dreamidentity, ip_adapter_plus, realcustom, realcustom_pp
from model.methods.base import AdapterMethod
from model.methods.config import AdapterConfig
from runtime.errors import ModelError

METHODS: dict[str, AdapterMethod] = {
    module.METHOD.name: module.METHOD
    for module in (customcontrast, ip_adapter_plus, realcustom, realcustom_pp, dreamidentity)
}


def method_of(config: AdapterConfig) -> AdapterMethod:
    """The method of an adapter.

    Raises:
        ModelError: no method has that name, or the config does not fit it.
    """
    if config.encoder not in METHODS:
        *others, last = METHODS
        raise ModelError(f"adapter: encoder is '{config.encoder}'; use {', '.join(others)} or {last}")
    method = METHODS[config.encoder]
    method.check(config)
    return method
