"""The control plane: a Starlette app, never on the way of an inference request."""
