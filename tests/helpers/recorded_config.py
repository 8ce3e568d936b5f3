"""Configurations that record which of their fields are read."""

import copy
from typing import Any

from ml_collections import ConfigDict, FieldReference


def record(config: Any, reads: set[str], prefix: str = "") -> Any:
    """Changes a ConfigDict: when code gets the value of a field, its name is added to `reads`.

    Names have dots, such as 'optim.name'. Conversion to JSON, comparison and overrides add none.
    """
    for key, value in config._fields.items():
        if isinstance(value, ConfigDict):
            record(value, reads, f"{prefix}{key}.")
    object.__setattr__(config, "__class__", _Recorded)
    object.__setattr__(config, "noted", (reads, prefix))
    return config


class _Recorded(ConfigDict):
    noted: tuple[set[str], str]
    _fields: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if not isinstance(value, ConfigDict) and "." not in key:
            self.noted[0].add(self.noted[1] + key)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Returns a copy that adds names to the same set."""
        fields = copy.deepcopy(self._fields, memo)
        copied = ConfigDict()
        object.__setattr__(copied, "_fields", fields)
        return record(copied, *self.noted)

    def get_type(self, key: str) -> type:
        field = self._fields[key]
        return field.get_type() if isinstance(field, FieldReference) else type(field)

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        plain = _RecordedDict()
        plain.noted = self.noted
        for key, value in self._fields.items():
            value = value.get() if isinstance(value, FieldReference) else value
            plain[key] = value.to_dict() if isinstance(value, ConfigDict) else value
        return plain


class _RecordedDict(dict[str, Any]):
    """A dict that adds the name of an item to a set if it is looked up or unpacked by `**`."""

    noted: tuple[set[str], str]

    def __getitem__(self, key: str) -> Any:
        if not isinstance(self.get(key), dict):
            self.noted[0].add(self.noted[1] + key)
        return super().__getitem__(key)

    def __iter__(self) -> Any:  # so that `dict(spec)` and `**spec` call `__getitem__`
        return super().__iter__()
