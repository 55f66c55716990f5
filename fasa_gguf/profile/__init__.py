"""Profiles: which frequency chunks are dominant."""

from .profile import Profile

__all__ = ["Profile"]
