"""Turn a downloaded checkpoint into a minidit model folder: `python -m weights_convert SOURCE OUT`."""
