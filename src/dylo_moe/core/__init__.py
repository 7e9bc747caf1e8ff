"""The mixture itself: base model, experts, router, and the model that they make up."""

# first, before any other module of the package: importing transformers imports this package (see ``registration``), and
# a half-imported module cannot be imported again
import dylo_moe.core.model  # noqa: F401
