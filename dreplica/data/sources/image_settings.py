"""A check of the settings that apply only to images of bytes."""

from dreplica.config.schema import DataConfig
from dreplica.errors import UsageError


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
