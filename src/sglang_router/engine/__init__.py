"""Engines the router can start by itself: the built-in stand-in, and llama.cpp."""
