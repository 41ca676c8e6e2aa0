"""Engines that come with the router: the built-in engine, which simulates a model, and llama.cpp's server."""
