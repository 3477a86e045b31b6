"""Tokens per second, against the loops that people run today and against the floor that memory sets."""
