"""What a mixture is made of, as plain values without torch: an expert's settings and the routing mode."""

from dylo_moe.spec.expert_spec import ExpertSpec
from dylo_moe.spec.routing_mode import RoutingMode

__all__ = [
    "ExpertSpec",
    "RoutingMode",
]
