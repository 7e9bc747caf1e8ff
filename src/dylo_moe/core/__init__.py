"""The mixture itself: base model, experts, router, and the model that they make up."""

# before any other module of this package: importing transformers imports this one (see ``registration``), and whatever
# is half-way imported then cannot be imported by it
import dylo_moe.core.model  # noqa: F401
