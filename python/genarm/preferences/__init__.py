"""Preference data: rows of published formats, the pairs that are made of them, and the pairs as token ids."""

from .pairs import Preference, Preferences, encode_preferences, read_preferences

__all__ = ["Preference", "Preferences", "encode_preferences", "read_preferences"]
