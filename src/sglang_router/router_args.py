"""`sglang_router.router_args`: where programs written for the reference router look for RouterArgs."""

from sglang_router.config import RouterArgs

__all__ = ["RouterArgs"]
