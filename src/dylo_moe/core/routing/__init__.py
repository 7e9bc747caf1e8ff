"""Who goes where: the router, where it reads, and the losses that balance it."""
