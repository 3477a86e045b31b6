"""Guided decoding: `decoder.py` takes a request, `scheduler.py` leads its rows through the slots of `engine.py`."""
