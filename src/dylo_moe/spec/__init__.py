"""What a mixture is made of, as plain values without torch: an expert's settings and the routing mode."""
