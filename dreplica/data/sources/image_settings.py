"""Checks of the settings that apply only to some data."""

from collections.abc import Iterable

from dreplica.config.ignored import ignored_setting
from dreplica.config.schema import DataConfig
from dreplica.errors import UsageError

SOURCE_SETTINGS = ("root", "val_fraction", "split_seed")
"""Keys of the section `data` that only the source of the data uses."""


def check_no_image_settings(config: DataConfig, reason: str) -> None:
    """Raise UsageError if the section sets `augment` or `image_size`, which do not apply for this `reason`."""
    for key in ("augment", "image_size"):
        value = getattr(config, key)
        if value is not None:
            raise UsageError(
                f"data.{key}: {value!r} applies to images of bytes only (torch.uint8 (3, H, W), or PIL images), but "
                f"{reason}. Set it to null, or use other data.",
                code="not-images",
                key=f"data.{key}",
                value=value,
            )


def check_no_source_settings(
    config: DataConfig, reason: str, keys: Iterable[str] = ("val_fraction", "split_seed")
) -> None:
    """Raise UsageError if the user has set keys of the section that this source does not use.

    Args:
        config: The section `data`.
        reason: Why they are not used.
        keys: The keys that are not used.
    """
    given = [f"data.{key}" for key in keys if key in config.model_fields_set and getattr(config, key) is not None]
    if given:
        raise ignored_setting(given, reason, "Remove it." if len(given) == 1 else "Remove them.")
