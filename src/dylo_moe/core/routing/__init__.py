"""Who goes where: the router, where it reads, and the losses that balance it."""

from dylo_moe.core.routing.balance import (
    expert_load,
    expert_mask,
    load_balance_loss,
    router_z_loss,
    updated_selection_bias,
)
from dylo_moe.core.routing.caches import CACHE_NAME, with_cache_renamed
from dylo_moe.core.routing.context import Context, real_tokens, running_means
from dylo_moe.core.routing.hooks import RouterHooks, make_router
from dylo_moe.core.routing.router import MATURE, SUM_TO_ONE, YOUNG, DynamicHybridRouter, rms_normalize

__all__ = [
    "CACHE_NAME",
    "MATURE",
    "SUM_TO_ONE",
    "YOUNG",
    "Context",
    "DynamicHybridRouter",
    "RouterHooks",
    "expert_load",
    "expert_mask",
    "load_balance_loss",
    "make_router",
    "real_tokens",
    "rms_normalize",
    "router_z_loss",
    "running_means",
    "updated_selection_bias",
    "with_cache_renamed",
]
