"""What happens in one forward pass of a model."""

from ._feed import Forward, apply, device_of, feed, moved

__all__ = ["Forward", "apply", "device_of", "feed", "moved"]
