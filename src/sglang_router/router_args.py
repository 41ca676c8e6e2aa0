"""RouterArgs under the module name that programs written for the reference router import."""

from sglang_router.config import RouterArgs

__all__ = ["RouterArgs"]
